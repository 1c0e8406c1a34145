"""ddpm-ema import: python scripts/import_run.py SOURCE --output-dir RUN [--pattern 'step_{step}.safetensors' ...]."""

import sys

from ddpm_ema.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
