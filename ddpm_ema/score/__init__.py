"""Sample all named weights from the same noise, on all processes, and say with error bars which weights to ship.

`run` scores a run directory; `while_training` makes the quick scorings of the trainer. Files, from the ground up: `blocks` (features
on disk), `weights` (names → tensors), `network` (the one model), `studio` (sampling over processes), `reference`, `measure`
(features → a row), `folder` (what a scoring keeps), `results` (results.json and table), `scoring` (one checkpoint), `versions`
(whether it may go on), `search` and `sweep`, `run`.
"""

from __future__ import annotations

from ddpm_ema.score.run import run
from ddpm_ema.score.while_training import while_training

__all__ = ["run", "while_training"]
