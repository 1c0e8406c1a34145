"""Features on disk: joined, read one batch at a time, and never believed when they are damaged."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from ddpm_ema.score.feature_store import BatchStore, FeatureBatch


def batch_of(indices: list[int]) -> FeatureBatch:
    numbers = torch.tensor(indices)
    features = numbers.float()[:, None].expand(-1, 3).contiguous()
    contrast = numbers.to(torch.uint8)
    return FeatureBatch(indices=numbers, features=features, saturated=numbers / 10, contrast=contrast, seconds=1.0)


def store_in(folder) -> BatchStore[FeatureBatch]:
    return BatchStore(folder, "features", FeatureBatch)


def test_batches_come_back_as_they_were_kept(tmp_path):
    batches = [batch_of([3, 4]), batch_of([0, 1, 2])]
    store = store_in(tmp_path)
    for batch in batches:
        store.add(batch)
    whole = store_in(tmp_path).join(5)
    assert whole.indices.tolist() == [0, 1, 2, 3, 4]
    assert whole.features[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert whole.saturated.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert whole.seconds == 2.0
    part = store_in(tmp_path).join(4)
    assert part.indices.tolist() == [0, 1, 2, 3]
    assert part.contrast.tolist() == [0, 1, 2, 3]
    assert part.seconds == 1.5


def test_images_that_are_there_already_are_not_kept_again(tmp_path):
    store = store_in(tmp_path)
    store.add(batch_of([0, 1, 2]))
    store.add(batch_of([1, 2, 3, 4]))
    store.add(batch_of([0, 4]))
    whole = store_in(tmp_path).join(5)
    assert whole.indices.tolist() == [0, 1, 2, 3, 4]
    assert whole.seconds == 1.5, "one batch, and half of another"
    assert len(list(tmp_path.glob("features-*"))) == 2


def test_joining_holds_one_batch_beside_the_result(tmp_path, monkeypatch):
    for start in (0, 2, 4):
        store_in(tmp_path).add(batch_of([start, start + 1]))
    store, read, alive = store_in(tmp_path), FeatureBatch.read, []

    def reading(path):
        gc.collect()
        assert sum(batch() is not None for batch in alive) <= 1, "the last one is let go when the next is there"
        batch = read(path)
        alive.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(FeatureBatch, "read", reading)
    assert len(store.join(6)) == 6
    assert len(alive) == 3


@pytest.mark.parametrize("harm", ["truncate", "pickle", "repeat", "nan"])
def test_a_damaged_batch_is_named_and_left_out(tmp_path, harm, capsys):
    store = store_in(tmp_path)
    store.add(batch_of([0, 1]))
    store.add(batch_of([2, 3]))
    bad = sorted(tmp_path.glob("features-*"))[1]
    if harm == "truncate":
        bad.write_bytes(bad.read_bytes()[:-3])
    elif harm == "pickle":
        torch.save({"indices": torch.tensor([2, 3])}, bad)
    elif harm == "repeat":
        bad.write_bytes(sorted(tmp_path.glob("features-*"))[0].read_bytes())
    else:
        batch = batch_of([2, 3])
        batch.features[1, 0] = float("nan")
        bad.unlink()
        store_in(tmp_path).add(batch)
    assert store_in(tmp_path).missing(4) == [2, 3]
    assert not bad.exists()
    assert bad.name in capsys.readouterr().err


JOIN = """
import re, sys, torch
from pathlib import Path
from ddpm_ema.score.feature_store import BatchStore, FeatureBatch
def peak_of_this_program():  # getrusage's peak begins at that of the parent
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
store, count, dim = BatchStore(Path(sys.argv[1]), "features", FeatureBatch), 50_000, 2048
for start in range(0, count, 500):
    indices = torch.arange(start, start + 500)
    some = torch.zeros(500)
    store.add(FeatureBatch(indices=indices, features=torch.ones(500, dim), saturated=some, contrast=some.byte()))
before = peak_of_this_program()
batch = store.join(count)
peak = peak_of_this_program() - before
assert batch.features.shape == (count, dim)
print(peak / batch.features.nbytes)
"""


@pytest.mark.slow
def test_joining_50_000_features_of_2048_dimensions_peaks_at_1_3_times_their_size_at_most(tmp_path):
    """Measured as the resident memory of a process of its own."""
    found = subprocess.run([sys.executable, "-c", JOIN, str(tmp_path)], capture_output=True, text=True, check=True)
    print(found.stdout)
    assert 0.9 < float(found.stdout) <= 1.3
