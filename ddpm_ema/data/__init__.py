"""Images in: digits, torchvision sets, folders and Hub sets, as uint8 tensors that depend on nothing but their files.

`load` is the one way in. `source` is what every source offers, and `*_source` are the sources; `convert` turns any image into
pixels; `decode` reads all images once, `cache` keeps them in a file; `dataset` is what the rest of the program holds.
"""

from ddpm_ema.data.dataset import HELD_OUT, ImageDataset, load
