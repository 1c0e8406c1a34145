"""Images in: digits, torchvision sets, folders and Hub sets, as uint8 tensors that depend on nothing but their files."""

from ddpm_ema.data.dataset import HELD_OUT, ImageDataset, load
