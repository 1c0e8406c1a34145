"""A name → tensors, and what there is to know of them: profile, key, reconstruction, warnings. `weight_names` has the grammar."""

from ddpm_ema.named_weights.folder import (
    PipelineConfig,
    PipelineFolder,
    build_scheduler,
    build_unet,
    schedule_of,
    unet_config_of,
)
from ddpm_ema.named_weights.resolver import NamedWeights, WeightResolver, name_of, trained_settings
from ddpm_ema.named_weights.target import parse_target
