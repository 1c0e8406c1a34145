"""Averages made after the fact, against the same averages kept during the training.

    python benchmarks/posthoc.py RUN [--stored power_0_05 power_0_10] [--thin 1 2 4] [--output FILE.json]

RUN is a run directory with a checkpoint (`checkpoints/step-XXXXXXXX/averages/<name>.safetensors`, kept directly) and snapshots
(`snapshots/step-XXXXXXXX/<name>.safetensors`). Every average of the newest checkpoint whose step has snapshots is made anew from the
snapshots of the averages named by --stored, as they are and rounded to bf16, from all of them and from every 2nd, 4th, ...

Errors are relative L2 norms over all weights: against the average itself, and against its distance from the raw weights, which is what
the averaging was for.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpm_ema.averaging import (
    Profile,
    Reconstruction,
    Snapshot,
    find_snapshots,
    profile_from_dict,
    reconstruct,
    write_snapshot,
)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """L2 norm of the difference over all tensors."""
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in b) ** 0.5


def norm(a: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in a.values()) ** 0.5


def newest_checkpoint(run: Path, steps: set[int]) -> tuple[int, Path]:
    """The newest checkpoint whose step has snapshots."""
    found = sorted((int(path.name.removeprefix("step-")), path) for path in run.glob("checkpoints/step-*"))
    for step, path in reversed(found):
        if step in steps and (path / "manifest.json").exists():
            return step, path
    sys.exit(
        f"{run}: no checkpoint at a step with snapshots; checkpoints at {[s for s, _ in found]}, snapshots at {sorted(steps)}"
    )


def thinned(snapshots: list[Snapshot], step: int, factor: int) -> list[Snapshot]:
    """Every `factor`-th stored step, counted back from `step`."""
    steps = sorted({snapshot.step for snapshot in snapshots if snapshot.step <= step}, reverse=True)[::factor]
    return [snapshot for snapshot in snapshots if snapshot.step in steps]


def rounded(snapshots: list[Snapshot], folder: Path) -> list[Snapshot]:
    """The same snapshots as if they had been stored as bf16."""
    return [
        write_snapshot(
            folder / f"step-{s.step:08d}" / s.path.name, load_file(s.path), s.step, s.profile, torch.bfloat16
        )
        for s in snapshots
    ]


def row(
    name: str, got: Reconstruction, kept: dict[str, Tensor], raw: dict[str, Tensor], seconds: float
) -> dict[str, Any]:
    error, coefficients = distance(got.weights, kept), got.coefficients
    return {
        "average": name,
        "profile": repr(got.target),
        "num_snapshots": len(got.snapshots),
        "weight_error": error / norm(kept),
        "weight_error_of_distance_from_raw": error / distance(kept, raw) if distance(kept, raw) else None,
        "profile_error": coefficients.profile_error,
        "initial_weight_error": coefficients.initial_weight_error,
        "condition_number": coefficients.condition_number,
        "amplification": coefficients.amplification,
        "warnings": got.warnings,
        "seconds": seconds,
    }


def compare(run: Path, stored: list[str], thin: list[int]) -> Iterator[dict[str, Any]]:
    snapshots = [snapshot for snapshot in find_snapshots(run / "snapshots") if snapshot.path.stem in stored]
    step, checkpoint = newest_checkpoint(run, {snapshot.step for snapshot in snapshots})
    raw = load_file(checkpoint / "raw.safetensors")
    profiles = json.loads((checkpoint / "manifest.json").read_text())["profiles"]
    targets: dict[str, Profile] = {name: profile_from_dict(settings) for name, settings in profiles.items()}
    with tempfile.TemporaryDirectory() as folder:
        stores = {"as stored": snapshots, "bf16": rounded(snapshots, Path(folder))}
        for name, profile in targets.items():
            if name in stored:
                continue
            kept = load_file(checkpoint / "averages" / f"{name}.safetensors")
            for factor in thin:
                for dtype, store in stores.items():
                    start = time.perf_counter()
                    got = reconstruct(thinned(store, step, factor), step, profile)
                    seconds = time.perf_counter() - start
                    yield {"step": step, "stored_as": dtype, "thinned": factor} | row(name, got, kept, raw, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument(
        "--stored", nargs="+", default=["power_0_05", "power_0_10"], help="averages whose snapshots are used"
    )
    parser.add_argument("--thin", type=int, nargs="+", default=[1, 2, 4], help="use every n-th stored step")
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="reconstruction is a sum on the CPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "posthoc.json")
    arguments = parser.parse_args()
    heading = (
        "average",
        "snapshots",
        "stored as",
        "error",
        "of raw dist.",
        "profile error",
        "condition",
        "amplif.",
        "trust",
    )
    print("{:22s} {:>9s} {:>10s} {:>10s} {:>13s} {:>13s} {:>10s} {:>8s}  {}".format(*heading))
    rows = []
    for result in compare(arguments.run, arguments.stored, arguments.thin):
        rows.append(result)
        share = result["weight_error_of_distance_from_raw"]
        print(
            f"{result['average']:22s} {result['num_snapshots']:9d} {result['stored_as']:>10s} {result['weight_error']:10.2e} "
            f"{share if share is not None else float('nan'):13.2e} {result['profile_error']:13.2e} "
            f"{result['condition_number']:10.1e} {result['amplification']:8.2f}  {'no' if result['warnings'] else 'yes'}"
        )
    environment = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
