#!/usr/bin/env python
"""Trains classical attention, QISA as in its authors' public code and QISA made causal, and writes the page about them.

    python scripts/reproduce_qisa.py                    an hour or so; goes on where it was stopped
    python scripts/reproduce_qisa.py --page docs        where the page and its picture go (default: runs/reproduce-qisa)

Further arguments go to `qattn compare`, as `--fit.trainer.max_steps 100`. A dry run or a shard writes no page.
"""

import sys
from pathlib import Path

from lightning_modules.cli import reported
from lightning_modules.reproduction import reproduce

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "reproduce_qisa.yaml"

if __name__ == "__main__":
    sys.exit(reported(lambda: reproduce(sys.argv[1:], CONFIG, __doc__)))
