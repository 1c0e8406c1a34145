"""python scripts/export.py RUN NAME [--output FOLDER --step N --variant]: a named copy as a diffusers pipeline folder."""

import sys

from ddpm_ema import cli, export

if __name__ == "__main__":
    sys.exit(cli.guard(export.main))
