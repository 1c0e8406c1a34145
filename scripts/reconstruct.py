"""python scripts/reconstruct.py RUN --target power_function:std=0.075 [--target constant:decay=0.999 --step N --out DIR]."""

import sys

from ddpm_ema import cli, reconstruction

if __name__ == "__main__":
    sys.exit(cli.guard(reconstruction.main))
