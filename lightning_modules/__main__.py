"""`python -m lightning_modules` is `qattn`."""

import sys

from lightning_modules.cli import main

sys.exit(main())
