"""The trainer: `build` puts a run together, `train_step` is one optimizer step, `run` goes to the end."""

from ddpm_ema.train.dry_run import dry_run
from ddpm_ema.train.loop import run
from ddpm_ema.train.step import train_step
from ddpm_ema.train.trainer import build
