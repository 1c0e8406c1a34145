"""Images in: digits, torchvision sets, folders and Hub sets, as uint8 tensors that depend on nothing but their files.

`load` is the one way in. `convert` says what becomes of every kind of image; `folder`, `library`, `vision` and `hub` say
where images come from; `decode` reads them all, `cache` keeps them in a file, `workers` decode them ahead of need, and
`dataset` is what the rest of the program holds.
"""

from __future__ import annotations

from ddpm_ema.data.dataset import ImageDataset, load

__all__ = ["ImageDataset", "load"]
