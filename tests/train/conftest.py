import pytest
import torch
from live_runs import FIFTY, settings

from ddpm_ema import config, train


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """A run of 40 steps on one process that nobody disturbed."""
    run = settings(tmp_path_factory.mktemp("whole") / "run", training__steps=40)
    train.run(run)
    return run


@pytest.fixture(scope="session")
def fifty_steps(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    run = settings(tmp_path_factory.mktemp("fifty") / "run", **FIFTY)
    train.run(run)
    return run


@pytest.fixture
def overflowing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts the fp16 scaler so high that the first backward passes overflow."""
    scaler = torch.amp.GradScaler
    high = {"init_scale": 2.0**40, "backoff_factor": 2.0**-10}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, enabled=enabled, **high))
