"""Sample every averaged copy from the same noise, score each, and say which differences are real.

accelerate launch scripts/sample_and_score.py --config configs/digits.yaml --evaluation.weights raw ema_0_999
"""

import sys

from ddpm_ema import cli, score

if __name__ == "__main__":
    sys.exit(cli.main(score.run, __doc__))
