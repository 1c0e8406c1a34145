"""All ranks do rank 0's jobs: two ranks as threads of this process, with a generator that makes its features up."""

import io
import pickle
import threading
import time
import warnings
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_feature_store import batch_of
from tqdm import TqdmWarning, tqdm

from ddpm_ema import compiling, distributed
from ddpm_ema.distributed import Processes
from ddpm_ema.errors import StoppedError, UserError
from ddpm_ema.named_weights import NamedWeights
from ddpm_ema.score import driver
from ddpm_ema.score.driver import Driver, Job, even_batch, even_rounds, sampling_rounds
from ddpm_ema.score.feature_store import ImageBatch


class Rank(Processes):
    """One of two ranks that meet at a barrier."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self.is_main, self.timeout = rank, 2, rank == 0, 60.0
        self.control: Any = self
        self.slots, self.barrier = slots, barrier

    def gather(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    broadcast_tensors = broadcast


NAMES = ("ours",)


def pictures(images: list[int]) -> ImageBatch:
    indices = torch.tensor(images)
    return ImageBatch(indices=indices, images=indices.to(torch.uint8)[:, None, None, None])


class Made:
    """A generator whose features are the images' indices; it says what it was asked for."""

    config = SimpleNamespace(evaluation=SimpleNamespace(compile=False, extractor_batch_size=5))
    batch_size, sampler = 10, range(3)
    datasets: Any = MappingProxyType({"reference": SimpleNamespace(batch=lambda at: pictures(at.tolist()).images)})

    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.asked: list[list[int]] = []

    def load(self, name: str, pipeline: Any, members: Any) -> None:
        self.loaded.append((name, members))

    def describe(self) -> str:
        return "network"

    def generate(self, images: list[int], extractors: Any, after_step: Any) -> Any:
        for _ in self.sampler:
            after_step()
        return {"images": pictures(images), **self.read("", images, pictures(images).images, extractors)}

    def read(self, name: str, images: list[int], pixels: torch.Tensor, extractors: Any) -> Any:
        self.asked.append(images)
        assert pixels.flatten().tolist() == images
        return {extractor: batch_of(images) for extractor in extractors}


