"""docs/benchmarks.md from the JSON under benchmarks/results: every figure that was measured is read from a file.

    python benchmarks/page.py [--check]

`--check` writes nothing and exits with 1 where the page is not what the files say.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

This page is made by `python benchmarks/page.py` from the JSON under `benchmarks/results/`; `make bench` measures all but the
last section anew. Contenders take turns in one process or in fresh processes side by side, and a ratio is the median over the
rounds of the ratio within a round, because absolute times of a shared machine mean little. All figures are of two CPU cores;
none is of a GPU.
"""


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)])


def ranged(figure: float, lowest: float, highest: float) -> str:
    """`2.25 (2.25–2.26)`; a figure of one round, or of a contender beside itself, has no range."""
    return f"{figure:.2f} ({lowest:.2f}–{highest:.2f})" if lowest < highest else f"{figure:.2f}"


def section(title: str, source: str, body: str, *remarks: str) -> str:
    """A table and what to know of it, with the place and time of its measurement."""
    where = read(source.removesuffix(".py")).get("environment", {})
    told = [f"`benchmarks/{source}`{measured(where)}"]
    return "\n\n".join([f"## {title}", *told, body, *remarks]) + "\n"


def measured(where: dict[str, Any]) -> str:
    """On what machine, with what and when; "" for a file that does not say."""
    if "commit" not in where:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    machine = f"{where.get('gpu', where['cpu'])}, {threads(where)}, load before {where['load']}"
    return f": {machine}; {versions}; commit {where['commit']}, {where['date']}"


def threads(where: dict[str, Any]) -> str:
    return f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"


def averaging() -> str:
    found = read("averaging")["averages"]
    names = [row["contender"] for row in found["3"]["rows"]]
    rows = [[name] for name in names]
    for count in found.values():
        own = {row["contender"]: row for row in count["rows"]}
        for cells in rows:
            row = own.get(cells[0])
            spread = row["times_ours_in_each_process"] if row else []
            cells.append(ranged(row["times_ours"], min(spread), max(spread)) if row else "")
    return section(
        "One update of K averages",
        "averaging.py",
        table(["times ours (lowest–highest process)", *(f"K = {count}" for count in found)], rows),
        "35.7 M parameters in 328 tensors. Where the allocator recycles a contender's temporaries, which is chance, that process "
        "is quicker: the range shows it; diffusers' foreach path allocates a temporary of the model's size per update and average. "
        "`flat tensors, in blocks` is the floor that memory sets. A bare call knows neither names nor steps, and takes one average "
        "after the other; ours takes all averages of a tensor together, which gains from two averages on.",
    )


def training() -> str:
    found = read("train_step")
    labels = {
        "bare": "a plain loop: forward, backward, clip, fused AdamW",
        "script": "diffusers' example recipe: the plain loop, noise, one EMAModel",
        "three": "the plain loop, noise, three EMAModels",
        "ours_fp32": "ddpm_ema, fp32, four averages",
        "ours": "ddpm_ema, bf16 and compiled, four averages",
    }
    rows = []
    for name, speed in found["speed_relative_to_bare"].items():
        rows.append([labels[name], ranged(speed, *found["lowest_and_highest_round"][name])])
    share = found["share_outside_forward_backward_optimizer"]
    return section(
        "A training step",
        "train_step.py",
        table(["loop", "speed over the plain loop (lowest–highest round)"], rows),
        f"9.0 M parameters, 32×32, batch {found['batch']}. Of our step {share:.1%} is neither forward, backward, clipping nor "
        "optimizer.",
    )


def sampling() -> str:
    found = read("sampling")
    rows = [
        [*name.split("/"), ranged(row["times_the_pipeline"], row["lowest"], row["highest"])]
        for name, row in found["speed"].items()
        if "Pipeline" not in name
    ]
    outside = found["outside"]["share_outside_the_network"]
    shares = ", ".join(f"{share:.1%} at {steps} steps" for steps, share in outside.items())
    return section(
        "Sampling and scoring",
        "sampling.py",
        table(["sampler", "ours", "speed over diffusers' pipeline (lowest–highest round)"], rows),
        f"Share of a scoring with 2,048 features that is outside the network: {shares}.",
    )


