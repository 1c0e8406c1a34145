"""Attached to an optimizer, a bank moves once a real step: not on micro-batches, not on skipped steps."""

import pytest
import torch
from torch import nn

from ddpm_ema.averaging import AverageBank, ConstantDecay, Uniform


def make(optimizer_class=torch.optim.SGD, **settings) -> tuple[nn.Module, torch.optim.Optimizer, AverageBank]:
    model = nn.Linear(4, 1)
    bank = AverageBank(model.named_parameters(), {"u": Uniform(), "last": ConstantDecay(0.0)})
    return model, optimizer_class(model.parameters(), lr=0.1, **settings), bank


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_it_moves_once_a_step_whatever_the_optimizer(optimizer_class) -> None:
    model, optimizer, bank = make(optimizer_class)
    handle = bank.attach(optimizer)
    for _ in range(3):
        for _ in range(4):  # micro-batches
            model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(bank.weights("last")["weight"], model.weight)
    assert handle.step == bank.step == 3
    handle.remove()
    optimizer.step()
    assert bank.step == 3


def test_it_can_move_every_n_steps_and_go_on_from_a_step() -> None:
    model, optimizer, bank = make()
    handle = bank.attach(optimizer, start_step=40, every=10)
    model(torch.randn(2, 4)).sum().backward()
    for _ in range(25):
        optimizer.step()
    assert handle.step == 65
    assert bank.step == 60
    handle.remove()
    with pytest.raises(ValueError, match="start_step: the last update was at step 60, got 70"):
        bank.attach(optimizer, start_step=70, every=10)
    _, optimizer, bank = make()
    with pytest.raises(ValueError, match="start_step: expected a multiple of every=10"):
        bank.attach(optimizer, start_step=45, every=10)
    for wrong in (-1, 40.0, "40"):
        with pytest.raises(ValueError, match="start_step: expected a whole number of steps of at least 0"):
            bank.attach(optimizer, start_step=wrong)


def test_it_goes_on_from_the_banks_last_step_and_loaded_weights_need_theirs() -> None:
    _, optimizer, bank = make()
    bank.update(2800, num_steps=2800)
    assert bank.attach(optimizer).step == 2800
    optimizer.step()
    assert bank.step == 2801
    _, optimizer, loaded = make()
    loaded.load_weights("u", {name: tensor + 1 for name, tensor in loaded.weights("u").items()})
    with pytest.raises(ValueError, match="attach: weights were loaded: pass start_step"):
        loaded.attach(optimizer)
    assert loaded.attach(optimizer, start_step=2800).step == 2800


def test_a_second_optimizer_and_one_of_another_model_are_refused() -> None:
    model, optimizer, bank = make()
    handle = bank.attach(optimizer)
    with pytest.raises(ValueError, match=r"already attached: .* make one bank per optimizer"):
        bank.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    handle.remove()
    with pytest.raises(ValueError, match="the optimizer has none of this bank's parameters"):
        bank.attach(make()[1])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skipped_does_not_count(fused: bool) -> None:
    model, optimizer, bank = make(torch.optim.AdamW, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    handle = bank.attach(optimizer)
    for i in range(4):
        loss = model(torch.randn(2, 4)).sum() * (float("inf") if i == 1 else 1.0)
        before = model.weight.detach().clone()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(model.weight, before) == (i == 1)  # the second step really was skipped
    assert handle.step == bank.step == 3


def test_it_attaches_through_accelerates_wrapper_and_does_not_move_on_micro_batches() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer, _ = make()
    model, optimizer = accelerator.prepare(model, optimizer)
    bank = AverageBank(model.named_parameters(), {"u": Uniform()})
    handle = bank.attach(optimizer)
    for _ in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(2, 4)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert handle.step == bank.step == 2
