"""Averages in host memory: the same numbers, later; nothing lost between the caller and the thread."""

import threading

import pytest
import torch

from ddpm_ema.averaging import AverageBank, ConstantDecay, HardCopy, PowerFunction
from ddpm_ema.averaging import bank as bank_module
from ddpm_ema.averaging.offload import HostMirror


def test_a_mirror_hands_the_values_of_the_moment_to_its_thread() -> None:
    source = torch.zeros(4)
    mirror = HostMirror([source])
    gate, seen = threading.Event(), []

    def work() -> None:
        gate.wait()
        seen.append(mirror.values[0].clone())

    source.fill_(1.0)
    mirror.submit([source], work)
    source.fill_(2.0)  # the optimizer goes on while the thread still waits
    gate.set()
    mirror.wait()
    assert seen[0].tolist() == [1.0] * 4


def test_a_submission_waits_for_the_one_before_so_that_its_values_are_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = torch.zeros(4)
    mirror = HostMirror([source])
    gate, seen = threading.Event(), []
    mirror._thread.submit(gate.wait)  # the host is behind: no submission's turn comes until someone waits for it
    wait = mirror.wait

    def wait_until_done() -> None:
        gate.set()
        wait()

    for value in (1.0, 2.0):
        source.fill_(value)
        mirror.submit([source], lambda: seen.append(mirror.values[0].tolist()))
        monkeypatch.setattr(mirror, "wait", wait_until_done)
    mirror.wait()
    assert seen == [[1.0] * 4, [2.0] * 4]


def test_what_went_wrong_in_the_thread_is_raised_in_the_caller() -> None:
    mirror = HostMirror([torch.zeros(1)])
    mirror.submit([torch.ones(1)], lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mirror.wait()


def test_averages_in_host_memory_equal_those_beside_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.randn(50, dtype=torch.bfloat16)
    profiles = {"a": ConstantDecay(0.9), "p": PowerFunction(0.1), "h": HardCopy(4)}
    beside = AverageBank([("w", parameter)], profiles)
    monkeypatch.setattr(bank_module, "_elsewhere", lambda tensor, device: True)  # as if it lived on an accelerator
    on_host = AverageBank([("w", parameter)], profiles, device="cpu")
    assert on_host._mirror is not None
    for step in range(1, 31):
        parameter.normal_()
        beside.update(step)
        on_host.update(step)
    for name in profiles:
        assert torch.equal(on_host.weights(name)["w"], beside.weights(name)["w"])
    assert {k: v.item() for k, v in on_host.squared_distances().items()} == {
        k: v.item() for k, v in beside.squared_distances().items()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_in_host_memory_of_a_model_on_cuda_equal_those_on_cuda(dtype: torch.dtype) -> None:
    parameter = torch.randn(1 << 20, device="cuda", dtype=dtype)
    beside = AverageBank([("w", parameter)], {"a": ConstantDecay(0.9)})
    on_host = AverageBank([("w", parameter)], {"a": ConstantDecay(0.9)}, device="cpu")
    for step in range(1, 21):
        parameter.normal_()
        beside.update(step)
        on_host.update(step)
    torch.testing.assert_close(on_host.weights("a")["w"], beside.weights("a")["w"].cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_update_on_cuda_never_waits_for_the_device() -> None:
    parameters = [(f"w{i}", torch.randn(1000, device="cuda")) for i in range(10)]
    bank = AverageBank(parameters, {"a": ConstantDecay(0.9), "p": PowerFunction(0.1)})
    torch.cuda.set_sync_debug_mode("error")
    try:
        bank.update(1)
        bank.squared_distances()
        bank.squared_norm()
    finally:
        torch.cuda.set_sync_debug_mode("default")
