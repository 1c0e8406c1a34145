"""benchmarks/conformance.py tells right from wrong: ours is as documented, and the known traps of the peers are found."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ddpm_ema.averaging import AverageBank, ConstantDecay, Delayed, DiffusersDecay, PowerFunction

for peer in ("ema_pytorch", "timm", "diffusers", "matplotlib"):
    pytest.importorskip(peer)


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "conformance.py"
    spec = importlib.util.spec_from_file_location("benchmarks_conformance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ours_is_as_documented_also_when_updated_every_100_steps(conformance: ModuleType) -> None:
    from averagers import ours

    for contender in (ours(ConstantDecay(0.99)), ours(PowerFunction(0.10)), ours(PowerFunction(0.10), every=20)):
        assert conformance.judge(contender, 2000)["as_documented"], contender.name


def test_a_power_function_that_takes_the_decay_of_one_step_for_many_is_found(conformance: ModuleType) -> None:
    from averagers import karras_average

    library = ("ema-pytorch", "ema_pytorch.post_hoc_ema")
    found = conformance.judge(karras_average(*library, 0.10), 10_000)
    assert found["centre_documented"] == pytest.approx(0.888, abs=1e-3)
    assert found["centre_measured"] == pytest.approx(0.073, abs=1e-3)
    assert not found["as_documented"]
    assert conformance.judge(karras_average(*library, 0.10, update_every=1), 2000)["as_documented"]


def test_a_hidden_warm_up_is_found(conformance: ModuleType) -> None:
    from averagers import diffusers_average

    found = conformance.judge(diffusers_average(0.9999), 2000)
    assert not found["as_documented"]
    assert found["centre_measured"] == pytest.approx(0.9, abs=0.01)


def test_the_rules_that_the_page_names_for_ema_pytorch_and_timm_give_their_averages_from_the_first_step() -> None:
    from ema_pytorch import EMA
    from timm.utils import ModelEmaV3

    model, warm = torch.nn.Linear(3, 1), {"max_decay": 0.9, "use_ema_warmup": True}
    rules = {"ema_pytorch": DiffusersDecay(**warm), "warm": DiffusersDecay(**warm, update_after_step=4)}
    bank = AverageBank(model, {**rules, "late": Delayed(ConstantDecay(0.9), 5)})
    ema = EMA(model, beta=0.9, update_every=1, update_after_step=0)
    v3 = {
        "warm": ModelEmaV3(model, 0.9, use_warmup=True, update_after_step=4),
        "late": ModelEmaV3(model, 0.9, update_after_step=4),
    }
    for step in range(1, 41):
        with torch.no_grad():
            model.weight += torch.randn(1, 3)
        bank.update(step)
        ema.update()
        for theirs in v3.values():
            theirs.update(model, step)
        found = {"ema_pytorch": ema.ema_model, **{name: theirs.module for name, theirs in v3.items()}}
        for name, theirs in found.items():
            torch.testing.assert_close(bank.weights(name)["weight"], theirs.weight.detach(), rtol=0, atol=1e-5)


def test_an_averager_of_ones_own_is_judged_by_its_name(
    conformance: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def wrong(module):\n    average = module.weight.detach().clone()\n"
    code += "    return lambda: average.lerp_(module.weight.detach(), 0.5)\n"
    (tmp_path / "my_averages.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    picture, results = tmp_path / "found.png", tmp_path / "found.json"
    arguments = ["my_averages:wrong", "--documented", "{kind: constant, decay: 0.99}", "--steps", "200"]
    monkeypatch.setattr(sys, "argv", ["conformance.py", *arguments, "--plot", str(picture), "--output", str(results)])
    conformance.main()
    assert "!! my_averages:wrong" in capsys.readouterr().out
    (row,) = json.loads(results.read_text())["rows"]
    assert row["steps_averaged_measured"] == pytest.approx(3, rel=1e-3)  # (1 + 0.5) / (1 - 0.5)
    assert picture.stat().st_size > 1000
