"""`python -m ddpm_ema` is the command `ddpm-ema`."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main())
