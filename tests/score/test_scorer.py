"""What a scorer asks for and what it keeps, without processes: features come from a formula, not from a network."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scored import again, make_run

from ddpm_ema.averaging import PowerFunction
from ddpm_ema.errors import UserError
from ddpm_ema.metrics import Reference, statistics_of
from ddpm_ema.named_weights import WeightResolver
from ddpm_ema.rundir import RunDir
from ddpm_ema.score.feature_store import FeatureBatch, ImageBatch
from ddpm_ema.score.folder import ScoreFolder
from ddpm_ema.score.real_images import RealImages
from ddpm_ema.score.sampled import Sampled
from ddpm_ema.score.scorer import Scorer

DIM = 4
EXTRACTORS = ["numbers", "others"]


def made_of(key: str, images: list[int], scale: float = 1.0) -> dict[str, object]:
    """The same noise for all weights, scaled by their key."""
    noise = torch.randn(1000, DIM, generator=torch.Generator().manual_seed(0))[images]
    pictures = torch.full((len(images), 1, 8, 8), round(scale), dtype=torch.uint8)
    spread = 1 + int(key[:2], 16) / 1000
    indices, per_image = torch.tensor(images), torch.zeros(len(images))
    figures = {"saturated": per_image, "contrast": per_image.byte() + 99}
    features = FeatureBatch(indices=indices, features=noise * spread, **figures)
    return {"images": ImageBatch(indices=indices, images=pictures), **dict.fromkeys(EXTRACTORS, features)}


class Worker:
    """Does a scorer's jobs, ten images at once; `asked` says for what, `stop_after` ends it early."""

    def __init__(self, scale: float = 1.0) -> None:
        self.asked: dict[str, list[int]] = {}
        self.scale = scale

    def run(self, jobs, stop_after: int | None = None):
        result = None

        def finished():
            nonlocal result
            result = yield from jobs

        for job in finished():
            for start in range(0, len(job.images), 10):
                if stop_after is not None and sum(map(len, self.asked.values())) >= stop_after:
                    return None
                images = job.images[start : start + (len(job.images) if job.at_once else 10)]
                self.asked.setdefault(job.title, []).extend(images)
                made = made_of(job.weights.key if job.weights else "00", images, self.scale)
                job.take({name: made[name] for name in (*(["images"] if job.weights else []), *job.extractors)})
                if job.at_once:
                    break
        return result


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", evaluation__weights=["raw", "ema_0_9"], evaluation__num_images=40)


def scorer_of(run, extractors=("numbers",)) -> Scorer:
    """As `score.run` makes it at every start, of the first extractor."""
    rundir = RunDir(run.output_dir)
    real = torch.randn(300, DIM, generator=torch.Generator().manual_seed(1))
    extractor = SimpleNamespace(
        key=extractors[0],
        label="numbers",
        feature_layer="all",
        device=torch.device("cpu"),
        is_published_inception=False,
    )
    generator = SimpleNamespace(
        config=run,
        extractors=dict.fromkeys(extractors, extractor),
        image_shape=(1, 8, 8),
        sampler_for=lambda pipeline: None,
    )
    sampled = Sampled(run.output_dir / "scores" / "00000008-x", generator)
    folder = ScoreFolder(run.output_dir / "scores" / f"00000008-x-{extractors[0]}")
    settings = {
        "reference": {"size": 300},
        "sampler": "ddim",
        "num_inference_steps": 4,
        "eta": 0.0,
        "clip_sample": True,
    }
    resolver = WeightResolver(rundir, rundir.checkpoint(8), run)
    images = RealImages(run, extractor, Reference(statistics_of(real), {}, real))
    return Scorer(generator, images, resolver, sampled, folder, settings)


def all_rows(scorer: Scorer):
    for named in scorer.named():
        yield from scorer.score(named)


def test_it_asks_for_all_images_of_all_weights_and_writes_their_rows(run):
    scorer, worker = scorer_of(run), Worker()
    worker.run(all_rows(scorer))
    assert worker.asked == {"raw": list(range(40)), "ema_0_9": list(range(40))}
    found = scorer.write({})
    assert {row["weights"] for row in found["rows"]} == {"raw", "ema_0_9"}
    assert scorer.folder.results() == found
    assert scorer.folder.grid_path.is_file()


def test_after_a_stop_it_asks_for_what_is_missing_and_a_complete_one_asks_for_nothing(run):
    first, second, third = Worker(), Worker(), Worker()
    first.run(all_rows(scorer_of(run)), stop_after=50)
    assert first.asked == {"raw": list(range(40)), "ema_0_9": list(range(10))}
    scorer = scorer_of(run)
    assert not scorer.is_complete(scorer.named())
    second.run(all_rows(scorer))
    assert second.asked == {"ema_0_9": list(range(10, 40))}
    scorer = scorer_of(run)
    assert scorer.is_complete(scorer.named())
    third.run(all_rows(scorer))
    assert third.asked == {}


def test_several_extractors_take_the_same_images_and_one_that_comes_later_samples_nothing(run):
    first, later = Worker(), Worker()
    first.run(all_rows(scorer_of(run, ("numbers",))))
    both = scorer_of(run, ("others", "numbers"))
    later.run(all_rows(both))
    assert later.asked == {"raw, others": list(range(40)), "ema_0_9, others": list(range(40))}
    shutil.rmtree(run.output_dir / "scores")
    at_once = Worker()
    at_once.run(all_rows(scorer_of(run, ("numbers", "others"))))
    at_once.run(all_rows(scorer_of(run, ("others", "numbers"))))
    assert at_once.asked == {"raw": list(range(40)), "ema_0_9": list(range(40))}


def test_of_large_images_the_first_are_kept_and_the_others_sampled_again(run, monkeypatch):
    monkeypatch.setattr("ddpm_ema.score.sampled.KEPT_BYTES", 40 * 64 - 1)
    run = again(run, evaluation__weights=["raw"])
    Worker().run(all_rows(scorer_of(run, ("numbers",))))
    worker = Worker()
    worker.run(all_rows(scorer_of(run, ("others",))))
    assert worker.asked == {"raw": list(range(16, 40)), "raw, others": list(range(16))}


def test_the_best_candidate_of_a_sweep_has_a_row_in_the_grid_where_its_samples_are_at_hand(run):
    def grid(scorer: Scorer, best: list[str]) -> list[str]:
        row = {**scorer.record(weights).rows[40], "significant": True, "delta_vs_raw": -1.0}
        scorer.write({"sweep": [row], "may_be_best": best})
        return json.loads(Image.open(scorer.folder.grid_path).text["Rows"])["names"]

    scorer = scorer_of(run)
    weights = scorer.resolver.reconstructed(PowerFunction(std=0.07))
    Worker().run(all_rows(scorer))
    Worker().run(scorer.score(weights, named=False))
    assert sorted(grid(scorer, ["raw", "ema_0_9"])) == ["ema_0_9", "raw"], "no candidate may be the best"
    assert sorted(grid(scorer, ["ema_0_9", "power_0_07"])) == ["ema_0_9", "power_0_07", "raw"]
    shutil.rmtree(run.output_dir / "scores" / "00000008-x" / "weights" / weights.key[:16])
    assert sorted(grid(scorer_of(run), ["power_0_07"])) == ["ema_0_9", "raw"]


def test_a_name_that_means_nothing_is_an_error_before_anything_is_asked_for(run):
    with pytest.raises(UserError, match="no checkpoint of step 5; steps there: 4, 8"):
        scorer_of(again(run, evaluation__weights=["raw", "raw@5"])).named()
