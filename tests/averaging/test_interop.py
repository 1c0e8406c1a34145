"""Other libraries' averages: read with the profile they really have, written so that those libraries go on with ours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from onehot import kept_weighting, peer_weighting
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddpm_ema.averaging import (
    AverageBank,
    ConstantDecay,
    Delayed,
    DiffusersDecay,
    PowerFunction,
    Profile,
    Uniform,
    Warmup,
    update_batch_norm,
)
from ddpm_ema.averaging.interop import (
    averaged_model_state,
    read_averaged_model,
    read_diffusers_ema,
    read_diffusers_state,
    write_diffusers_ema,
)

diffusers = pytest.importorskip("diffusers")
from diffusers.training_utils import EMAModel  # noqa: E402

UNET = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "in_channels": 1, "out_channels": 1}


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**UNET)


def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


SETTINGS = [
    {"decay": 0.9999},
    {"decay": 0.8},
    {"decay": 0.999, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
    {"decay": 0.9, "min_decay": 0.5, "update_after_step": 20},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_profile_read_from_diffusers_is_the_one_its_weights_have(settings: dict) -> None:
    steps = 120

    def make(module: nn.Module):
        ema = EMAModel(module.parameters(), **settings)

        def update() -> torch.Tensor:
            ema.step(module.parameters())
            return ema.shadow_params[0]

        return update

    real = peer_weighting(steps, make)
    profile = DiffusersDecay(max_decay=settings["decay"], **{k: v for k, v in settings.items() if k != "decay"})
    np.testing.assert_allclose(profile.weighting(steps), real[1:], atol=2e-6)
    assert profile.initial_weight(steps) == pytest.approx(real[0], abs=1e-6)
    np.testing.assert_allclose(kept_weighting(profile, steps), real, atol=2e-6)


def test_a_note_on_a_young_average_does_not_count_the_initial_weights_as_a_step() -> None:
    parameters = [("w", torch.zeros(1))]
    state = {"decay": 0.999, "optimization_step": 10, "shadow_params": [torch.zeros(1)]}
    (note,) = read_diffusers_state(state, parameters).notes
    assert "a constant 0.999 would average about 10 and still be 99.0% initial weights" in note


def test_a_diffusers_folder_is_read_by_name_with_what_it_really_is(tmp_path: Path) -> None:
    model = unet()
    ema = EMAModel(model.parameters(), decay=0.9999, model_cls=diffusers.UNet2DModel, model_config=model.config)
    for step in range(1, 31):
        move(model, step)
        ema.step(model.parameters())
    ema.save_pretrained(tmp_path)

    read = read_diffusers_ema(tmp_path)

    assert read.step == 30
    assert read.profile == DiffusersDecay(max_decay=0.9999, power=2 / 3)
    assert "claims a decay of 0.9999, but EMAModel's warm-up has only reached 0.769231 at step 30" in read.notes[0]
    for (name, _), shadow in zip(model.named_parameters(), ema.shadow_params, strict=True):
        assert torch.equal(read.weights[name], shadow)


def test_a_bank_goes_on_with_diffusers_average_exactly(tmp_path: Path) -> None:
    model = unet()
    ema = EMAModel(model.parameters(), decay=0.95, model_cls=diffusers.UNet2DModel, model_config=model.config)
    for step in range(1, 11):
        move(model, step)
        ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    read = read_diffusers_ema(tmp_path)
    bank = AverageBank(model.named_parameters(), {"ema": read.profile})
    bank.load_weights("ema", read.weights)
    for step in range(11, 21):
        move(model, step)
        ema.step(model.parameters())
        bank.update(step)
    for ours, theirs in zip(bank.weights("ema").values(), ema.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize(
    "profile",
    [
        ConstantDecay(0.9),
        Warmup(0.9, inv_gamma=3.0, power=0.75),
        DiffusersDecay(max_decay=0.9),
        Delayed(ConstantDecay(0.9), start=8),
        Delayed(Warmup(0.9), start=3),
    ],
    ids=repr,
)
def test_diffusers_goes_on_with_an_average_of_ours_exactly(tmp_path: Path, profile: Profile, at: int) -> None:
    model = unet()
    bank = AverageBank(model.named_parameters(), {"ema": profile})
    for step in range(1, at + 1):
        move(model, step)
        bank.update(step)
    write_diffusers_ema(tmp_path, bank.weights("ema"), profile=profile, step=at, model_config=dict(model.config))
    ema = EMAModel.from_pretrained(tmp_path, diffusers.UNet2DModel)
    for step in range(at + 1, 16):
        move(model, step)
        bank.update(step)
        ema.step(model.parameters())
    for ours, theirs in zip(bank.weights("ema").values(), ema.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    again = read_diffusers_ema(tmp_path)
    assert again.step == at
    assert again.profile.decay(at + 1) == pytest.approx(profile.decay(at + 1), rel=1e-12)


def test_a_profile_that_diffusers_cannot_go_on_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot go on with PowerFunction\(std=0\.1\)"):
        write_diffusers_ema(tmp_path, {}, profile=PowerFunction(0.1), step=5, model_config={})


def test_a_diffusers_state_is_paired_strictly_where_diffusers_truncates() -> None:
    model = unet()
    state = EMAModel(model.parameters()).state_dict()
    assert len(read_diffusers_state(state, model.named_parameters()).weights) == len(state["shadow_params"])
    three = state | {"shadow_params": state["shadow_params"][:3]}
    EMAModel(model.parameters()).load_state_dict(three)  # the trap is real: no complaint
    with pytest.raises(ValueError, match=rf"3 tensors for a model of {len(state['shadow_params'])} parameters"):
        read_diffusers_state(three, model.named_parameters())
    swapped = state | {"shadow_params": state["shadow_params"][::-1]}
    with pytest.raises(ValueError, match=r"shadow_params: .* has shape"):
        read_diffusers_state(swapped, model.named_parameters())


def test_a_plain_model_and_a_pickle_are_refused(tmp_path: Path) -> None:
    model = unet()
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no EMA state in it"):
        read_diffusers_ema(tmp_path / "plain")
    folder = tmp_path / "pickle"
    write_diffusers_ema(folder, {}, profile=ConstantDecay(0.9), step=1, model_config={})
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"safetensors: is missing; a pickle .* is refused"):
        read_diffusers_ema(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../plain/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(ValueError, match=r"index\.json: its weight_map must name .safetensors files beside it"):
        read_diffusers_ema(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: cannot be read \("):
        read_diffusers_ema(folder)
    index.unlink()
    torch.save({"w": torch.ones(1)}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="this is a pickle"):
        read_diffusers_ema(folder)
    assert "optimization_step" in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("decay", "profile"), [(None, Uniform()), (0.9, Delayed(ConstantDecay(0.9), start=1))])
def test_torchs_averaged_model_is_read_with_its_real_profile_and_gone_on_with(decay, profile) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    peer = AveragedModel(model, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    for step in range(1, 8):
        move(model, step)
        peer.update_parameters(model)
    read = read_averaged_model(peer.state_dict(), model, decay=decay)
    assert read.profile == profile
    assert read.step == 7
    assert set(read.buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}

    bank = AverageBank(model.named_parameters(), {"ema": read.profile})
    bank.load_weights("ema", read.weights)
    back = AveragedModel(model, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    back.load_state_dict(averaged_model_state(read.weights, read.step, read.buffers))
    for step in range(8, 15):
        move(model, step)
        bank.update(step)
        peer.update_parameters(model)
        back.update_parameters(model)
    for name, theirs in peer.module.named_parameters():
        torch.testing.assert_close(bank.weights("ema")[name], theirs.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(dict(back.module.named_parameters())[name], theirs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: torch.compile(model, backend="eager"),
        nn.parallel.DataParallel,
        lambda model: torch.compile(nn.parallel.DataParallel(model), backend="eager"),
    ],
)
def test_an_average_is_read_from_and_written_to_an_averaged_model_of_a_wrapped_model(wrap) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    peer, other = AveragedModel(wrap(model)), AveragedModel(wrap(model))
    move(model, 1)
    peer.update_parameters(peer.module)
    peer.update_parameters(wrap(model))
    read = read_averaged_model(peer.state_dict(), model)
    other.load_state_dict(averaged_model_state(read.weights, read.step, read.buffers, averaged_model=other))
    assert all(torch.equal(tensor, peer.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_state_that_is_not_torchs_or_not_of_the_model_is_refused() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="with 'n_averaged'"):
        read_averaged_model(model.state_dict(), model)
    state = AveragedModel(nn.Linear(3, 5)).state_dict()
    with pytest.raises(ValueError, match=r"'weight' has shape \(5, 3\), expected \(4, 3\)"):
        read_averaged_model(state, model)


def test_batch_norm_is_estimated_anew_for_the_averaged_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3)).eval()
    data = torch.randn(600, 3)
    with torch.no_grad():
        model[0].weight.mul_(5.0)
        activations = model[0](data)
    update_batch_norm(model, ((batch, "label") for batch in data.split(100)))
    torch.testing.assert_close(model[1].running_mean, activations.mean(0), rtol=1e-4, atol=1e-5)
    in_batches = torch.stack([part.var(0) for part in activations.split(100)]).mean(0)
    torch.testing.assert_close(model[1].running_var, in_batches, rtol=1e-4, atol=1e-5)
    assert not model.training
    assert model[1].momentum == 0.3
    before = model[1].running_var.clone()
    update_batch_norm(
        model, ({"inputs": batch} for batch in data.split(100)), call=lambda batch: model(batch["inputs"])
    )
    assert torch.equal(model[1].running_var, before)
    assert not model.training


def test_batch_norm_keeps_its_statistics_when_there_is_no_data_and_nothing_is_read_without_it() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3.0)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        update_batch_norm(norm, [])
    assert norm.running_mean.tolist() == [3.0, 3.0]

    def unread():
        raise AssertionError("read")
        yield

    update_batch_norm(nn.Linear(1, 1), unread())


def test_after_an_error_in_the_data_momentum_and_mode_are_what_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=0.3)).eval()

    def breaks():
        yield torch.randn(4, 2)
        raise OSError("disk")

    for call in (None, model):
        with pytest.raises(OSError, match="disk"):
            update_batch_norm(model, breaks(), call=call)
        assert model[1].momentum == 0.3
        assert not any(module.training for module in model.modules())
    update_batch_norm(model, [(torch.randn(4, 2), "label")], device="cpu", call=lambda batch: model(batch[0]))
