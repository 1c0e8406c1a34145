"""What other programs stored of a training run → a run directory that every later stage can use."""

from ddpm_ema.importing.run import main
