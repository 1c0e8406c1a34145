"""Tests share two cores: one thread each is faster than two that wait for each other, and sums come in one order."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
from ddpm_ema.messages import to_stderr  # noqa: E402

to_stderr()


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of every image that is sampled from here on."""
    from ddpm_ema import sampling

    indices: list[int] = []
    sample = sampling.sample

    def counting(*arguments: Any, **options: Any) -> torch.Tensor:
        indices.extend(options["indices"].tolist())
        return sample(*arguments, **options)

    monkeypatch.setattr(sampling, "sample", counting)
    return indices
