"""`bank.module`: a module that computes with an average's weights, which are not copied and not swapped."""

import pytest
import torch
from torch import nn

from ddpm_ema.averaging import AverageBank, ConstantDecay


def make(wrap=lambda model: model) -> tuple[nn.Module, AverageBank]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    bank = AverageBank(wrap(model), {"ema": ConstantDecay(0.5)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    bank.update(1)
    return model, bank


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager"), nn.DataParallel]
)
def test_it_computes_what_a_copy_of_the_average_computes_and_follows_later_updates(wrap) -> None:
    model, bank = make()
    averaged, copied, x = bank.module("ema", wrap(model)), make()[0].eval(), torch.randn(16, 4)
    for step in (2, 3):
        bank.copy_to("ema", copied)
        assert torch.equal(averaged(x), copied(x))
        nn.init.ones_(model[0].weight)
        bank.update(step)
    assert not averaged.training
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    assert averaged[0].weight.data_ptr() == bank.weights("ema")["0.weight"].data_ptr()


def test_the_trained_model_keeps_its_weights_mode_and_gradients() -> None:
    model, bank = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = bank.module("ema", model)
    averaged.train()(torch.randn(16, 4))  # its batch norm counts in the average's buffers
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_that_the_bank_does_not_follow_are_the_models_own() -> None:
    model, _ = make()
    bank = AverageBank([("3.weight", model[3].weight)], {"ema": ConstantDecay(0.5)})
    averaged = bank.module("ema", model)
    assert averaged[0].weight is model[0].weight
    assert averaged[1].running_mean is model[1].running_mean
    assert averaged[3].weight is not model[3].weight


def test_averages_of_a_bf16_model_are_fp32_and_run_under_autocast() -> None:
    model = nn.Linear(4, 2).to(torch.bfloat16)
    averaged = AverageBank(model, {"ema": ConstantDecay(0.5)}).module("ema", model)
    assert averaged.weight.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert averaged(torch.ones(1, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_another_architecture_and_a_share_of_the_average_are_refused() -> None:
    model, bank = make()
    with pytest.raises(ValueError, match=r"module: '0\.weight' has shape \(8, 4\), expected \(8, 3\)"):
        bank.module("ema", nn.Sequential(nn.Linear(3, 8), *model[1:]))
    with pytest.raises(ValueError, match="module: this process has only its share"):
        AverageBank(model, {"ema": ConstantDecay(0.5)}, rank=0, world_size=2).module("ema", model)


def test_a_model_may_hold_its_own_bank() -> None:
    model = nn.Linear(2, 1)
    model.bank = AverageBank(model, {"ema": ConstantDecay(0.5)})
    averaged = model.bank.module("ema", model)
    assert averaged.bank is model.bank
    assert averaged.weight.data_ptr() == model.bank.weights("ema")["weight"].data_ptr()
