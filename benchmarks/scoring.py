"""Scoring one set of samples: torch-fidelity over PNG files and ours over images in memory, with the same network.

    python benchmarks/scoring.py [--rounds 5] [--images 512] [--output benchmarks/results/scoring.json]

Both have the reference's statistics at hand, take turns, and are compared round by round; the network is the FID's Inception with
random weights, since what it costs does not depend on what it says. torch-fidelity writes PNG files, reads them, and gives one
number. Ours gives the corrected distance with its error, KID, precision and recall. The second part is the memory of the
distance alone at `--features` × 2,048: what a fresh process's peak grows by over the features themselves.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment, save
from torch import Tensor

DIM, REFERENCE = 2048, 10_000
REFERENCE_NAME = "reference"


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_inception(path: Path) -> None:
    """Random weights as torch-fidelity reads them, and as safetensors beside them."""
    from unittest import mock

    from safetensors.torch import save_file
    from torch_fidelity import feature_extractor_inceptionv3 as module

    cls = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(cls, "load_state_dict", return_value=None),
    ):
        torch.manual_seed(0)
        state = cls("inception-v3-compat", ["2048"], verbose=False).state_dict()
    torch.save(state, path)
    save_file(state, path.with_suffix(".safetensors"))


class Fidelity:
    """What a user of torch-fidelity does after sampling: writes files, then asks for the FID."""

    def __init__(self, folder: Path, images: Tensor) -> None:
        self.folder, self.images = folder, images
        (folder / "png").mkdir()

    def __call__(self) -> float:
        import torch_fidelity
        from torchvision.io import write_png

        for index, image in enumerate(self.images):
            write_png(image, str(self.folder / "png" / f"{index:06d}.png"))
        given: dict[str, Any] = {"input1": str(self.folder / "png"), "input2": str(self.folder / "real")}
        given |= {
            "input2_cache_name": REFERENCE_NAME,
            "cache_root": str(self.folder / "cache"),
            "samples_find_deep": False,
        }
        weights = str(self.folder / "random.pth")
        found = torch_fidelity.calculate_metrics(
            **given, cuda=False, fid=True, verbose=False, feature_extractor_weights_path=weights, batch_size=64
        )
        return float(found["frechet_inception_distance"])


class Ours:
    """What `ddpm-ema score` does with the images that it has sampled."""

    def __init__(self, folder: Path, images: Tensor, real: Tensor) -> None:
        from ddpm_ema import config, metrics
        from ddpm_ema.features import open_extractor
        from ddpm_ema.score.rows import RowBuilder

        entry = f"inception-v3-compat={folder / 'random.safetensors'}"
        self.extractor, self.images = open_extractor(entry, folder, torch.device("cpu"), 64), images
        features = self.extractor(real)
        reference = metrics.with_radii(metrics.reference_of(features, {"data": "random"}), features)
        self.builder = RowBuilder(reference, config.Config().evaluation, torch.device("cpu"))

    def __call__(self) -> float:
        from ddpm_ema.score.feature_store import FeatureBatch, pixel_figures

        saturated, contrast = pixel_figures(self.images)
        more: dict[str, Tensor] = {"saturated": saturated, "contrast": contrast}
        batch = FeatureBatch(indices=torch.arange(len(self.images)), features=self.extractor(self.images), **more)
        return float(self.builder.build(batch, "weights", {}).row["frechet_distance"])


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    from torchvision.io import write_png

    generator = torch.Generator().manual_seed(0)
    images, real = (
        torch.randint(0, 256, (arguments.images, 3, 32, 32), dtype=torch.uint8, generator=generator) for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_inception(folder / "random.pth")
        (folder / "real").mkdir()
        for index, image in enumerate(real):
            write_png(image, str(folder / "real" / f"{index:06d}.png"))
        ours, fidelity = Ours(folder, images, real), Fidelity(folder, images)
        values = {"ddpm_ema": ours(), "torch-fidelity": fidelity()}
        rounds = [(seconds(ours), seconds(fidelity)) for _ in range(arguments.rounds)]
    ratios = sorted(theirs / own for own, theirs in rounds)
    found = {"fid": values, "seconds_ours": statistics.median(own for own, _ in rounds)}
    return found | {"times_ours": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def peak() -> float:
    """MiB of this program's peak; getrusage's begins at that of the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def grown(who: str, count: int) -> float:
    """In a fresh process: MiB by which the peak grows over that of the features, and the distance's own imports."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(count, DIM, generator=generator)
    if who == "ddpm_ema":
        from ddpm_ema.metrics import FrechetReference, estimate_distance, statistics_of

        reference = FrechetReference(statistics_of(features[:REFERENCE]), torch.device("cpu"))
        before = peak()
        estimate_distance(features, torch.arange(count), 20, reference)
    else:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        known = fid_features_to_statistics(features[:REFERENCE])
        before = peak()
        fid_statistics_to_metric(fid_features_to_statistics(features), known, False)
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--features", type=int, default=50_000)
    parser.add_argument("--memory-of", choices=("ddpm_ema", "torch-fidelity"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scoring.json")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(grown(arguments.memory_of, arguments.features))
        return
    here, memory = environment("torch-fidelity"), {}
    for who in ("ddpm_ema", "torch-fidelity"):
        command = [sys.executable, __file__, "--memory-of", who, "--features", str(arguments.features)]
        memory[who] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    sizes = {"rounds": arguments.rounds, "images": arguments.images, "features": arguments.features}
    found = {"environment": here, **sizes, **speed(arguments), "mib_over_features": memory}
    save(arguments.output, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
