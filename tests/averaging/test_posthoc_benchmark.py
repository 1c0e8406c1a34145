"""benchmarks/posthoc.py on made-up runs: its figures are those of the averages it compares."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ddpm_ema import config
from ddpm_ema.averaging import RAW, AverageBank, write_snapshot

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "posthoc.py"
STEPS = 300


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("posthoc_benchmark", SCRIPT)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.fixture(scope="module")
def cells(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a random walk of two tensors with a cosine rate; one of the averages kept is spoilt on purpose."""
    run = tmp_path_factory.mktemp("runs") / "cosine"
    training = config.TrainingSettings(steps=STEPS, learning_rate_schedule="cosine")
    settings = config.Config(output_dir=run, training=training)
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.ones(40, 30), "b": torch.zeros(2000)}
    bank = AverageBank(weights.items(), benchmark.kept_profiles(STEPS))
    for step in range(STEPS + 1):
        if step:
            rate = training.learning_rate_at(step - 1) / training.learning_rate
            for tensor in weights.values():
                tensor.add_(0.05 * rate * torch.randn(tensor.shape, generator=generator))
            bank.update(step)
        if step % 15 == 0:
            for name in [*benchmark.STORED, "raw"] if step else ["raw"]:
                path = run / "snapshots" / f"step-{step:08d}" / f"{name}.safetensors"
                tensors = weights if name == "raw" else bank.weights(name)
                write_snapshot(path, tensors, step, benchmark.STORED.get(name, RAW))
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    (checkpoint / "averages").mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml(settings))
    save_file(weights, checkpoint / "raw.safetensors")
    bank.weights("power_0_20")["a"].add_(0.5)
    for name in bank.profiles:
        save_file(bank.weights(name), checkpoint / "averages" / f"{name}.safetensors")
    return list(benchmark.measure(run, [5, 10]))


def test_a_random_walk_errs_as_predicted_where_its_rate_is_told_and_edm2_errs_more(benchmark: Any, cells: Any) -> None:
    sound = [cell for cell in cells if cell["target"] != "power_0_20"]
    rows = {(row["stored"], row["step_variance"]): row for row in benchmark.summary(sound)}
    assert set(rows) == {(stored, told) for stored in benchmark.SETS for told in ("constant", "rate^2")}
    for stored in benchmark.SETS:
        told, untold = rows[stored, "rate^2"], rows[stored, "constant"]
        assert told["actual_over_predicted"]["median"] == pytest.approx(1.0, abs=0.1)
        assert untold["actual_over_predicted"]["maximum"] > 1.5
        assert told["edm2_error_over_ours"]["median"] > 1.0


def test_an_average_that_was_kept_wrongly_stands_out(cells: Any) -> None:
    spoilt = [cell for cell in cells if cell["target"] == "power_0_20" and cell["step_variance"] == "rate^2"]
    assert min(cell["actual"] / cell["predicted"] for cell in spoilt) > 3


def test_a_window_that_starts_at_a_snapshot_is_exact_where_uniform_was_stored(benchmark: Any, cells: Any) -> None:
    windows = {(c["stored"], c["target"]): c for c in cells if c["snapshots"] == 10 and c["step_variance"] == "rate^2"}
    assert (
        windows["power .05, uniform", "last_20"]["actual"] < 1e-3 < windows["power .05, uniform", "last_17"]["actual"]
    )
    assert not benchmark.has_ratio(["power_0_05", "uniform"], "last_20", 0.1)
