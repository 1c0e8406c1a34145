"""ddpm-ema reconstruct: python scripts/reconstruct.py RUN --target power_function:std=0.075 [--step N --out DIR]."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main(["reconstruct", *sys.argv[1:]]))
