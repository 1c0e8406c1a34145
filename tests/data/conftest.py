from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve 4×4 RGB images in three classes, each one flat colour that tells which it is."""
    root = tmp_path / "images"
    for label, name in enumerate(["b", "a", "c"]):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 4), (10 * label, 20 * i, 100)).save(root / name / f"{i}.png")
    return root
