"""A bank of averages as a Lightning callback. Needs the extra `lightning`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ddpm_ema.averaging.bank import AverageBank
from ddpm_ema.averaging.hooks import UpdateHandle
from ddpm_ema.averaging.profiles import Profile
from ddpm_ema.averaging.sharded import reshard


class WeightAverages(Callback):
    """Keeps averages of a module's weights, validates with one of them, and stores them in every checkpoint under its own key.

    Optimizer steps are counted, not batches and not steps that a gradient scaler skipped. The checkpoint's `state_dict` and the
    module after training are the raw weights, always; `bank.copy_to` and `bank.module` give the averages. `bank` is None until
    training begins or a checkpoint is loaded for validation.

    Args:
        profiles: name of the average -> its profile.
        validate: the average to validate with; None for the raw weights. Another name is a ValueError.
        every: optimizer steps between updates; averages keep their weighting.
        settings: of `AverageBank`: `buffers`, `device`.
    """

    def __init__(
        self, profiles: Mapping[str, Profile], *, validate: str | None = None, every: int = 1, **settings: Any
    ) -> None:
        if validate is not None and validate not in profiles:
            raise ValueError(f"validate: expected None or one of {', '.join(profiles)}, got {validate!r}")
        self.bank: AverageBank | None = None
        self._profiles, self._validate, self._every, self._settings = dict(profiles), validate, every, settings
        self._stored: dict[str, Any] = {"steps": 0}
        self._handle: UpdateHandle | None = None
        self._raw: dict[str, Tensor] = {}

    def _make_bank(self, module: LightningModule) -> AverageBank:
        if self.bank is None:
            self.bank = AverageBank(module, self._profiles, **self._settings)
            if "bank" in self._stored:
                self.bank.load_state_dict(self._stored["bank"])
        return self.bank

    @property
    def _steps(self) -> int:
        return self._handle.step if self._handle else int(self._stored["steps"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of several optimizers (a GAN's) the first one's steps are those of training.
        bank, optimizer = self._make_bank(pl_module), trainer.optimizers[0]
        self._handle = bank.attach(optimizer, start_step=self._steps, every=self._every)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._handle:
            self._handle.remove()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validate and (self.bank or "bank" in self._stored):  # before the first step it is the raw weights
            reshard(pl_module)
            self._raw = {name: tensor.detach().clone() for name, tensor in _tensors(pl_module)}
            self._make_bank(pl_module).copy_to(self._validate, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not at the epoch's end, where callbacks come before the module's own hook, which may sample.
        reshard(pl_module)
        with torch.no_grad():
            for name, tensor in _tensors(pl_module) if self._raw else ():
                tensor.copy_(self._raw[name])
        self._raw = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)
        self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A scheduler's signal may ask for a checkpoint while the module validates with an average.
        checkpoint["state_dict"].update({n: raw for n, raw in self._raw.items() if n in checkpoint["state_dict"]})

    def state_dict(self) -> dict[str, Any]:
        """{"steps": optimizer steps so far, "bank": `AverageBank.state_dict()` with whole tensors on the CPU}."""
        if self.bank is None:
            return self._stored
        averages = {name: dict(self.bank.gather(name)) for name in self._profiles}  # collective where they are sharded
        return {"steps": self._steps, "bank": {**self.bank.state_dict(), "averages": averages}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bank, self._handle, self._stored = None, None, state_dict


def _tensors(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
