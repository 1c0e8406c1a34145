"""ddpm-ema report: python scripts/report.py RUN [--output FILE --scoring FOLDER]."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
