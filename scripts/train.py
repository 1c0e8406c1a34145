"""ddpm-ema train, as a file for launchers: accelerate launch scripts/train.py --config configs/digits.yaml --training.steps 500."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
