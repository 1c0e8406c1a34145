"""Sample raw and all averages from the same noise, score each, and say which differences are significant.

accelerate launch scripts/sample_and_score.py --config configs/digits.yaml --evaluation.weights raw ema_0_999
"""

import sys

from ddpm_ema import cli, score

if __name__ == "__main__":
    sys.exit(cli.main(score.run, __doc__))
