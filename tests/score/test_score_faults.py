"""What goes wrong while scoring, made to happen: signals, kills, images that are not finite, folders that cannot be written."""

import json
import os
import signal
import time
from functools import partial

import live_runs
import pytest
import torch
from live_runs import wait_until
from scored import again, make_run, results, start, weights

from ddpm_ema import capabilities, data, metrics, score
from ddpm_ema.errors import EXIT_BAD_INPUT, EXIT_STOPPED, UserError
from ddpm_ema.rundir import RunDir

CLOSE = 0.01  # pixels on the edge between two levels may round either way in another batch
# Enough rounds and steps that a signal falls among them.
LONG = {
    "evaluation__num_images": 240,
    "evaluation__batch_size": 10,
    "evaluation__num_inference_steps": 12,
    "evaluation__precision_recall": False,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Figures of a scoring that nothing happened to."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run", **LONG, evaluation__weights=["raw", "ema_0_9"])
    return results(run)


def numbers(found):
    return {row["weights"]: [row[key] for key in ("frechet_distance", "stderr", "kid")] for row in found["rows"]}


def kept(run):
    return sorted((run.output_dir / "scores").glob("*/weights/*/features-*.safetensors"))


def found_results(run):
    return json.loads(next((run.output_dir / "scores").glob("*/results.json")).read_text())


def twice(run):
    score.run(run)
    score.run(again(run, evaluation__weights=["raw", "ema_0_9"]))


def takes_an_hour(place):
    def waits(*_, **__):
        os.write(1, b"waiting here\n")
        time.sleep(3600)

    if place == "images":
        data.load = waits
    else:
        metrics.reference.neighbour_radii = waits


class TestStopAndGoOn:
    def test_sigterm_ends_all_ranks_with_75_and_another_number_of_processes_goes_on(self, tmp_path, whole):
        run = make_run(tmp_path / "run", **LONG, evaluation__weights=["raw", "ema_0_9"])
        launch = start(run, world_size=2)
        wait_until(lambda: len(kept(run)) >= 3)
        launch.signal(signal.SIGTERM, rank=1)
        assert launch.wait() == [EXIT_STOPPED, EXIT_STOPPED]
        assert "start again to go on" in launch.output(0)
        assert "Traceback" not in launch.output(0) + launch.output(1)
        before = {path.name: path.read_bytes() for path in kept(run)}
        assert before
        alone = start(run)
        wait_until(lambda: len(kept(run)) > len(before) or bool(list(run.output_dir.glob("scores/*/results.json"))))
        assert all(path.read_bytes() == before[path.name] for path in kept(run) if path.name in before)
        assert alone.wait() == [0]
        for name, expected in numbers(whole).items():
            assert numbers(found_results(run))[name] == pytest.approx(expected, rel=CLOSE)

    @pytest.mark.parametrize(("place", "world_size"), [("images", 1), ("radii", 2)])
    def test_a_stop_is_not_kept_waiting_by_real_images_that_are_read_or_compared(self, tmp_path, place, world_size):
        run = make_run(tmp_path / "run", evaluation__precision_recall=True)
        launch = live_runs.start(run, world_size, command=score.run, before=partial(takes_an_hour, place))
        wait_until(lambda: "waiting here" in launch.output())
        launch.signal(signal.SIGTERM)
        assert launch.wait() == [EXIT_STOPPED] * world_size
        assert "SIGTERM: nothing to save: ending" in launch.output()

    def test_sigkill_loses_one_round_at_most(self, tmp_path, whole):
        run = make_run(tmp_path / "run", **LONG, evaluation__weights=["raw", "ema_0_9"])
        for kill in range(2):
            launch = start(run)
            wait_until(lambda kill=kill: len(kept(run)) >= 4 * (kill + 1))
            launch.signal(signal.SIGKILL)
            assert launch.wait() == [-signal.SIGKILL]
        before = {path: path.stat().st_mtime_ns for path in kept(run)}
        done = results(run)
        assert all(path.stat().st_mtime_ns == made for path, made in before.items())
        assert numbers(done) == {name: pytest.approx(v, rel=CLOSE) for name, v in numbers(whole).items()}

    def test_two_processes_score_what_one_does_also_where_they_scored_before(self, tmp_path, whole):
        run = make_run(tmp_path / "run", **LONG, evaluation__weights=["raw"])
        launch = start(run, world_size=2, command=twice)
        assert launch.wait() == [0, 0], launch.output(0)
        found = found_results(run)
        assert found["world_size"] == 2
        for name, expected in numbers(whole).items():
            assert numbers(found)[name] == pytest.approx(expected, rel=CLOSE)

    def test_a_second_scoring_of_the_same_folder_is_refused_while_the_first_runs(self, tmp_path):
        run = make_run(tmp_path / "run", evaluation__weights=["raw"])
        results(run)
        folder = min((run.output_dir / "scores").glob("*-*"), key=lambda path: len(path.name))  # of the images
        with RunDir(folder).lock():
            second = start(run)
            assert second.wait() == [EXIT_BAD_INPUT]
        assert "another run is working in this folder" in second.output()


