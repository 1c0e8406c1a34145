"""ddpm-ema features: python scripts/train_features.py --config configs/digits.yaml."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main(["features", *sys.argv[1:]]))
