"""What an update asks of a device, seen without one: nothing is read back, and all averages of all tensors are one call."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_ema.averaging import AverageBank, BiasCorrected, ConstantDecay, HardCopy, PowerFunction, Uniform
from ddpm_ema.averaging.naming import parts

PROFILES = {
    "a": ConstantDecay(0.9),
    "p": PowerFunction(0.1),
    "u": Uniform(),
    "h": HardCopy(2),
    "d": BiasCorrected(0.99),
}


class Calls(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_an_update_and_its_distances_read_no_value_back_from_the_device() -> None:
    with FakeTensorMode():  # tensors without values: whatever needs one, as .item() does, fails
        parameters = [
            ("fp32", torch.empty(64, 3, device="cuda")),
            ("bf16", torch.empty(5, device="cuda", dtype=torch.bfloat16)),
        ]
        with pytest.raises(DataDependentOutputException):
            parameters[0][1].sum().item()
        bank = AverageBank(parameters, PROFILES)
        for step in range(1, 5):
            bank.update(step)
        distances = [*bank.squared_distances().values(), bank.squared_norm()]
        assert all(distance.device.type == "cuda" and distance.shape == () for distance in distances)


def test_all_moving_averages_of_all_tensors_are_one_call() -> None:
    bank = AverageBank([(f"w{i}", torch.zeros(10)) for i in range(50)], PROFILES)
    bank.update(1)
    with Calls() as calls:
        bank.update(2)  # the hard copy is overwritten, the four others move
    assert calls.count == {"_foreach_copy_.default": 1, "_foreach_lerp_.ScalarList": 1}
    with Calls() as calls:
        bank.update(3)
    assert calls.count == {"_foreach_lerp_.ScalarList": 1}


def test_an_average_that_does_not_move_costs_nothing() -> None:
    bank = AverageBank([("w", torch.zeros(10))], {"target": HardCopy(1000), "frozen": ConstantDecay(1.0)})
    with Calls() as calls:
        bank.update(1)
    assert not calls.count


def test_lower_precision_on_an_accelerator_is_converted_in_bounded_parts() -> None:
    sizes = dict(enumerate((5, 3, 9, 2, 2)))
    assert list(parts(sizes, 8)) == [[0, 1], [2], [3, 4]]
    assert list(parts(sizes, 0)) == [[0], [1], [2], [3], [4]]
