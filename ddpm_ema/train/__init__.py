"""The trainer: `build` puts a run together, `train_step` is one optimizer step, `run` goes to the end.

Everything random is a function of (seed, step, position in the global batch), so there is no random state to save, and one
process, eight, or micro-batches of one image see the same numbers (docs/training.md has the exact guarantees).
"""

from ddpm_ema.train.dry_run import dry_run
from ddpm_ema.train.loop import run
from ddpm_ema.train.step import train_step
from ddpm_ema.train.trainer import build
