"""ddpm-ema score, as a file for launchers: accelerate launch scripts/sample_and_score.py --config configs/digits.yaml."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
