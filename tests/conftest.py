"""Tests share two cores: one thread each is faster than two that wait for each other, and sums come in one order."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
