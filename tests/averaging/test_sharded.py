"""A bank over shards equals the unsharded bank bit for bit, on 2 and 3 processes; see sharded_worker.py for the scenarios."""

import json
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from sharded_worker import SOME, STEPS, move, net, same

from ddpm_ema.averaging import AverageBank

QUICK = [
    "gather_gives_the_unsharded_averages",
    "placements_on_a_mesh_of_two_dimensions",
    "memory_and_distances_are_of_the_own_shards",
    "copies_go_into_any_module",
    "whole_tensors_and_shards_are_loaded",
    "a_snapshot_is_written_once_and_reconstructs",
    "training_is_followed",
    "a_state_is_stored",
]


def launch(world_size: int, folder: Path, scenarios: list[str]) -> list[dict[str, str]]:
    """What failed in each scenario ("" for nothing), by process."""
    run_ranks("sharded_worker.py", world_size, folder, str(world_size), *scenarios)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def on_two(folder: Path) -> list[dict[str, str]]:
    return launch(2, folder, QUICK)


@pytest.mark.parametrize("scenario", QUICK)
def test_on_two_processes(on_two: list[dict[str, str]], scenario: str) -> None:
    assert [failed[scenario] for failed in on_two] == ["", ""]


def test_a_state_stored_on_two_processes_is_loaded_on_one(on_two: list[dict[str, str]], folder: Path) -> None:
    whole, plain = net(), net(5)
    expected, bank = AverageBank(whole, SOME), AverageBank(plain, SOME)
    for step in range(1, STEPS + 1):
        move(whole, step)
        expected.update(step)
    state = bank.state_dict()
    dcp.load(state, checkpoint_id=folder / "stored", no_dist=True)
    bank.load_state_dict(state)
    assert bank.step == STEPS
    for name in SOME:
        same(bank.weights(name), expected.weights(name))


@pytest.mark.slow
def test_on_three_processes_also_of_a_state_stored_on_two(
    on_two: list[dict[str, str]], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "stored").symlink_to(folder / "stored")
    scenarios = ["a_state_stored_on_two_processes_is_loaded", *QUICK[:-1], "every_profile_is_equal"]
    assert [any(failed.values()) for failed in launch(3, tmp_path, scenarios)] == [False] * 3
