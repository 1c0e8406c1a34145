"""Sample all named weights from the same noise, on all processes, and say with error bars which weights to ship.

`run` scores a run directory; `while_training` makes the quick scorings of the trainer. Read in this order: `run` (the whole),
`driver` (the loop of all processes), `generate` (weights → images and features, one process), `sampled` (which images are missing),
`scorer` (one table: what rank 0 wants and keeps), `rows` (features → a row). Beside them: `feature_store` and `folder` (files),
`reference` and `real_images`, `results` (results.json and table), `sweep` and `search`, `versions` (whether images may go
on), `checkpoints`, `quick`.
"""

from ddpm_ema.score.quick import while_training
from ddpm_ema.score.run import run
