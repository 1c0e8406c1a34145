"""python scripts/import_run.py SOURCE --output-dir RUN [--pattern 'step_{step}.safetensors' --profile constant:decay=0.999 ...]."""

import sys

from ddpm_ema import cli, importing

if __name__ == "__main__":
    sys.exit(cli.guard(importing.main))
