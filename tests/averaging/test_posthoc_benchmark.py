"""benchmarks/posthoc.py on a made-up run: its figures are those of the averages it compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddpm_ema.averaging import AverageBank, BiasCorrected, PowerFunction, profile_to_dict, write_snapshot

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "posthoc.py"
KEPT = {"power_0_15": PowerFunction(0.15), "debiased": BiasCorrected(0.98), "broken": PowerFunction(0.2)}


def made_up_run(run: Path, steps: int = 400, every: int = 20) -> None:
    """A random walk of two tensors; one of the averages kept is spoilt on purpose."""
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.ones(40, 3), "b": torch.zeros(100)}
    profiles = {"power_0_05": PowerFunction(0.05), "power_0_10": PowerFunction(0.10)} | KEPT
    bank = AverageBank(weights.items(), profiles)
    for step in range(1, steps + 1):
        for tensor in weights.values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        bank.update(step)
        if step % every == 0:
            for name in ("power_0_05", "power_0_10", "power_0_15"):
                path = run / "snapshots" / f"step-{step:08d}" / f"{name}.safetensors"
                write_snapshot(path, bank.weights(name), step, profiles[name])
    checkpoint = run / "checkpoints" / f"step-{steps:08d}"
    (checkpoint / "averages").mkdir(parents=True)
    save_file(weights, checkpoint / "raw.safetensors")
    bank.weights("broken")["a"].mul_(1.1)
    for name in profiles:
        save_file(bank.weights(name), checkpoint / "averages" / f"{name}.safetensors")
    manifest = {"profiles": {name: profile_to_dict(profile) for name, profile in profiles.items()}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_the_benchmark_reports_the_error_of_every_average_that_was_kept(tmp_path: Path) -> None:
    made_up_run(tmp_path / "run")
    output = tmp_path / "posthoc.json"
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), "--thin", "1", "4", "--output", str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = {(r["average"], r["stored_as"], r["thinned"]): r for r in json.loads(output.read_text())["rows"]}
    assert set(rows) == {(name, dtype, n) for name in KEPT for dtype in ("as stored", "bf16") for n in (1, 4)}
    for name in ("power_0_15", "debiased"):
        exact, coarse = rows[name, "as stored", 1], rows[name, "bf16", 1]
        assert exact["num_snapshots"] == 40  # those of 0.15 are left aside
        assert exact["weight_error"] < 1e-3
        assert coarse["weight_error"] > 3 * exact["weight_error"]
        assert rows[name, "as stored", 4]["num_snapshots"] == 10
        assert rows[name, "as stored", 4]["profile_error"] > exact["profile_error"]
        assert exact["weight_error_of_distance_from_raw"] > exact["weight_error"]
        assert name in printed
    assert rows["broken", "as stored", 1]["weight_error"] == pytest.approx(0.1, rel=0.3)  # it can tell


def test_the_benchmark_says_when_no_checkpoint_has_snapshots(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made_up_run(run, steps=50)
    done = subprocess.run([sys.executable, str(SCRIPT), str(run)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no checkpoint at a step with snapshots; checkpoints at [50], snapshots at [20, 40]" in done.stderr
