"""The bank on one process: what it follows, in which precision, and what it refuses."""

import copy
import doctest
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm_ema.averaging import (
    AverageBank,
    BiasCorrected,
    ConstantDecay,
    HardCopy,
    PowerFunction,
    StochasticWeightAverage,
    Uniform,
)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3))


def move(model: nn.Module, seed: int = 0) -> None:
    """What an optimizer step does, without one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("profile", "peer_settings", "taken"),
    [
        # AveragedModel's first call copies: the initial parameters (step 0) for an EMA, the first of the mean for SWA.
        (ConstantDecay(0.9), {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, range(101)),
        (ConstantDecay(0.99), {"multi_avg_fn": get_ema_multi_avg_fn(0.99)}, range(101)),
        (StochasticWeightAverage(start=30, every=7), {}, range(30, 101, 7)),
    ],
)
def test_it_is_torchs_averaged_model_to_1e_6(profile, peer_settings, taken) -> None:
    model = small_model()
    bank, peer = AverageBank(model, {"average": profile}), AveragedModel(model, **peer_settings)
    for step in range(101):
        if step:
            move(model, seed=step)
            bank.update(step)
        if step in taken:
            peer.update_parameters(model)
    for name, theirs in peer.module.named_parameters():
        torch.testing.assert_close(bank.weights("average")[name], theirs.detach(), rtol=1e-6, atol=1e-6)


def test_the_average_of_a_bf16_model_moves_over_10_000_steps_where_a_bf16_average_freezes() -> None:
    parameter = torch.full((16,), 1.0, dtype=torch.bfloat16)
    bank = AverageBank([("w", parameter)], {"ema": ConstantDecay(0.999)})
    frozen = parameter.clone()
    parameter.fill_(1.5)
    for step in range(1, 10_001):
        bank.update(step)
        frozen.lerp_(parameter, 0.001)
    assert bank.weights("ema")["w"].dtype is torch.float32
    torch.testing.assert_close(bank.weights("ema")["w"], torch.full((16,), 1.5), rtol=1e-3, atol=0)
    assert torch.equal(frozen, torch.full((16,), 1.0, dtype=torch.bfloat16))  # the trap is real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_kept_together_are_those_kept_alone_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_model().to(dtype)
    profiles = {
        "a": ConstantDecay(0.9),
        "p": PowerFunction(0.1),
        "h": HardCopy(3),
        "d": BiasCorrected(0.99),
        "u": Uniform(),
    }
    together = AverageBank(model.named_parameters(), profiles)
    alone = {name: AverageBank(model.named_parameters(), {name: profile}) for name, profile in profiles.items()}
    for step in range(1, 9):
        move(model, seed=step)
        for bank in (together, *alone.values()):
            bank.update(step)
    for name, bank in alone.items():
        assert equal(together.weights(name), bank.weights(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_averaged_in_fp32(dtype: torch.dtype) -> None:
    parameter = torch.zeros(5, dtype=dtype)
    bank = AverageBank([("w", parameter)], {"u": Uniform()})
    for step in range(1, 5):
        parameter.fill_(step)
        bank.update(step)
    torch.testing.assert_close(bank.weights("u")["w"], torch.full((5,), 2.5))


def test_a_compiled_model_is_paired_by_its_bare_names_and_follows_it() -> None:
    model = small_model()
    compiled = torch.compile(model, backend="eager")
    names = [name for name, _ in compiled.named_parameters()]
    assert all(name.startswith("_orig_mod.") for name in names)  # the trap is real
    bank = AverageBank(compiled.named_parameters(), {"last": ConstantDecay(0.0)})
    move(model)
    bank.update(1)
    assert equal(bank.weights("last"), parameters_of(model))
    shuffled = dict(
        reversed([(name, torch.full_like(p, i)) for i, (name, p) in enumerate(compiled.named_parameters())])
    )
    bank.load_weights("last", shuffled)  # prefixed names in any order
    assert equal(bank.weights("last"), {name: shuffled[f"_orig_mod.{name}"] for name in bank.parameter_names})


def test_wrapper_prefixes_are_dropped_anywhere_in_a_name() -> None:
    bank = AverageBank([("module._orig_mod.a._orig_mod.weight", torch.zeros(2))], {"x": Uniform()})
    assert bank.parameter_names == ["a.weight"]
    with pytest.raises(ValueError, match=r"'module\.a' and 'a' are both called 'a'"):
        AverageBank([("a", torch.zeros(1)), ("module.a", torch.zeros(1))], {"x": Uniform()})


def test_tied_parameters_share_one_average_under_both_names() -> None:
    tied = nn.Parameter(torch.zeros(4))
    bank = AverageBank([("in.weight", tied), ("out.weight", tied)], {"ema": ConstantDecay(0.5)})
    with torch.no_grad():
        tied.fill_(1.0)
    bank.update(1)
    weights = bank.weights("ema")
    assert weights["in.weight"].data_ptr() == weights["out.weight"].data_ptr()
    torch.testing.assert_close(weights["in.weight"], torch.full((4,), 0.5))  # moved once, not twice
    assert bank.num_bytes == 4 * 4


def test_frozen_parameters_stay_exactly_what_they_are() -> None:
    frozen = nn.Parameter(torch.randn(100), requires_grad=False)
    before = frozen.detach().clone()
    bank = AverageBank([("w", frozen)], {"a": ConstantDecay(0.999), "p": PowerFunction(0.1)})
    for step in range(1, 200):
        bank.update(step)
    assert torch.equal(bank.weights("a")["w"], before)
    assert torch.equal(bank.weights("p")["w"], before)


def test_an_average_that_does_not_move_is_not_touched_and_one_that_is_replaced_forgets_a_nan() -> None:
    parameter = torch.tensor([1.0])
    bank = AverageBank(
        [("w", parameter)], {"hard": HardCopy(2), "frozen": ConstantDecay(1.0), "debiased": BiasCorrected(0.9)}
    )
    bank.weights("debiased")["w"].fill_(float("nan"))
    bank.weights("hard")["w"].fill_(float("nan"))
    version = bank.weights("frozen")["w"]._version
    bank.update(1)
    assert bank.weights("debiased")["w"].item() == 1.0  # the first debiased update replaces
    assert torch.isnan(bank.weights("hard")["w"]).all()
    bank.update(2)
    assert bank.weights("hard")["w"].item() == 1.0
    assert bank.weights("frozen")["w"]._version == version


ODD_TENSORS = {
    "odd": torch.arange(7.0),
    "channels_last": torch.arange(240.0).view(3, 5, 4, 4).to(memory_format=torch.channels_last),
    "transposed": torch.arange(30.0).view(6, 5).t(),
    "expanded": torch.arange(4.0)[:, None].expand(4, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "bf16": torch.arange(9, dtype=torch.bfloat16),
}


def test_averages_are_fp32_with_the_values_and_layout_of_any_tensor_and_memory_of_their_own() -> None:
    before = {name: tensor.clone() for name, tensor in ODD_TENSORS.items()}
    bank = AverageBank(ODD_TENSORS.items(), {"ema": ConstantDecay(0.5), "u": Uniform()})
    assert bank.num_bytes == 2 * 4 * sum(tensor.numel() for tensor in ODD_TENSORS.values())
    assert all(tensor.is_contiguous() for _, tensor in bank.gather("ema"))  # as safetensors wants them
    for name, average in bank.weights("ema").items():
        assert average.dtype is torch.float32
        assert torch.equal(average, ODD_TENSORS[name].float())
        if name != "expanded":  # which has no memory of its own to lay out
            assert average.stride() == ODD_TENSORS[name].stride()
        average.fill_(99.0)
    for name, tensor in ODD_TENSORS.items():
        assert torch.equal(tensor, before[name])


def test_steps_left_out_are_refused_instead_of_weighted_wrongly() -> None:
    bank = AverageBank([("w", torch.zeros(1))], {"p": PowerFunction(0.1)})
    bank.update(100, num_steps=100)
    with pytest.raises(ValueError, match=r"update\(step=200, num_steps=1\) does not follow .* expected num_steps=100"):
        bank.update(200)
    with pytest.raises(ValueError, match="steps only grow"):
        bank.update(100, num_steps=100)
    bank.update(200, num_steps=100)
    assert bank.step == 200


@pytest.mark.parametrize("step", [1.0, 1.5, True, torch.tensor(1), "1", 0])
def test_a_step_that_is_no_whole_number_is_refused(step) -> None:
    bank = AverageBank([("w", torch.zeros(1))], {"u": Uniform()})
    with pytest.raises(ValueError, match=r"^step: expected a whole number of steps of at least 1, got"):
        bank.update(step)
    with pytest.raises(ValueError, match=r"^num_steps: expected a whole number"):
        bank.update(5, step)
    bank.update(np.int64(5), 5)
    assert type(bank.step) is int


def test_a_step_counts_only_when_its_update_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = AverageBank([("w", torch.zeros(1))], {"u": Uniform()})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bank.update(1)
    assert bank.step is None
    bank.update(1)
    assert bank.step == 1


def test_a_module_is_taken_with_its_buffers_and_all_names_of_its_tied_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    bank = AverageBank(nn.parallel.DataParallel(model), {"last": ConstantDecay(0.0)})
    assert bank.parameter_names == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert list(bank.buffers("last")) == [name for name, _ in model.named_buffers()]


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
        lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(8))),
        lambda model: nn.utils.parametrizations.weight_norm(model[0]),
        lambda model: setattr(model, "0", nn.Linear(4, 8)),
        lambda model: delattr(model, "2"),
    ],
)
def test_a_parameter_of_the_model_that_was_replaced_is_noticed(replace) -> None:
    model = small_model()
    bank = AverageBank(model, {"ema": ConstantDecay(0.5)})
    bank.update(1)
    replace(model)
    with pytest.raises(
        ValueError, match=r"parameter '([02]\.)?(weight|bias)' of the model was replaced .*: make a new bank and"
    ):
        bank.update(2)
    assert bank.step == 1
    with pytest.raises(ValueError, match="was replaced"):
        bank.update(2)


def test_a_layer_that_is_wrapped_or_added_after_the_bank_was_made_changes_nothing_for_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    bank = AverageBank(model, {"last": ConstantDecay(0.0)})
    model[0], model[1] = torch.compile(model[0]), nn.Sequential(model[1])  # the second wrapper gives other names
    model.append(nn.Linear(2, 2))
    for step in (1, 2):
        model[0].weight.data.fill_(float(step))
        model[1][0].running_mean.fill_(float(step))
        bank.update(step)
    assert bank.weights("last")["0.weight"].unique().item() == bank.buffers("last")["1.running_mean"][0].item() == 2.0


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_buffer_that_the_model_replaces_is_followed_and_one_of_another_shape_refused(buffers: str) -> None:
    norm = nn.BatchNorm1d(3)
    bank = AverageBank(norm, {"last": ConstantDecay(0.0)}, buffers=buffers)
    norm.double()  # makes new buffers
    norm.running_mean = norm.running_mean + 4.0
    norm.num_batches_tracked = norm.num_batches_tracked + 7
    bank.update(1)
    held = bank.buffers("last")
    assert held["running_mean"].tolist() == [4.0] * 3
    assert held["num_batches_tracked"].item() == 7
    norm.running_mean = torch.zeros(5)
    with pytest.raises(ValueError, match=r"buffers of the model: 'running_mean' has shape \(5,\), expected \(3,\)"):
        bank.update(2)
    norm.running_mean = None
    with pytest.raises(ValueError, match=r"buffers of the model: 'running_mean' is missing"):
        bank.update(2)
    assert bank.step == 1


@pytest.mark.parametrize("decay", [float("nan"), -0.1, 1.5])
def test_a_rule_that_gives_no_decay_is_refused(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = AverageBank([("w", torch.zeros(1))], {"soft": ConstantDecay(0.5), "mine": Uniform()})
    monkeypatch.setattr(Uniform, "decay", lambda *args: decay)
    with pytest.raises(ValueError, match=r"^mine: Uniform\(\) gives no decay in \[0, 1\] at step 1: "):
        bank.update(1)
    assert bank.step is None


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_bank_is_not_copied_or_pickled_with_parameters_of_its_own(duplicate) -> None:
    bank = AverageBank(small_model(), {"ema": ConstantDecay(0.5)})
    with pytest.raises(TypeError, match=r"call its load_state_dict\(bank\.state_dict\(\)\)"):
        duplicate(bank)


def test_a_bank_of_some_layers_is_copied_back_where_the_rest_is_left_alone() -> None:
    model, target = small_model(), small_model()
    bank = AverageBank(
        ((n, p) for n, p in model.named_parameters() if n.startswith("2.")), {"last": ConstantDecay(0.0)}
    )
    move(model)
    move(target, seed=1)
    bank.update(1)
    with pytest.raises(ValueError, match=r"'0\.weight' is missing"):
        bank.copy_to("last", target)
    before = target[0].weight.clone()
    bank.copy_to("last", target, strict=False)
    assert torch.equal(target[2].weight, model[2].weight)
    assert torch.equal(target[0].weight, before)


def test_buffers_are_copied_when_an_average_moves_or_averaged_on_request() -> None:
    norm = nn.BatchNorm1d(3)
    profiles = {"ema": ConstantDecay(0.5), "hard": HardCopy(2)}
    copied, averaged = AverageBank(norm, profiles), AverageBank(norm, profiles, buffers="average")
    with torch.no_grad():
        norm.running_mean.fill_(4.0)
        norm.num_batches_tracked.fill_(7)
    copied.update(1)
    averaged.update(1)
    assert copied.buffers("ema")["running_mean"].tolist() == [4.0] * 3
    assert averaged.buffers("ema")["running_mean"].tolist() == [2.0] * 3
    assert averaged.buffers("ema")["num_batches_tracked"].item() == 7
    assert averaged.buffers("ema")["num_batches_tracked"].dtype is torch.int64
    assert copied.buffers("hard")["running_mean"].tolist() == [0.0] * 3  # a target's statistics belong to its weights
    assert set(averaged.weights("ema")) == {"weight", "bias"}


def test_an_average_goes_into_a_module_with_its_buffers_and_in_the_modules_dtype() -> None:
    norm = nn.BatchNorm1d(3)
    bank = AverageBank(norm, {"last": ConstantDecay(0.0)})
    with torch.no_grad():
        norm.weight.fill_(3.0)
        norm.running_var.fill_(5.0)
    bank.update(1)
    target = nn.BatchNorm1d(3).bfloat16()
    bank.copy_to("last", target)
    assert target.weight.dtype is torch.bfloat16
    assert target.weight.tolist() == [3.0] * 3
    assert target.running_var.tolist() == [5.0] * 3
    with pytest.raises(ValueError, match=r"'weight' has shape \(3,\), expected \(4,\)"):
        bank.copy_to("last", nn.BatchNorm1d(4))


def test_a_tied_module_takes_an_average_of_its_deduplicated_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    bank = AverageBank(model.named_parameters(), {"last": ConstantDecay(0.0)})
    target = copy.deepcopy(model)
    move(model)
    bank.update(1)
    bank.copy_to("last", target)
    assert torch.equal(target[1].weight, model[0].weight)


def test_distances_from_raw_are_the_float64_sums_of_squares() -> None:
    model = small_model()
    bank = AverageBank(model.named_parameters(), {"a": ConstantDecay(0.9), "b": ConstantDecay(0.0)})
    move(model)
    bank.update(1)
    expected = sum(((bank.weights("a")[n] - p).double() ** 2).sum() for n, p in model.named_parameters())
    distances = bank.squared_distances()
    assert distances["a"].shape == ()
    assert distances["a"].dtype is torch.float64
    assert distances["a"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert distances["b"].item() == 0.0
    norm = sum((p.double() ** 2).sum() for p in model.parameters())
    assert bank.squared_norm().item() == pytest.approx(norm.item(), rel=1e-12)


def test_a_stored_bank_goes_on_as_if_never_stopped() -> None:
    def make(model: nn.Module) -> AverageBank:
        profiles = {"a": ConstantDecay(0.9), "p": PowerFunction(0.1), "u": Uniform(), "d": BiasCorrected(0.99)}
        return AverageBank(model.named_parameters(), profiles)

    model = small_model()
    uninterrupted = make(model)
    for step in range(1, 11):
        move(model, seed=step)
        uninterrupted.update(step)
        if step == 5:
            state = copy.deepcopy(uninterrupted.state_dict())
            half_way = copy.deepcopy(model)
    resumed = make(half_way)
    resumed.load_state_dict(state)
    for step in range(6, 11):
        move(half_way, seed=step)
        resumed.update(step)
    for name in uninterrupted.profiles:
        assert equal(resumed.weights(name), uninterrupted.weights(name))
    assert resumed.step == 10


def test_a_missing_extra_or_misshaped_tensor_is_named_and_nothing_is_changed() -> None:
    model = small_model()
    bank = AverageBank(model.named_parameters(), {"ema": ConstantDecay(0.9)})
    before = {name: tensor.clone() for name, tensor in bank.weights("ema").items()}
    bad = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    bad["2.weight"] = torch.ones(3, 8, 1, 1)
    del bad["1.bias"]
    bad["head.weight"] = torch.ones(7)
    with pytest.raises(ValueError, match="weights of 'ema'") as refused:
        bank.load_weights("ema", bad)
    message = str(refused.value)
    assert "'1.bias' is missing (expected (8,))" in message
    assert "'head.weight' is not known here ((7,))" in message
    assert "'2.weight' has shape (3, 8, 1, 1), expected (3, 8, 3, 3)" in message
    state = bank.state_dict()
    state["averages"] = {"ema": bad}
    with pytest.raises(ValueError, match="is missing"):
        bank.load_state_dict(state)
    state["averages"] = {
        "ema": {name: torch.ones_like(tensor) for name, tensor in before.items()} | {"1.bias": [1.0] * 8}
    }
    with pytest.raises(ValueError, match=r"'1\.bias' is no tensor with values"):
        bank.load_state_dict(state)
    state["averages"]["ema"]["1.bias"] = torch.ones(8)
    del state["step"]
    with pytest.raises(ValueError, match="got one without step"):
        bank.load_state_dict(state)
    assert equal(bank.weights("ema"), before)


def test_other_profiles_in_a_state_are_refused_one_by_one() -> None:
    model = small_model()
    stored = AverageBank(
        model.named_parameters(), {"ema": ConstantDecay(0.9), "p": PowerFunction(0.1), "old": Uniform()}
    ).state_dict()
    bank = AverageBank(model.named_parameters(), {"ema": ConstantDecay(0.99), "p": Uniform(), "new": Uniform()})
    with pytest.raises(ValueError, match="profiles: ") as refused:
        bank.load_state_dict(stored)
    assert str(refused.value).split("; ") == [
        "profiles: ema is {'kind': 'constant', 'decay': 0.99} here and {'kind': 'constant', 'decay': 0.9} in the state",
        "p is {'kind': 'uniform'} here and {'kind': 'power_function', 'std': 0.1} in the state",
        "new is {'kind': 'uniform'} here and None in the state",
        "old is None here and {'kind': 'uniform'} in the state",
    ]


@pytest.mark.parametrize("state", [{}, {"version": 2}, b"\x80\x04pickle", "checkpoint.pt", None])
def test_what_is_no_state_is_refused(state) -> None:
    bank = AverageBank([("w", torch.zeros(1))], {"x": Uniform()})
    with pytest.raises(ValueError, match="expected the state of a bank, version 1"):
        bank.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["buffers"]["x"].update(b=torch.zeros(1, device="meta")), "'b' is no tensor with values"),
        (lambda state: state["buffers"]["x"].update(b=np.zeros(1)), "'b' is no tensor with values"),
        (lambda state: state.update(step=1.5), "step: expected a whole number of steps of at least 0, got 1.5"),
    ],
)
def test_a_state_that_cannot_be_loaded_to_its_end_changes_nothing(change, message: str) -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("b", torch.zeros(1))
    bank = AverageBank(model, {"x": Uniform()})
    state, before = copy.deepcopy(bank.state_dict()), copy.deepcopy(bank.weights("x"))
    state["averages"]["x"]["weight"].fill_(9.0)
    change(state)
    with pytest.raises(ValueError, match=message):
        bank.load_state_dict(state)
    assert equal(bank.weights("x"), before)
    assert bank.step is None


def test_a_bank_made_under_inference_mode_is_updated_in_training() -> None:
    model = nn.Linear(1, 1)
    with torch.inference_mode():  # as in Lightning's validation, before training
        bank = AverageBank(model, {"raw": HardCopy(1)})
    move(model)
    bank.update(1)
    assert torch.equal(bank.weights("raw")["weight"], model.weight)


@pytest.mark.parametrize("name", ["", "ema.999", "a b", "ema/1", "é"])
def test_a_name_that_cannot_be_a_files_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name of an average: expected letters, digits"):
        AverageBank([("w", torch.zeros(1))], {name: Uniform()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2"),
        ({"rank": -1}, "rank=-1"),
        ({"buffers": "keep"}, "expected 'copy' or 'average', got 'keep'"),
        ({"device": "meta"}, "beside the parameters.* got 'meta'"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AverageBank([("w", torch.zeros(1))], {"x": Uniform()}, **settings)


def test_a_profile_that_is_none_and_a_parameter_that_is_not_floating_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected a profile such as ConstantDecay\(0\.999\), got 0\.9"):
        AverageBank([("w", torch.zeros(1))], {"x": 0.9})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"parameter 'w': .* not torch\.int64"):
        AverageBank([("w", torch.zeros(1, dtype=torch.int64))], {"x": Uniform()})


def test_parameters_without_names_and_those_of_two_models_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"expected a module or model\.named_parameters\(\), names included"):
        AverageBank(small_model().parameters(), {"x": Uniform()})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"'0\.weight' is given twice; join several models in one torch\.nn\.ModuleDict"
    ):
        AverageBank([*small_model().named_parameters(), *small_model().named_parameters()], {"x": Uniform()})


def test_parameters_without_a_value_here_are_refused_with_the_cure_and_shards_are_not_split_again() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        summed = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        with pytest.raises(
            ValueError, match=r"'w' is placed as .*Partial.*redistribute\(\) it to Shard or Replicate first"
        ):
            AverageBank([("w", summed)], {"e": ConstantDecay(0.9)})
        with pytest.raises(ValueError, match="the parameters are DTensors, split over processes: leave"):
            AverageBank([("w", distribute_tensor(torch.ones(4), mesh))], {}, rank=0, world_size=2)
        sharded = nn.Module()
        sharded.w = nn.Parameter(distribute_tensor(torch.ones(4), mesh, src_data_rank=None))
        with pytest.raises(ValueError, match="module: of a sharded model make a second one"):
            AverageBank(sharded, {"e": ConstantDecay(0.9)}).module("e", sharded)
    finally:
        dist.destroy_process_group()
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_id = 3  # as deepspeed.zero.Init marks it
    with pytest.raises(
        ValueError, match=r"'w' is partitioned by DeepSpeed's ZeRO stage 3, .*use stage 1 or 2, or .*fully_shard"
    ):
        AverageBank([("w", partitioned)], {})


def test_a_profile_that_its_files_could_not_give_back_is_refused() -> None:
    class Mine(ConstantDecay):
        """A rule without a kind of its own."""

        def decay(self, step: int, num_steps: int = 1) -> float:
            return 0.5**num_steps

    with pytest.raises(ValueError, match=r"Mine\(decay=0\.9\) could not be read back .*: give its class a `kind`"):
        AverageBank(small_model(), {"x": Mine(0.9)})


def test_the_example_of_the_bank_runs() -> None:
    names = {"torch": torch, "AverageBank": AverageBank, "ConstantDecay": ConstantDecay, "PowerFunction": PowerFunction}
    (example,) = (found for found in doctest.DocTestFinder(recurse=False).find(AverageBank, globs=names))
    assert len(example.examples) >= 6
    assert doctest.DocTestRunner().run(example).failed == 0


def test_an_unknown_average_is_named_with_those_there_are() -> None:
    bank = AverageBank([("w", torch.zeros(1))], {"x": Uniform(), "y": Uniform()})
    with pytest.raises(KeyError, match="no average is called 'z'; there are x, y"):
        bank.weights("z")
