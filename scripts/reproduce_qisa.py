#!/usr/bin/env python
"""Trains classical attention, QISA as in its authors' public code and QISA made causal, and writes the page about them.

    python scripts/reproduce_qisa.py                    an hour or so; goes on where it was stopped
    python scripts/reproduce_qisa.py --page docs        where the page and its picture go (default: runs/reproduce-qisa)

Further arguments go to `qattn compare`, as `--fit.trainer.max_steps 100`.
"""

import argparse
import sys
from pathlib import Path

from lightning_modules.cli import main as qattn
from lightning_modules.comparison_rows import read_rows, read_timings
from lightning_modules.reproduction import write_page

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "reproduce_qisa.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="what is compared (default: %(default)s)")
    parser.add_argument("--output", default="runs/reproduce-qisa", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--page", help="folder of the page (default: that of the runs)")
    options, further = parser.parse_known_args()
    if status := qattn(["compare", "--config", options.config, "--output", options.output, *further]):
        return status
    rows = read_rows(Path(options.output))
    timings = read_timings(Path(options.output), rows)
    page = write_page(Path(options.page or options.output), rows, next(iter(timings.values()), None))
    print(f"page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
