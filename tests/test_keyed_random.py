"""Keyed random numbers: the published generator, right distributions, and no dependence on how work is split."""

import hashlib
import itertools
import math

import pytest
import torch
from scipy import stats

from ddpm_ema import keyed_random
from ddpm_ema.keyed_random import Purpose

# Random123's kat_vectors, the lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """int64 `[..., 4]` and `[2]`, each of uint32 values, to int64 `[..., 4]`."""
    return torch.stack(keyed_random._rounds(counter.unbind(-1), tuple(key.tolist())), dim=-1)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == answer


def test_words_are_philox_at_the_documented_counter_and_key() -> None:
    step = (5 << 32) + 9
    got = keyed_random.words(3, Purpose.NOISE, step, torch.tensor([11, 2**32 - 1]), 6)
    for row, position in zip(got, (11, 2**32 - 1), strict=True):
        blocks = [
            philox(torch.tensor([block, position, 9, 5]), torch.tensor([3, int(Purpose.NOISE)])) for block in range(2)
        ]
        assert torch.equal(row, torch.cat(blocks)[:6])


def test_no_two_of_seed_purpose_step_position_and_block_share_numbers() -> None:
    positions = torch.arange(8)
    seen = [
        tuple(block)
        for seed, purpose, step in itertools.product((0, 1, 2**32 - 1), (0, 1, 5), (0, 1, 2**32, 2**64 - 1))
        for block in keyed_random.words(seed, purpose, step, positions, 16).reshape(-1, 4).tolist()
    ]
    assert len(set(seen)) == len(seen) == 3 * 3 * 4 * 8 * 4


def test_no_two_purposes_share_a_number() -> None:
    assert len(set(map(int, Purpose.__members__.values()))) == len(Purpose.__members__)


def test_normals_are_box_muller_of_the_words() -> None:
    got = keyed_random.normal(1, Purpose.NOISE, 2, torch.arange(4), (10, 10)).reshape(-1, 2).tolist()
    pairs = keyed_random.words(1, Purpose.NOISE, 2, torch.arange(4), 100).reshape(-1, 2).tolist()
    for (first, second), (radius_word, angle_word) in zip(got, pairs, strict=True):
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
        turn = math.pi if angle_word >> 31 else 0.0
        angle = turn + 2 * math.pi * ((angle_word & 0x7FFFFFFF) + 0.5 - 2**30) / 2**32
        assert first == pytest.approx(radius * math.cos(angle), abs=5e-7, rel=1e-7)
        assert second == pytest.approx(radius * math.sin(angle), abs=5e-7, rel=1e-7)


def test_the_transform_is_right_at_the_ends_of_its_range() -> None:
    ends = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    logs = keyed_random._minus_two_log(ends.clone())
    expected = [-2 * math.log1p((int(word) + 0.5) / 2**32 - 1) for word in ends]
    torch.testing.assert_close(logs, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
    assert (logs > 0).all()
    for radius_word, angle_word in itertools.product(ends.tolist(), repeat=2):
        out = torch.empty(1, 2)
        keyed_random._box_muller(torch.tensor([radius_word]), torch.tensor([angle_word]), out)
        assert out.isfinite().all()
        radius = math.sqrt(-2 * math.log1p((radius_word + 0.5) / 2**32 - 1))
        assert float(out.norm()) == pytest.approx(radius, rel=1e-6)


def test_normals_have_the_same_bits_everywhere() -> None:
    """Made of correctly rounded operations only, so the digest holds on any machine, for any instruction set."""
    values = keyed_random.normal(2024, Purpose.SAMPLE, 17, torch.arange(5), (3, 7, 11))
    digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    assert digest == "c262d584fae81d8ee9caa6ce7ca1995f2e53539f058b89b9af0334cb8d47adc9"


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 8, 8), (3, 33, 31)])
def test_normals_do_not_depend_on_how_positions_are_split_or_ordered(shape: tuple[int, ...]) -> None:
    whole = keyed_random.normal(9, Purpose.NOISE, 3, torch.arange(37), shape)
    assert whole.shape == (37, *shape)
    assert whole.dtype == torch.float32
    parts = [keyed_random.normal(9, Purpose.NOISE, 3, part, shape) for part in torch.arange(37).split([1, 20, 16])]
    assert torch.equal(whole, torch.cat(parts))
    order = torch.randperm(37)
    assert torch.equal(whole[order], keyed_random.normal(9, Purpose.NOISE, 3, order, shape))


def test_normals_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = keyed_random.normal(1, Purpose.NOISE, 1, torch.arange(16), (3, 64, 64))
        torch.set_num_threads(2)
        two = keyed_random.normal(1, Purpose.NOISE, 1, torch.arange(16), (3, 64, 64))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "draw",
    [
        lambda positions: keyed_random.normal(4, Purpose.NOISE, 12, positions, (3, 32, 32)),
        lambda positions: keyed_random.words(4, 2, 12, positions, 7),
        lambda positions: keyed_random.integers(4, 2, 12, positions, 1000),
        lambda positions: keyed_random.uniform(4, 2, 12, positions),
    ],
    ids=["normal", "words", "integers", "uniform"],
)
def test_numbers_have_the_same_bits_on_the_gpu(draw) -> None:
    on_gpu = draw(torch.arange(130).cuda())
    assert on_gpu.device.type == "cuda"
    assert torch.equal(draw(torch.arange(130)), on_gpu.cpu())


def test_uniform_numbers_are_uniform_in_the_half_open_interval() -> None:
    values = keyed_random.uniform(0, Purpose.FLIP, 0, torch.arange(100_000))
    assert values.dtype == torch.float64
    assert 0 <= float(values.min()) < float(values.max()) < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3


def test_integers_are_the_upper_half_of_a_64_bit_product() -> None:
    positions = torch.arange(50)
    for bound in (7, 2**31):
        pairs = keyed_random.words(5, Purpose.TIMESTEP, 1, positions, 2).tolist()
        expected = [(((high << 32) | low) * bound) >> 64 for high, low in pairs]
        assert keyed_random.integers(5, Purpose.TIMESTEP, 1, positions, bound).tolist() == expected


def test_numbers_outside_the_key_are_refused() -> None:
    here = torch.arange(2)
    with pytest.raises(ValueError, match="seed must be"):
        keyed_random.words(2**32, 0, 0, here, 1)
    with pytest.raises(ValueError, match="step must be"):
        keyed_random.words(0, 0, -1, here, 1)
    with pytest.raises(ValueError, match="every position"):
        keyed_random.normal(0, 0, 0, torch.tensor([2**32]), (2,))
    with pytest.raises(ValueError, match="every position"):
        keyed_random.words(0, 0, 0, torch.tensor([-1]), 1)
    with pytest.raises(ValueError, match="int64"):
        keyed_random.words(0, 0, 0, torch.tensor([0.0]), 1)
    with pytest.raises(ValueError, match="bound"):
        keyed_random.integers(0, 0, 0, here, 2**31 + 1)


def test_a_seed_for_another_generator_fits_it_and_differs_by_step_and_position() -> None:
    seeds = {keyed_random.seed_for(0, Purpose.DROPOUT, step, rank) for step in range(10) for rank in range(4)}
    assert len(seeds) == 40
    assert all(0 <= seed < 2**63 for seed in seeds)
