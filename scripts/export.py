"""ddpm-ema export: python scripts/export.py RUN NAME [--output FOLDER --step N --variant]."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
