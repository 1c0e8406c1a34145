"""accelerate stores and restores a bank with everything else: `register_for_checkpointing(bank)`."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm_ema.averaging import AverageBank, PowerFunction, Uniform

accelerate = pytest.importorskip("accelerate")


def training(steps: int, folder: Path, resume: bool = False) -> AverageBank:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*(lambda m: (m, torch.optim.Adam(m.parameters(), lr=0.1)))(nn.Linear(4, 2)))
    bank = AverageBank(model, {"power": PowerFunction(0.1), "uniform": Uniform()})
    accelerator.register_for_checkpointing(bank)
    if resume:
        accelerator.load_state(folder)
    bank.attach(optimizer)  # goes on at the bank's own step
    while (bank.step or 0) < steps:
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 4)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
    if not resume:
        accelerator.save_state(folder)
    return bank


def test_a_bank_that_accelerate_stored_and_restored_goes_on_exactly(tmp_path: Path) -> None:
    whole = training(12, tmp_path / "whole")
    training(5, tmp_path / "stopped")
    resumed = training(12, tmp_path / "stopped", resume=True)
    for name in whole.profiles:
        for n, tensor in whole.weights(name).items():
            assert torch.equal(resumed.weights(name)[n], tensor)
