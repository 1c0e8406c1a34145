"""What can only be seen on a CUDA device. Never needed to pass elsewhere."""

import os
from pathlib import Path

import pytest
import torch
from live_runs import assert_bit_equal, exact, rows, settings, state

from ddpm_ema import AverageBank, BiasCorrected, ConstantDecay, PowerFunction, keyed_random, train
from ddpm_ema.distributed import Processes
from ddpm_ema.rundir import RunDir
from ddpm_ema.train.loop import batches_of
from ddpm_ema.train.step import read_checks, train_step
from ddpm_ema.train.trainer import build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_averages_of_a_bf16_model_are_fp32_and_agree_with_the_cpu() -> None:
    profiles = {"ema": ConstantDecay(0.99), "debiased": BiasCorrected(0.99), "power": PowerFunction(std=0.1)}
    weights = torch.nn.Linear(64, 64).to(torch.bfloat16)
    twin = torch.nn.Linear(64, 64).cuda().to(torch.bfloat16)
    twin.load_state_dict(weights.state_dict())
    banks = [AverageBank(m.named_parameters(), profiles) for m in (weights, twin)]
    for step in range(1, 101):
        with torch.no_grad():
            for a, b in zip(weights.parameters(), twin.parameters(), strict=True):
                a.copy_(torch.randn_like(a))
                b.copy_(a)
        for bank in banks:
            bank.update(step)
    for name in profiles:
        for key, value in banks[0].weights(name).items():
            other = banks[1].weights(name)[key]
            assert other.dtype == torch.float32
            assert torch.allclose(value, other.cpu(), atol=1e-6)


def test_an_update_never_waits_for_the_device() -> None:
    model = torch.nn.Linear(256, 256).cuda()
    bank = AverageBank(model.named_parameters(), {"ema": ConstantDecay(0.99), "power": PowerFunction(std=0.1)})
    bank.update(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bank.update(2)
        bank.squared_distances()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("storage", ["device", "memory", "stream"])
def test_a_training_step_never_waits_for_the_device(tmp_path: Path, storage: str) -> None:
    """From images and labels to the averages and the check of an earlier step's gradient."""
    data = {"data__storage": storage, "data__horizontal_flip": True, "model__class_conditional": True}
    run = settings(tmp_path / "run", machine__device="cuda", training__micro_batch_size=8, **data)
    trainer = build(run, Processes.start("cuda"), RunDir(run.output_dir))
    for number, micro_batches in enumerate(batches_of(trainer)):
        torch.cuda.set_sync_debug_mode("error" if number >= 4 else "default")  # once kernels are loaded
        try:
            train_step(trainer, micro_batches)
            read_checks(trainer, lag=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == run.training.steps


def test_a_resumed_run_on_cuda_is_bit_equal_with_deterministic_kernels(tmp_path: Path) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        whole = settings(tmp_path / "whole", machine__device="cuda", training__steps=12)
        train.run(whole)
        train.run(settings(tmp_path / "run", machine__device="cuda", training__steps=5))
        run = settings(tmp_path / "run", machine__device="cuda", training__steps=12)
        train.run(run)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_bit_equal(state(run), state(whole))
    assert exact(run) == exact(whole)


def test_cuda_sees_the_losses_that_the_cpu_sees(tmp_path: Path) -> None:
    cpu = settings(tmp_path / "cpu", training__steps=10, machine__tf32=False)
    gpu = settings(tmp_path / "gpu", training__steps=10, machine__tf32=False, machine__device="cuda")
    train.run(cpu)
    train.run(gpu)
    for mine, theirs in zip(rows(gpu), rows(cpu), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_compiled_run_in_low_precision_trains(tmp_path: Path, precision: str) -> None:
    run = settings(
        tmp_path / "run",
        machine__device="cuda",
        training__mixed_precision=precision,
        training__compile=True,
        training__steps=30,
    )
    train.run(run)
    losses = [row["loss"] for row in rows(run)]
    assert losses[-1] < losses[0]


def test_random_streams_give_the_same_bits_as_on_the_cpu() -> None:
    positions = torch.arange(128)
    cpu = keyed_random.normal(7, keyed_random.Purpose.NOISE, 11, positions, (3, 32, 32))
    gpu = keyed_random.normal(7, keyed_random.Purpose.NOISE, 11, positions.cuda(), (3, 32, 32))
    assert torch.equal(cpu, gpu.cpu())
