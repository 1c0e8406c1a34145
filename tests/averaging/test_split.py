"""A bank split over ranks: balanced, equal to the unsplit one bit for bit, and brought together by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from split_worker import PROFILES, WORLD_SIZE, bank_of, model, move

from ddpm_ema.averaging import AverageBank, merge_states
from ddpm_ema.averaging.naming import assign_owners


def trained(world_size: int, steps: int = 7) -> list[AverageBank]:
    """The banks of all ranks after some steps of the same training."""
    net = model()
    banks = [bank_of(net, rank, world_size) for rank in range(world_size)]
    for step in range(1, steps + 1):
        move(net, step)
        for bank in banks:
            bank.update(step)
    return banks


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=60), st.integers(1, 9))
def test_shares_are_balanced_within_the_largest_tensor(sizes: list[int], world_size: int) -> None:
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    owners = assign_owners(named, world_size)
    assert owners.keys() == named.keys()
    loads = [sum(size for name, size in named.items() if owners[name] == rank) for rank in range(world_size)]
    assert max(loads) - min(loads) <= max(sizes)


def test_shares_do_not_depend_on_the_order_of_the_names() -> None:
    named = {f"t{i}": 10 * (i % 3) + 1 for i in range(20)}
    assert assign_owners(named, 4) == assign_owners(dict(reversed(named.items())), 4)


@pytest.mark.parametrize("world_size", [2, 3, 8, 20])
def test_together_the_shares_are_the_unsplit_bank_bit_for_bit(world_size: int) -> None:
    (whole,) = trained(1)
    banks = trained(world_size)
    for name in PROFILES:
        union: dict[str, torch.Tensor] = {}
        for bank in banks:
            share = bank.weights(name)
            assert not union.keys() & share.keys()
            union |= share
        assert same(union, {n: union[n] for n in whole.parameter_names})
        assert same(union, whole.weights(name))
        assert same(banks[-1].buffers(name), whole.buffers(name))  # buffers are kept whole by everyone


def test_a_share_costs_its_part_of_the_memory() -> None:
    (whole,) = trained(1, steps=0)
    banks = trained(2, steps=0)
    buffers = sum(t.numel() * t.element_size() for name in PROFILES for t in whole.buffers(name).values())
    parts = [bank.num_bytes - buffers for bank in banks]
    assert sum(parts) == whole.num_bytes - buffers
    assert abs(parts[0] - parts[1]) <= 4 * len(PROFILES) * 8 * 8 * 9


@pytest.mark.parametrize(("stored_on", "loaded_on"), [(1, 3), (3, 1), (3, 2), (2, 5)])
def test_a_state_stored_on_n_processes_loads_on_m(stored_on: int, loaded_on: int) -> None:
    (whole,) = trained(1)
    state = merge_states([bank.state_dict() for bank in trained(stored_on)])
    net = model()
    for rank in range(loaded_on):
        bank = bank_of(net, rank, loaded_on)
        bank.load_state_dict(state)
        for name in PROFILES:
            share = bank.weights(name)
            assert same(share, {n: whole.weights(name)[n] for n in share})
            assert same(bank.buffers(name), whole.buffers(name))
        assert bank.step == 7


def test_the_state_of_one_process_of_several_is_not_enough() -> None:
    banks = trained(3)
    with pytest.raises(ValueError, match="is missing"):
        bank_of(model()).load_state_dict(banks[0].state_dict())
    other = banks[1].state_dict() | {"step": 6}
    with pytest.raises(ValueError, match="step differs between processes: 7 and 6"):
        merge_states([banks[0].state_dict(), other])


def test_distances_of_the_shares_add_up() -> None:
    net = model()
    whole, banks = bank_of(net), [bank_of(net, rank, 3) for rank in range(3)]
    move(net, 1)
    total = sum(bank.squared_distances()["ema"] for bank in banks)
    assert total.item() == pytest.approx(whole.squared_distances()["ema"].item(), rel=1e-12)
    norm = sum(bank.squared_norm() for bank in banks)
    assert norm.item() == pytest.approx(whole.squared_norm().item(), rel=1e-12)


def test_an_unsplit_bank_gathers_without_torch_distributed_and_gives_tensors_of_their_own() -> None:
    (whole,) = trained(1)
    gathered = dict(whole.gather("ema"))
    assert list(gathered) == whole.parameter_names
    assert same(gathered, whole.weights("ema"))
    next(iter(gathered.values())).fill_(0.0)
    next(iter(whole.gather_all("ema").values())).fill_(0.0)
    assert whole.weights("ema")["0.weight"].abs().sum() > 0


def test_a_split_bank_says_what_is_missing_to_gather() -> None:
    with pytest.raises(ValueError, match=r"split over 3 processes, but torch\.distributed is not initialised"):
        trained(3)[0].gather("ema")
    with pytest.raises(ValueError, match="only its share"):
        trained(3)[0].copy_to("ema", model())


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gathered")
    run_ranks("split_worker.py", WORLD_SIZE, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


def test_gathering_brings_every_tensor_to_one_rank_in_order_and_nothing_elsewhere(gathered: list[dict]) -> None:
    (whole,) = trained(1)
    for key, name, dst in (("to_0", "ema", 0), ("to_2", "p", 2)):
        for rank, results in enumerate(gathered):
            if rank != dst:
                assert results[key] == []
                continue
            assert [n for n, _ in results[key]] == whole.parameter_names
            assert all(t.dtype is torch.float32 and t.device.type == "cpu" for _, t in results[key])
            assert same(dict(results[key]), whole.weights(name))


def test_gathering_for_all_gives_every_rank_everything(gathered: list[dict]) -> None:
    (whole,) = trained(1)
    for results in gathered:
        assert same(results["all"], whole.weights("d"))


def test_gathering_counts_ranks_within_the_group_it_is_given(gathered: list[dict]) -> None:
    expected = {n: p.detach() for n, p in bank_after_seven_steps().items()}
    assert gathered[1]["pair"] == []
    assert same(dict(gathered[2]["pair"]), expected)
    assert same(gathered[1]["pair_all"], expected)
    assert "split over 2 processes, the group has 3" in gathered[1]["error"]


def bank_after_seven_steps() -> dict[str, torch.Tensor]:
    net = model()
    for step in range(1, 8):
        move(net, step)
    return dict(net.named_parameters(remove_duplicate=False))
