"""Train a DDPM U-Net while averaged copies of its weights are kept, and go on where the run directory stands.

accelerate launch scripts/train.py --config configs/digits.yaml --training.steps 500 --output-dir runs/x
"""

import functools
import sys

from ddpm_ema import cli, score, train

if __name__ == "__main__":
    run = functools.partial(train.run, evaluate=score.while_training)
    sys.exit(cli.main(run, __doc__))
