"""Train the feature classifier that scoring uses where ImageNet features do not suit, or where there is no network.

python scripts/train_features.py --config configs/digits.yaml
"""

import sys

from ddpm_ema import classifier_training, cli

if __name__ == "__main__":
    sys.exit(cli.main(classifier_training.train_features, __doc__))