def on_two_ranks(work: Any) -> list[Any]:
    """What `work(rank's processes)` returns or raises, by rank."""
    slots, barrier, found = [None, None], threading.Barrier(2, timeout=30), [None, None]

    def call(rank: int) -> None:
        try:
            found[rank] = work(Rank(rank, slots, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def some_weights(key: str, *values: float) -> NamedWeights:
    members = tuple(lambda value=value: {"w": torch.tensor(value)} for value in values)
    return NamedWeights(f"weights {key}", key, 1, None, members)


class TestJobs:
    def test_every_rank_loads_the_weights_that_rank_0_reads_and_rank_0_gets_all_features_in_order(self) -> None:
        taken: list[Any] = []
        made = [Made(), Made()]

        def take(found: Any) -> None:
            taken.append(found["ours"])

        def jobs() -> Any:
            yield Job("a", list(range(40)), NAMES, take, some_weights("a", 1.0))
            assert torch.cat([batch.indices for batch in taken]).tolist() == list(range(40))
            yield Job("a again", list(range(14)), NAMES, take, some_weights("a", 1.0), at_once=True)
            yield Job("b", [60, 61], NAMES, take, some_weights("b", 2.0, 3.0))
            yield Job("reference", list(range(7)), NAMES, take, split="reference")

        on_two_ranks(lambda processes: Driver(processes, made[processes.rank]).run(jobs()))
        assert [part[0] for part in made[0].loaded] == ["weights a", "weights b"], "once each"
        assert made[0].loaded == made[1].loaded
        assert made[1].loaded[1][1] == [{"w": torch.tensor(2.0)}, {"w": torch.tensor(3.0)}]
        assert [batch.indices.tolist() for batch in taken[-3:]] == [[*range(14)], [60, 61], [*range(7)]]
        assert made[0].asked[-3:] == [[*range(14)], [60], [0, 1, 2]]
        assert made[1].asked[-2:] == [[61], [3, 4, 5, 6]]

    def test_rank_0_is_told_what_its_jobs_return_and_other_ranks_hear_nothing_of_its_files(self) -> None:
        def jobs() -> Any:
            yield Job("reference", [0, 1], NAMES, lambda found: None, split="reference")
            return "done"

        assert on_two_ranks(lambda of: Driver(of, Made()).run(jobs() if of.is_main else iter(()))) == ["done", None]
        job = Job("a", [0], NAMES, lambda made: None, some_weights("a", 1.0), kept=lambda indices: indices)
        told = pickle.loads(pickle.dumps(job))
        assert (told.title, told.images, told.weights.key) == ("a", [0], "a")
        for one in (told.take, told.kept, *told.weights.members):
            with pytest.raises(AssertionError, match="on a rank that was told of a job"):
                one(torch.tensor([0]))

    def test_images_that_rank_0_kept_are_sent_to_all_who_share_them_out(self) -> None:
        taken, made = list[Any](), [Made(), Made()]

        def jobs() -> Any:
            kept = lambda indices: pictures(indices.tolist()).images  # noqa: E731
            yield Job("kept", [3, 4, 8, 9, 10], NAMES, lambda found: taken.append(found["ours"]), kept=kept)

        on_two_ranks(lambda processes: Driver(processes, made[processes.rank]).run(jobs()))
        assert [one.asked for one in made] == [[[3, 4]], [[8, 9, 10]]]
        assert [batch.features[:, 0].tolist() for batch in taken] == [[3, 4, 8, 9, 10]]

    @pytest.mark.parametrize("broken", [0, 1])
    def test_an_error_of_one_rank_is_raised_on_all_after_what_was_finished_is_kept(self, broken: int) -> None:
        taken: list[Any] = []
        ended: list[bool] = []

        class Breaks(Made):
            def generate(self, images: list[int], extractors: Any, after_step: Any) -> Any:
                if self.asked and images[0] >= 20:
                    raise UserError("image 20 is broken")
                return super().generate(images, extractors, after_step)

        def jobs() -> Any:
            try:
                yield Job(
                    "a", list(range(60)), NAMES, lambda found: taken.append(found["ours"]), some_weights("a", 1.0)
                )
            finally:
                ended.append(True)  # locks are given back

        made = [Breaks() if rank == broken else Made() for rank in range(2)]
        found = on_two_ranks(lambda processes: Driver(processes, made[processes.rank]).run(jobs()))
        assert [str(error) for error in found] == ["image 20 is broken"] * 2
        assert sum(map(len, taken)) == 16 + 14, "the rounds before"
        assert ended == [True]

    def test_an_error_of_rank_0_s_own_work_is_raised_on_all(self) -> None:
        def jobs() -> Any:
            yield Job("a", [0], NAMES, lambda made: None, some_weights("a", 1.0))
            raise UserError("the disk is full")

        found = on_two_ranks(lambda processes: Driver(processes, Made()).run(jobs()))
        assert [str(error) for error in found] == ["the disk is full"] * 2

    def test_a_stop_of_one_rank_ends_all_within_its_round(self) -> None:
        taken: list[Any] = []
        stops: list[Any] = [SimpleNamespace(requested=False, reason="SIGTERM") for _ in range(2)]

        class Stops(Made):
            def generate(self, images: list[int], extractors: Any, after_step: Any) -> Any:
                stops[1].requested = images[0] > 26
                return super().generate(images, extractors, after_step)

        def jobs() -> Any:
            yield Job("raw", list(range(90)), NAMES, lambda found: taken.append(found["ours"]), some_weights("a", 1.0))

        made = [Made(), Stops()]
        found = on_two_ranks(
            lambda processes: Driver(processes, made[processes.rank], stops[processes.rank]).run(jobs())
        )
        assert all(isinstance(error, StoppedError) for error in found)
        assert "stopped by SIGTERM while working on raw; finished images are kept: start again to go on" in str(
            found[0]
        )
        assert [len(batch) for batch in taken] == [8, 8, 18]

    def test_rank_0_s_work_may_take_longer_than_the_timeout_that_says_a_rank_is_gone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(distributed, "HEARTBEAT_SECONDS", 0.05)
        gathered: list[Any] = []

        class Counted(Rank):
            def gather(self, value: Any) -> list[Any]:
                gathered.append(value)
                return super().gather(value)

        def work(processes: Rank) -> Any:
            processes.__class__ = Counted
            return processes.on_main(lambda: time.sleep(0.5) or "done", "computing")

        assert on_two_ranks(work) == ["done", "done"]
        assert gathered.count(False) >= 3, "rank 0 says that it is still busy"


class TestCompiling:
    def driver(self, monkeypatch: pytest.MonkeyPatch, error: Exception, stop: Any = None) -> tuple[Driver, list[str]]:
        prepared: list[str] = []

        class Fails(Made):
            config = SimpleNamespace(evaluation=SimpleNamespace(compile=True, extractor_batch_size=5))

            def generate(self, images: list[int], extractors: Any, after_step: Any) -> Any:
                if len(images) > 5:
                    raise error
                return super().generate(images, extractors, after_step)

        monkeypatch.setattr(compiling, "prepare", lambda setting, tell: prepared.append(setting))
        return Driver(Processes.start("cpu"), Fails(), stop), prepared  # type: ignore[arg-type]

    def test_the_cache_is_looked_at_once_and_a_failure_is_one_message_that_names_the_setting(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failure = type("TorchDynamoException", (RuntimeError,), {})("CppCompileError: no compiler")
        made, prepared = self.driver(monkeypatch, failure)
        made.do(Job("raw", [20, 21], NAMES, lambda found: None))
        with pytest.raises(UserError, match=r"evaluation.compile: torch.compile fails here \(CppCompileError"):
            made.do(Job("raw", list(range(20, 30)), NAMES, lambda found: None))
        assert prepared == ["evaluation.compile"]

    def test_a_stop_that_kills_the_compiler_is_a_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        failure = type("TorchDynamoException", (RuntimeError,), {})("CppCompileError: killed")
        stop = SimpleNamespace(requested=False, reason="SIGTERM")
        made, _ = self.driver(monkeypatch, failure, stop)
        monkeypatch.setattr(made, "_check_stop", lambda title: setattr(stop, "requested", True))
        with pytest.raises(StoppedError, match=r"while torch\.compile worked"):
            made.do(Job("raw", list(range(20, 30)), NAMES, lambda found: None))


class TestRounds:
    @pytest.mark.parametrize(
        ("num_images", "world", "most"), [(1797, 2, 256), (50_000, 8, 250), (25, 3, 256), (529, 2, 256)]
    )
    def test_shares_are_even_and_whole_and_the_first_images_are_rank_0_s(
        self, num_images: int, world: int, most: int
    ) -> None:
        """The first ones can be sampled again, to the byte, by any number of processes."""
        batch = even_batch(num_images, world, most)
        assert batch <= most
        first, *rounds = sampling_rounds(list(range(num_images)), world, batch)
        assert first == [list(range(16)), *[[]] * (world - 1)]
        assert [index for shares in rounds for share in shares for index in share] == list(range(16, num_images))
        sizes = [len(share) for shares in rounds for share in shares]
        assert max(sizes) <= batch
        assert max(sizes) - min(sizes) <= 1
        assert len(rounds) == -(-(num_images - 16) // (world * most))

    def test_small_batches_share_the_first_images_out_over_rounds_of_rank_0(self) -> None:
        assert list(sampling_rounds([14, 15, 16, 17], 2, even_batch(60, 2, 10))) == [[[14, 15], []], [[16], [17]]]
        assert list(even_rounds([1, 2, 3, 4, 5], 2, 2)) == [[[1], [2]], [[3], [4, 5]]]
        assert even_batch(1, 1, 1) == 1

    def test_parts_of_a_round_that_add_up_to_more_by_rounding_do_not_take_the_bar_past_its_end(self) -> None:
        with tqdm(total=1797, disable=False, file=io.StringIO()) as bar, warnings.catch_warnings():
            warnings.simplefilter("error", TqdmWarning)
            for _ in range(15):
                driver._advance(bar, 1797 / 15 * (1 + 1e-12))
                bar.refresh()
            assert bar.n == 1797
