"""What must agree is said at each setting, and the three comparisons follow it: resuming, scoring a run, naming a scoring."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm_ema import config
from ddpm_ema.averaging import ConstantDecay
from ddpm_ema.config import effects
from ddpm_ema.config.settings import CONTENT, RUN, SAMPLES, SCORES, Config, Effect
from ddpm_ema.errors import UserError
from ddpm_ema.score import results
from ddpm_ema.score.checkpoints import check_settings
from ddpm_ema.train import resume

MARKS = dict(effects())
# One in which every setting that can count does: DDIM has eta, class-conditional networks have guidance.
BASE = config.validate({"model": {"class_conditional": True}, "evaluation": {"sampler": "ddim"}})
OTHER: dict[str, Any] = {
    "averages": {"ema": ConstantDecay(0.5)},
    "evaluation.steps": (7,),
    "evaluation.sampler": "ddpm",
    "data.channels": 3,
}


def leaf(settings: Config, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def flipped(settings: Config, key: str) -> Config:
    """With another value of the same type at `key`, not validated: what goes with it stays as it is."""
    name, _, rest = key.partition(".")
    inner = getattr(settings, name)
    return settings.model_copy(update={name: flipped(inner, rest) if rest else other(inner, key)})


def other(value: Any, key: str) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value, value[0] if value else "raw")
    return Path("elsewhere") if isinstance(value, Path) else f"{value}-another"


def changed(key: str) -> Config:
    if key in OTHER:
        name, _, rest = key.rpartition(".")
        section = getattr(BASE, name).model_copy(update={rest: OTHER[key]}) if name else OTHER[key]
        return BASE.model_copy(update={name or rest: section})
    return flipped(BASE, key)


def digest(settings: Config, labels: torch.Tensor | None = None) -> str:
    extractor: Any = SimpleNamespace(identity={"extractor": "classifier", "extractor_sha256": "f00d"})
    return config.digest(results.settings_of(settings, extractor, {"fingerprint": "beef"}, labels))


def refuses(check: Any, *arguments: Any) -> bool:
    try:
        check(*arguments)
    except UserError:
        return True
    return False


def test_every_setting_has_exactly_one_mark() -> None:
    def leaves(section: type[Any], prefix: str = "") -> Any:
        for name, field in section.model_fields.items():
            inner = getattr(field.annotation, "model_fields", None)
            marks = [found for found in field.metadata if isinstance(found, Effect)]
            assert len(marks) == (0 if inner else 1), f"{prefix}{name}: give it one mark of config.Effect"
            yield from leaves(field.annotation, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]

    assert set(leaves(Config)) == set(MARKS)


def test_a_mark_of_content_stands_alone() -> None:
    assert all(mark == CONTENT for mark in MARKS.values() if CONTENT in mark)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("key", MARKS)
def test_another_value_changes_what_the_mark_says_and_nothing_else(key: str) -> None:
    mark, now = MARKS[key], changed(key)
    assert leaf(now, key) != leaf(BASE, key)
    checkpoint: Any = SimpleNamespace(path=Path("run"), manifest={"settings": config.to_dict(BASE), "world_size": 1})
    assert refuses(resume.check_resume, now, checkpoint, 1) == (RUN in mark)
    assert refuses(check_settings, now, checkpoint) == (RUN | SAMPLES in mark)
    assert (digest(now) != digest(BASE)) == bool(mark & (SAMPLES | SCORES))


def test_settings_that_do_nothing_do_not_count() -> None:
    ddpm = config.validate({"evaluation": {"sampler": "ddpm"}})
    assert digest(flipped(ddpm, "evaluation.eta")) == digest(ddpm)
    assert digest(flipped(ddpm, "evaluation.guidance_scale")) == digest(ddpm)


def test_clipping_counts_for_every_sampler() -> None:
    for sampler in ("ddpm", "ddim", "dpm_solver++"):
        settings = config.validate({"evaluation": {"sampler": sampler}})
        assert digest(flipped(settings, "evaluation.clip_sample")) != digest(settings)


def test_so_do_the_protocol_and_the_classes_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0, 1, 1])
    assert len({digest(BASE), digest(BASE, labels), digest(BASE, labels.flip(0))}) == 3
    before = digest(BASE)
    monkeypatch.setattr(results, "PROTOCOL", results.PROTOCOL + 1)
    assert digest(BASE) != before


@pytest.mark.parametrize("settings", [None, [], "x", {"model": 3}, {"model": {"dropout": []}}])
def test_settings_that_are_none_are_compared_with_nothing(settings: Any) -> None:
    assert config.differing(settings or {}, config.to_dict(BASE), RUN | SAMPLES) == []
