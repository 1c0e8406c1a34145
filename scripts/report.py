"""python scripts/report.py RUN [--output FILE --scoring FOLDER]: one HTML page that says which weights to ship, and why."""

import sys

from ddpm_ema import cli, report

if __name__ == "__main__":
    sys.exit(cli.guard(report.main))
