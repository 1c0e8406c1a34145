"""The Lightning callback inside the real library: the scenarios of its own weight averaging, resumed runs, and skipped steps."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm_ema.averaging import AverageBank, ConstantDecay, Delayed, PowerFunction, Uniform

lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra `lightning`")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging  # noqa: E402

from ddpm_ema.integrations.lightning import WeightAverages  # noqa: E402

PROFILES = {"ema": ConstantDecay(0.9), "power": PowerFunction(0.1), "uniform": Uniform()}


class Module(lightning.LightningModule):
    """Records the weights it validates with."""

    def __init__(self, batch_norm: bool = True, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.layer = nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 2))
        self.seen: list[torch.Tensor] = []
        self.fail_at = fail_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.seen.append(self.layer[0].weight.detach().clone())
        if self.fail_at == self.global_step:
            raise RuntimeError("validation broke")

    def on_validation_epoch_end(self) -> None:
        self.seen.append(self.layer[0].weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def loader(batches: int = 8) -> torch.utils.data.DataLoader:
    data = torch.randn(4 * batches, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(data, batch_size=4)


def fit(module: Module, *callbacks: lightning.Callback, ckpt_path: Path | None = None, **settings) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    settings = {"max_epochs": 3, "enable_checkpointing": False, "accelerator": "cpu", **quiet, **settings}
    trainer = lightning.Trainer(callbacks=list(callbacks), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return trainer


def averages_of(callback: WeightAverages) -> dict[str, dict[str, torch.Tensor]]:
    return {name: dict(callback.bank.gather(name)) for name in callback.bank.profiles}


def same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(a[name][n], b[name][n]) for name in a for n in a[name])


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_gives_what_lightnings_own_averages_give_in_the_same_fit(batch_norm: bool, accumulate: int) -> None:
    ours = WeightAverages(
        {"swa": Uniform(), "ema": Delayed(ConstantDecay(0.9), start=1)}, buffers="average", validate="ema"
    )
    swa, ema = WeightAveraging(), EMAWeightAveraging(decay=0.9)
    for theirs in (swa, ema):
        theirs._swap_models = theirs._copy_average_to_current = lambda module: (
            None
        )  # one module holds raw weights for all
    trainer = fit(Module(batch_norm), ours, swa, ema, accumulate_grad_batches=accumulate)
    assert ours.bank.step == trainer.global_step == 24 // accumulate
    for name, theirs in (("swa", swa), ("ema", ema)):
        wanted = dict(theirs._average_model.module.named_parameters())
        for n, tensor in ours.bank.weights(name).items():
            torch.testing.assert_close(tensor, wanted[n], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("validate", [None, "ema", "power"])
def test_it_validates_with_the_average_asked_for_and_trains_on_from_the_raw_weights(validate: str | None) -> None:
    plain, module, callback = Module(), Module(), WeightAverages(PROFILES, validate=validate)
    by_hand = WeightAverages(PROFILES)
    fit(plain, by_hand)
    fit(module, callback)
    raw, average = plain.layer[0].weight, by_hand.bank.weights(validate)["layer.0.weight"] if validate else None
    assert torch.equal(
        module.layer[0].weight, raw
    )  # validation changed nothing, and training ends with the raw weights
    step, epoch_end = module.seen[-2:]
    assert torch.equal(step, raw if average is None else average)
    assert torch.equal(epoch_end, step)  # where a module samples, or scores what it sampled
    assert torch.equal(module.seen[0], Module().layer[0].weight)  # the sanity check sees the initial weights


def test_the_weights_are_raw_again_after_a_validation_that_fails() -> None:
    module, plain, callback = Module(fail_at=16), Module(), WeightAverages(PROFILES, validate="uniform")
    with pytest.raises(RuntimeError, match="validation broke"):
        fit(module, callback)
    fit(plain, max_epochs=2)
    assert torch.equal(module.layer[0].weight, plain.layer[0].weight)
    assert not callback._handle.active


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_that_was_stopped_and_resumed_keeps_its_averages_exactly(every: int, tmp_path: Path) -> None:
    def settings() -> dict:
        return {"validate": "ema", "every": every, "buffers": "average"}

    whole = WeightAverages(PROFILES, **settings())
    fit(Module(), whole)
    first = WeightAverages(PROFILES, **settings())
    saves = ModelCheckpoint(dirpath=tmp_path, filename="stopped", save_last=False)
    fit(Module(), first, saves, max_epochs=2, enable_checkpointing=True)
    assert first.bank.step == 16 // every * every  # with every=3 the run stops between two updates
    resumed = WeightAverages(PROFILES, **settings())
    fit(Module(), resumed, ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.bank.step == 24
    assert same(averages_of(resumed), averages_of(whole))
    stored = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert same(stored["callbacks"]["WeightAverages"]["bank"]["averages"], averages_of(first))
    bank = AverageBank(Module(), PROFILES, buffers="average")
    bank.load_state_dict(stored["callbacks"]["WeightAverages"]["bank"])
    alone = WeightAverages(PROFILES, validate="power")
    module = Module()
    lightning.Trainer(callbacks=[alone], logger=False, enable_progress_bar=False, accelerator="cpu").validate(
        module, loader(1), ckpt_path=tmp_path / "stopped.ckpt", verbose=False
    )
    assert torch.equal(module.seen[0], bank.weights("power")["layer.0.weight"])


def test_a_checkpoint_that_is_saved_during_validation_holds_the_raw_weights(tmp_path: Path) -> None:
    class Saves(Module):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.layer[0]  # its parameters have two names

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.trainer.save_checkpoint(tmp_path / "midway.ckpt")

    module = Saves()
    fit(module, WeightAverages(PROFILES, validate="uniform"))
    stored = torch.load(tmp_path / "midway.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["layer.0.weight"], module.layer[0].weight)
    assert torch.equal(stored["again.weight"], module.layer[0].weight)
    assert not torch.equal(module.seen[-1], module.layer[0].weight)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skipped_is_not_counted(fused: bool) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Overflows(Module):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 3 else 1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.05, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    callback = WeightAverages(PROFILES)
    fit(Overflows(), callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.bank.step == 21  # Lightning's global_step says 24


def test_an_average_that_is_not_kept_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="validate: expected None or one of ema, power, uniform, got 'emma'"):
        WeightAverages(PROFILES, validate="emma")
