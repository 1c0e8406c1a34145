"""Named weights → a diffusers pipeline folder with a model card that says what they are and how good."""

from ddpm_ema.export.pipeline import export, main