class TestWhatIsNotFinite:
    def test_images_are_named_with_their_copy_once_and_every_rank_ends(self, tmp_path):
        run = make_run(tmp_path / "run", evaluation__weights=["raw", "power_0_10"])
        broken = weights()
        broken["conv_out.bias"] = torch.full_like(broken["conv_out.bias"], float("nan"))
        files = {"raw.safetensors": weights(), "averages/power_0_10.safetensors": broken}
        manifest = RunDir(run.output_dir).checkpoint(8).manifest
        RunDir(run.output_dir).write_checkpoint(8, files, {"settings": manifest["settings"]})
        launch = start(run, world_size=2)
        assert launch.wait() == [EXIT_BAD_INPUT, EXIT_BAD_INPUT]
        assert launch.output(0).count("power_0_10: the pixels of image 0 are not finite") == 1
        assert "Traceback" not in launch.output(0) + launch.output(1)
        assert "not finite" not in launch.output(1), "rank 0 has said it"
        # What was finished before is kept.
        records = [json.loads(path.read_text()) for path in run.output_dir.glob("scores/*/weights/*.json")]
        assert [record["name"] for record in records if record["rows"]] == ["raw"]


class TestWhatIsMissing:
    def test_no_checkpoint_is_one_message(self, tmp_path):
        run = make_run(tmp_path / "run")
        (run.output_dir / "checkpoints").rename(tmp_path / "gone")
        with pytest.raises(
            UserError, match=r"no checkpoint to score: train first \(ddpm-ema train\), or name another run"
        ):
            score.run(run)

    def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_scored(self, tmp_path, capsys):
        run = make_run(tmp_path / "run", evaluation__weights=["raw"])
        path = RunDir(run.output_dir).checkpoint(8).path / "raw.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert results(run)["step"] == 4
        assert "sha256 mismatch" in capsys.readouterr().err

    def test_a_classifier_that_was_not_trained_is_one_message(self, tmp_path):
        run = make_run(tmp_path / "run")
        (run.output_dir / "features.safetensors").unlink()
        with pytest.raises(UserError, match="ddpm-ema features"):
            score.run(run)

    def test_a_cache_that_cannot_be_written_is_one_warning(self, tmp_path, capsys):
        run = make_run(tmp_path / "run", evaluation__weights=["raw"])
        (tmp_path / "file").write_text("no folder")
        blocked = again(run, data__cache_dir=str(tmp_path / "file"))
        assert results(blocked)["rows"]
        assert capsys.readouterr().err.count("not cached") == 1

    def test_compilation_without_a_compiler_is_an_error_before_anything_is_read(self, tmp_path, monkeypatch):
        run = make_run(tmp_path / "run", evaluation__compile=True)
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(UserError, match=r"evaluation.compile: .*C\+\+ compiler"):
            capabilities.check("evaluation", run.evaluation, run.machine)

    def test_fewer_images_than_feature_dimensions_is_said_beside_the_number(self, tmp_path):
        run = make_run(tmp_path / "run", evaluation__weights=["raw"], evaluation__num_images=8)
        found = results(run)
        assert any("feature dimensions" in text for text in found["rows"][0]["warnings"])
        assert found["warnings"]


def test_published_reference_statistics_are_read_and_their_origin_is_recorded(tmp_path):
    import numpy as np

    run = make_run(tmp_path / "run", evaluation__weights=["raw"])
    noise = np.random.default_rng(0).standard_normal((200, 8))
    np.savez(tmp_path / "stats.npz", mu=noise.mean(axis=0), sigma=np.cov(noise, rowvar=False))
    found = results(again(run, evaluation__reference=str(tmp_path / "stats.npz")))
    assert "stats.npz" in found["reference"]
    assert len(found["reference_origin"]["sha256"]) == 64
    assert "kid" not in found["rows"][0]
    assert any("its extractor cannot be checked" in text for text in found["warnings"])
