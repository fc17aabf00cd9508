"""Dropout whose mask is a function of a seed and a place: nothing is stored, and every implementation drops alike.

The random bits are those of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
function of a 128-bit counter and a 64-bit key. The key is the seed. The eight halves of the four words at one counter
serve eight columns that lie 8 apart, as one thread of a matrix unit holds them:

    counter (row, 8 (column // 64) + column % 8, stream, 0)      half (column // 8) % 8, low halves first
    kept where half >= round(65536 rate)

So the mask of a row depends neither on the number of rows and columns nor on how a kernel cuts them. What is kept is
scaled by the inverse of the exact probability, 1 - round(65536 rate) / 65536. `dropout_kernels` is the same in Triton.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HALF = 1 << 16
"""Values a half of a random word can take: the rate is rounded to a multiple of its inverse."""
_WORD = (1 << 32) - 1
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_RAISES = 0x9E3779B9, 0xBB67AE85


def threshold(rate: float) -> int:
    """What a half must reach to be kept; 0 drops nothing.

    Raises:
        ValueError: the rate is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {rate}")
    return min(round(rate * HALF), HALF - 1)


def draw_seed(rate: float, device: torch.device) -> Tensor | None:
    """A seed from torch's generator of the device, int64 []; None where nothing is dropped."""
    return torch.randint(2**62, (), device=device) if threshold(rate) else None


def check_seed(seed: Tensor | None, name: str, x: Tensor) -> None:
    """Refuse a seed that an op with dropout on `x`, called `name`, cannot use.

    Raises:
        ValueError: it is missing, of another dtype or shape, or on another device.
    """
    if seed is None or seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device:
        got = "None" if seed is None else f"{seed.dtype} {list(seed.shape)} on {seed.device}"
        raise ValueError(
            f"dropout needs a seed, an int64 tensor [] on the device of {name}, {x.device}; got {got}: "
            "make one with chela.ops.dropout.draw_seed"
        )


def scale(rate: float) -> float:
    """What is kept is multiplied by this, so that the expectation stays as it was."""
    return HALF / (HALF - threshold(rate))


def dropout(x: Float[Tensor, "... n"], seed: Int[Tensor, ""], rate: float, *, stream: int = 0) -> Tensor:
    """Set entries of `x` to zero with probability `rate` and scale the others.

    Args:
        x: [..., N]; the mask's rows are numbered along all axes but the last.
        seed: int64 [], on the device of x, where `torch.randint` makes one.
        rate: probability, rounded to a multiple of 2^-16.
        stream: which of the independent masks of a seed, 0 to 2^32 - 1.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: the rate is not in [0, 1).
    """
    if not threshold(rate):
        return x
    kept = keep(seed, x.shape[:-1].numel(), x.shape[-1], rate, stream=stream).view(x.shape)
    return x * scale(rate) * kept


def keep(
    seed: Int[Tensor, ""], rows: int, columns: int, rate: float, *, stream: int = 0
) -> Bool[Tensor, "rows columns"]:
    """Say which entries are kept; arguments as in `dropout`."""
    groups = -(-columns // 64)
    row, column = torch.arange(rows, device=seed.device), torch.arange(groups * 8, device=seed.device)
    nothing = torch.zeros_like(column)
    words = philox((row[:, None], column, nothing + stream, nothing), seed)
    halves = torch.stack([half for word in words for half in (word & (HALF - 1), word >> 16)], dim=1)
    halves = halves.view(rows, 8, groups, 8).transpose(1, 2).reshape(rows, groups * 64)
    return halves[:, :columns] >= threshold(rate)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words for each counter of four words and each key of 64 bits; all tensors int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _RAISES[0] & _WORD, k1 + _RAISES[1] & _WORD
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two words, by halves of b: int64 would overflow."""
    low, high = a * (b & (HALF - 1)), a * (b >> 16)
    return high + (low >> 16) >> 16, low + ((high & (HALF - 1)) << 16) & _WORD