def scoring() -> str:
    found, memory = read("scoring"), read("scoring")["mib_over_features"]
    ours, theirs = (found["fid"][name] for name in ("ddpm_ema", "torch-fidelity"))
    rows = [["ddpm_ema", "1.00", f"{memory['ddpm_ema']:,.0f}"]]
    rows.append(
        [
            "torch-fidelity",
            ranged(found["times_ours"], found["lowest"], found["highest"]),
            f"{memory['torch-fidelity']:,.0f}",
        ]
    )
    return section(
        "Scoring one set of samples, with the FID's Inception",
        "scoring.py",
        table(["contender", "times ours (lowest–highest round)", "MiB beside the features"], rows),
        f"{found['images']} images of 32×32 on {threads(found['environment'])}, random weights: torch-fidelity writes PNG "
        "files, reads them and gives one number; "
        "ours gives the corrected distance with its error, KID, precision and recall, from memory. The network, "
        "which both share, is most of our time; torch-fidelity also loads it and starts readers in each round, which weighs less for "
        "more images. The plain distances differ by "
        f"{abs(ours - theirs) / theirs:.0e} of themselves. Memory is that of the distance at {found['features']:,} × 2,048 features.",
    )


def checkpoints() -> str:
    rows = [
        [
            row["contender"],
            row["part"],
            f"{row['seconds']:.2f}",
            ranged(row["times_ours"], row["lowest"], row["highest"]),
        ]
        for row in read("checkpoints")["rows"]
    ]
    return section(
        "Saving and loading a run",
        "checkpoints.py",
        table(["contender", "time until", "seconds", "times ours (lowest–highest round)"], rows),
        "9.0 M parameters, Adam, three averages. `blocked`: training goes on; `written`: the files are there; `loaded`: a trainer "
        "holds the state. Ours is slower to the last byte because it also computes a sha256 of each file and waits for the disk "
        "(fsync), so that a kill or a power cut never leaves half a checkpoint; loading verifies them. Training goes on meanwhile.",
    )


def startup() -> str:
    rows = []
    for row in read("startup")["rows"]:
        spread = row["lowest"], row["highest"]
        if "times_ours" in row:
            rows.append([row["what"], f"{row['seconds']:.2f}", ranged(row["times_ours"], *spread)])
        else:
            rows.append([row["what"], ranged(row["seconds"], *spread), ""])
    head = ["what, in a fresh process", "seconds (lowest–highest)", "times `import ddpm_ema` (lowest–highest round)"]
    return section("Before the first step", "startup.py", table(head, rows))


def posthoc() -> str:
    rows = [
        [row["run"], row["stored"], f"{row['edm2_error_over_ours']['median']:.1f}"]
        for row in read("posthoc")["summary"]
        if (row["step_variance"] == "rate^2") == (row["run"] in ("cosine", "warmup"))  # the rate's changes were told
    ]
    return section(
        "Averages after the run",
        "posthoc.py",
        table(["run", "stored averages", "error of EDM2's fit, times ours (median)"], rows),
        "[averaging.md](averaging.md) has the errors themselves, beside those predicted.",
    )


def shards() -> str:
    found = read("averaging_shards")
    *_, most = found["averages"].values()
    rows = []
    for name in most:
        own = [of[name] for of in found["averages"].values()]
        ratios = [ranged(row["times_ours"], *row["quartiles_of_times_ours"]) for row in own]
        rows.append([name, *ratios, f"{own[-1]['bytes_per_process'] / 1e6:.0f}"])
    counts = [f"K = {count}" for count in found["averages"]]
    return section(
        "Averages over sharded parameters",
        "averaging_shards.py",
        table(["times ours (quartiles of the rounds)", *counts, f"MB per process, {counts[-1]}"], rows),
        f"The same model under `fully_shard` on {found['processes']} gloo processes of one thread; the time is that of the slowest.",
    )


def conformance() -> str:
    found = read("conformance")
    rows = [
        [row["name"], row["documented"], "yes" if row["as_documented"] else f"displaced by {row['displacement']:.1%}"]
        for row in found["rows"]
        if row["package"] != "ddpm_ema"
    ]
    ours = [row for row in found["rows"] if row["package"] == "ddpm_ema"]
    return section(
        "Does an average weight the steps as its documentation says?",
        "conformance.py",
        table(["averager", "documented as", "is so"], rows),
        f"Measured with one-hot parameters over {found['steps']:,} steps; displaced is the mean distance between documented and "
        f"measured place of the weight, as a share of training. Of ours {sum(row['as_documented'] for row in ours)} of "
        f"{len(ours)} are as documented. "
        "[averaging.md](averaging.md) has the cause of each deviation.",
    )


PARTS = (averaging, shards, conformance, training, sampling, scoring, checkpoints, startup, posthoc)


def parts() -> Iterator[str]:
    yield HEAD
    for part in PARTS:
        yield part()


def main() -> None:
    text = "\n".join(parts())
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.exists() and PAGE.read_text() == text
            else f"{PAGE.name} is not what benchmarks/results say: run benchmarks/page.py"
        )
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
