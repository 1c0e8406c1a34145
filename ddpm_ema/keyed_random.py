"""Random numbers as a function of (seed, purpose, step, position), with no generator and no state.

Every random number of a run is one word of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), whose key is `(seed, purpose)` and whose counter is `(block, position, step low, step high)`. The map from
(seed, purpose, step, position, block) to (key, counter) is injective, and Philox is a bijection of the counter under
each key, so no two numbers of a run ever share a block. Nothing here remembers anything: a resumed run, a run on any
number of processes and a run split into micro-batches ask for the same positions and get the same numbers.

What is guaranteed:

- `words`, `integers`, `uniform`: the same bits on every device and for every split of the positions.
- `normal`: likewise the same bits. The library functions log, sin and cos may differ in the last bit from one
  instruction set or device to the next, so they are not used: the transform is built of float64 additions,
  multiplications, divisions and square roots alone, which IEEE 754 fixes, and is rounded to float32 once at the end.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number is drawn for. A value is never used again for another purpose: it is part of the key."""

    ORDER = 0  # the permutation of an epoch: step = epoch, position = index in the data set
    FLIP = 1  # horizontal flips: position in the global batch
    TIMESTEP = 2  # diffusion timesteps: position in the global batch
    NOISE = 3  # noise added to the images: position in the global batch
    LABEL_DROPOUT = 4  # which labels are hidden: position in the global batch
    SAMPLE = 5  # sampling: step = sampling step (0 is the starting noise), position = image index
    DROPOUT = 6  # seeds of the dropout masks: position = the first of the micro-batch in the global batch
    SAMPLE_LABEL = 7  # labels asked for when sampling: position = image index
    INIT = 12  # seed of the network's first weights
    NOISE_IMAGES = 13  # images of pure noise that scoring tries its feature extractor on: position = image
    BATCH_NORM = 14  # images that batch-norm statistics are estimated on: step = batch, position in the batch


_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_Word: TypeAlias = "Tensor | int"


