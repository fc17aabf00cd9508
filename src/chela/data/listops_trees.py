"""ListOps expressions: the symbols, the evaluator, and the generator (Nangia and Bowman 2018; Tay et al. 2021).

A tree is a byte string of token ids: digit d is d + 1, then the operators, then the closing bracket; 0 is padding.
"""

import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
"""Operators that are drawn; published files hold no others, but the evaluator also knows [FIRST and [LAST."""
SYMBOLS = ("<pad>", *map(str, range(10)), *OPERATORS, "]")
"""Symbol of each token id."""
IDS = {symbol: number for number, symbol in enumerate(SYMBOLS)}
CLOSE = IDS["]"]
FIRST_OPERATOR = IDS[OPERATORS[0]]
MAX_DEPTH, MAX_ARGUMENTS, OPERATOR_SHARE = 10, 10, 0.25
BLOCKS = 64
"""Independent random streams; fixed, so that the trees do not depend on the number of processes."""


def median(values: Sequence[int]) -> int:
    """Median cut to an integer; of an even number of values, the mean of the two in the middle."""
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2


EVALUATE: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": median,
    "[SM": lambda values: sum(values) % 10,
    "[FIRST": lambda values: values[0],
    "[LAST": lambda values: values[-1],
}


def evaluate(symbols: Sequence[str]) -> int:
    """Value of an expression, 0..9.

    Args:
        symbols: "[MAX", "3", "]", ...; no parentheses.

    Raises:
        ValueError: unknown symbol, unbalanced brackets, an operator without arguments.
    """
    stack: list[tuple[str, list[int]]] = []
    value: int | None = None
    for symbol in symbols:
        if value is not None and not stack:
            raise ValueError(f"{symbol!r} comes after the end of the expression")
        if symbol in EVALUATE:
            stack.append((symbol, []))
            continue
        if symbol == "]":
            if not stack or not stack[-1][1]:
                raise ValueError("a closing bracket without an operator and its arguments")
            operator, arguments = stack.pop()
            value = EVALUATE[operator](arguments)
        elif len(symbol) == 1 and symbol.isdigit():
            value = int(symbol)
        else:
            raise ValueError(f"unknown symbol {symbol!r}")
        if stack:
            stack[-1][1].append(value)
    if stack or value is None:
        raise ValueError("the expression is cut off")
    return value


class _TooLong(Exception):
    pass


def draw(uniform: Callable[[], float], longest: int) -> tuple[bytes, int] | None:
    """Draw one tree as LRA's generator does; None once it is longer than `longest`.

    A node above depth 10 is an operator with probability 1/4, else a digit; an operator has 2 to 10 arguments.

    Args:
        uniform: gives numbers in [0, 1); the only source of randomness.
        longest: tokens at most.

    Returns:
        Token ids and value.
    """
    out = bytearray()

    def node(depth: int) -> int:
        if depth == MAX_DEPTH or uniform() > OPERATOR_SHARE:
            digit = int(uniform() * 10)
            out.append(digit + 1)
            return digit
        place = len(out)
        out.append(0)
        if place >= longest:
            raise _TooLong
        values = [node(depth + 1) for _ in range(2 + int(uniform() * (MAX_ARGUMENTS - 1)))]
        operator = int(uniform() * len(OPERATORS))
        out[place] = FIRST_OPERATOR + operator
        out.append(CLOSE)
        return EVALUATE[OPERATORS[operator]](values)

    try:
        value = node(1)
    except _TooLong:
        return None
    return (bytes(out), value) if len(out) <= longest else None


def trees_of(seed: int, block: int, shorter: int, longer: int) -> Iterator[tuple[bytes, int]]:
    """Endless trees of one stream with shorter < length < longer."""
    uniform = random.Random(seed * BLOCKS + block).random  # the one method whose stream Python promises to keep
    while True:
        tree = draw(uniform, longer - 1)
        if tree is not None and len(tree[0]) > shorter:
            yield tree


def generate(
    count: int, *, seed: int, shorter: int, longer: int, processes: int, progress: Callable[[str], None] | None = None
) -> list[tuple[bytes, int]]:
    """Draw distinct trees with shorter < length < longer.

    Args:
        count: how many.
        seed: the trees are a function of it, of count and of the limits, on any machine.
        shorter: lengths are above this.
        longer: lengths are below this.
        processes: how many work at once.
        progress: told now and then.

    Returns:
        (token ids, value), in the order they are kept.

    Raises:
        ValueError: there are not as many distinct trees within the limits.
    """
    share = -(-count // BLOCKS)
    jobs = [(seed, block, shorter, longer, share) for block in range(BLOCKS)]
    seen: dict[bytes, int] = {}
    if processes > 1 and count * longer >= 1_000_000:  # below, starting processes takes longer than the work
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            _collect(pool.imap(_block, jobs), seen, count, progress)
    else:
        _collect(map(_block, jobs), seen, count, progress)
    spare = trees_of(seed, BLOCKS, shorter, longer)  # makes up for duplicates between blocks
    misses = 0
    while len(seen) < count:
        tree, value = next(spare)
        misses = misses + 1 if tree in seen else 0
        if misses > 100_000:
            raise ValueError(f"there are fewer than {count} distinct trees of {shorter + 1} to {longer - 1} tokens")
        seen[tree] = value
    return list(seen.items())[:count]


def _block(job: tuple[int, int, int, int, int]) -> list[tuple[bytes, int]]:
    seed, block, shorter, longer, share = job
    stream = trees_of(seed, block, shorter, longer)
    return [next(stream) for _ in range(share)]


def _collect(
    blocks: Iterator[list[tuple[bytes, int]]],
    seen: dict[bytes, int],
    count: int,
    progress: Callable[[str], None] | None,
) -> None:
    for number, block in enumerate(blocks, 1):
        seen.update(block)
        if progress and number % 8 == 0:
            progress(f"listops: {min(len(seen), count):,} of {count:,} trees")
