from __future__ import annotations

import pytest
from live_runs import FIFTY, finish, settings

from ddpm_ema import config


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """A run of 40 steps on one process that nobody disturbed."""
    run = settings(tmp_path_factory.mktemp("whole") / "run", training__steps=40)
    finish(run)
    return run


@pytest.fixture(scope="session")
def fifty_steps(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    run = settings(tmp_path_factory.mktemp("fifty") / "run", **FIFTY)
    finish(run)
    return run