def _check(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be at least 0 and below {limit}, got {value}")


def _rounds(counter: Sequence[_Word], key: tuple[_Word, _Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four broadcastable words (int64 tensors or ints, each a uint32 value): four int64 tensors.

    The int64 product wraps modulo 2**64, so its two halves are exact once masked. Only words that are multiplied
    next need their upper half cleared, hence one mask per product and round. Words that do not vary along a dimension
    stay small until the rounds mix them.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _mix(p1, c1, k0), p1, _mix(p0, c3, k1), p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return tuple(torch.as_tensor(word & _MASK) for word in (c0, c1, c2, c3))  # type: ignore[return-value]


def _mix(product: _Word, word: _Word, key: _Word) -> _Word:
    """High half of `product`, xor `word`, xor `key`, as a uint32 value; in place once the result has its own memory."""
    mixed = (product >> 32) ^ word
    if isinstance(mixed, int):
        return (mixed ^ key) & _MASK
    mixed ^= key
    mixed &= _MASK
    return mixed


def _blocks(seed: int, purpose: int, step: int, positions: Tensor, num_blocks: int) -> tuple[Tensor, ...]:
    """The four words of `num_blocks` blocks per position: four int64 tensors `[n, num_blocks]`."""
    _check("seed", seed, 2**32)
    _check("step", step, 2**64)
    block = torch.arange(num_blocks, device=positions.device)[None, :]  # [1, num_blocks]
    counter = (block, positions[:, None], step & _MASK, step >> 32)
    return _rounds(counter, (seed, int(purpose)))


def _check_positions(positions: Tensor) -> None:
    """Check range and type. On an accelerator the range is the caller's promise: looking would wait for the device."""
    if positions.dtype != torch.int64 or positions.ndim != 1:
        raise ValueError(f"positions must be int64 with one dimension, got {positions.dtype} {list(positions.shape)}")
    if positions.device.type == "cpu" and len(positions):
        for extreme in positions.aminmax():
            _check("every position", int(extreme), 2**32)


def words(seed: int, purpose: int, step: int, positions: Tensor, num_words: int) -> Tensor:
    """`num_words` uint32 words per position, as int64 `[n, num_words]` on the positions' device.

    `positions` is int64 `[n]`, each in [0, 2**32); `seed` below 2**32, `step` below 2**64 (ValueError otherwise).
    """
    _check_positions(positions)
    num_blocks = -(-num_words // 4)
    blocks = torch.stack(_blocks(seed, purpose, step, positions, num_blocks), dim=-1)
    return blocks.reshape(len(positions), 4 * num_blocks)[:, :num_words]


_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # float64 bits of sqrt(1/2)
_BLOCKS_AT_ONCE = 1 << 14  # temporaries of 128 KiB each stay in a core's cache


def normal(seed: int, purpose: int, step: int, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 `[n, *shape]`, on the device of `positions` (int64 `[n]`).

    Box and Muller 1958 in float64, rounded once. Magnitudes reach sqrt(-2 ln 2^-33) = 6.76. Row i depends on
    (seed, purpose, step, positions[i], shape) alone, bit for bit on every device.
    """
    device = positions.device
    where = torch.device("cpu") if device.type == "mps" else device  # Metal has no float64
    size = math.prod(shape)
    num_blocks = -(-size // 4)
    _check_positions(positions)
    positions = positions.to(where, non_blocking=True)
    out = torch.empty(len(positions), num_blocks, 4, dtype=torch.float32, device=where)
    rows = max(1, _BLOCKS_AT_ONCE // max(1, num_blocks)) if where.type == "cpu" else max(1, len(positions))
    for start in range(0, len(positions), rows):
        w0, w1, w2, w3 = _blocks(seed, purpose, step, positions[start : start + rows], num_blocks)
        for pair, (radius_word, angle_word) in enumerate(((w0, w1), (w2, w3))):
            _box_muller(radius_word, angle_word, out[start : start + rows, :, 2 * pair : 2 * pair + 2])
    return out.reshape(len(positions), 4 * num_blocks)[:, :size].reshape(len(positions), *shape).to(device)


def _box_muller(radius_word: Tensor, angle_word: Tensor, out: Tensor) -> None:
    """Two words (int64 of uint32 values, `[...]`) to two normals, `out` `[..., 2]`. Uses both words' memory.

    The angle's sign bit turns the vector by half a turn; its other 31 bits give phi in (-pi/4, pi/4), and
    (cos 2 phi, sin 2 phi) = (1 - 2 sin^2 phi, 2 sin phi cos phi) needs one series and one square root, both well
    conditioned there.
    """
    radius = _minus_two_log(radius_word).sqrt_()
    radius.view(torch.int64).bitwise_or_((angle_word & 0x80000000) << 32)
    phi = angle_word.bitwise_and_(0x7FFFFFFF).to(torch.float64)
    phi.add_(0.5 - 2.0**30).mul_(math.pi * 2.0**-32)
    square = phi * phi
    sine = _horner(square, _SINE).mul_(phi)
    torch.mul(sine, sine, out=square)
    cosine = square.neg().add_(1.0).sqrt_()
    out[..., 0] = square.mul_(-2.0).add_(1.0).mul_(radius)
    out[..., 1] = sine.mul_(cosine).mul_(2.0).mul_(radius)


def _minus_two_log(word: Tensor) -> Tensor:
    """-2 ln((word + 1/2) / 2^32) as float64, positive. Uses `word`'s memory.

    The argument is m 2^e with m in [sqrt(1/2), sqrt 2), and ln m = 2 artanh((m - 1) / (m + 1)): no cancellation near 1.
    """
    mantissa = word.to(torch.float64).add_(0.5).mul_(2.0**-32)
    bits = mantissa.view(torch.int64)
    exponent = torch.sub(bits, _SQRT_HALF_BITS, out=word).bitwise_right_shift_(52)
    bits.sub_(exponent << 52)
    ratio = (mantissa - 1.0).div_(mantissa.add_(1.0))
    square = torch.mul(ratio, ratio, out=mantissa)
    logarithm = _horner(square, _ARTANH).mul_(ratio)
    return logarithm.mul_(-4.0).add_(exponent.to(torch.float64).mul_(-2.0 * math.log(2.0)))


# Taylor series in the square of the argument; what they leave out is below 1e-11, a thousandth of a float32's last bit.
_SINE = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(6))
_ARTANH = tuple(1 / (2 * k + 1) for k in range(7))


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial with these coefficients, constant term first, by separate products and sums (none fused)."""
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])


def uniform(seed: int, purpose: int, step: int, positions: Tensor) -> Tensor:
    """One number in [0, 1) per position, float64 `[n]`, a multiple of 2^-53."""
    w0, w1 = words(seed, purpose, step, positions, 2).unbind(-1)
    return ((w0 << 21) | (w1 >> 11)).to(torch.float64).mul_(2.0**-53)


def integers(seed: int, purpose: int, step: int, positions: Tensor, bound: int) -> Tensor:
    """One integer in [0, bound) per position, int64 `[n]`; 1 <= bound <= 2**31 (ValueError otherwise).

    The upper half of a 64-bit random number times `bound`: no value's probability is off by more than 2^-64.
    """
    if not 1 <= bound <= 2**31:
        raise ValueError(f"bound must be between 1 and 2**31, got {bound}")
    w0, w1 = words(seed, purpose, step, positions, 2).unbind(-1)
    return (w0 * bound + ((w1 * bound) >> 32)) >> 32


def seed_for(seed: int, purpose: int, step: int, position: int = 0) -> int:
    """A 63-bit seed for a generator that is not ours (dropout masks: `torch.manual_seed`)."""
    w0, w1 = (int(word) for word in words(seed, purpose, step, torch.tensor([position]), 2)[0])
    return (w0 << 31) | (w1 >> 1)
