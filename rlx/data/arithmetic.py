"""Addition, made up on the spot: a task that a small model learns in minutes, with a demonstrator that errs at will."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np

from rlx.data.formats import demonstration, turn
from rlx.envs.single import SingleTurn
from rlx.rewards.rules import answer_match
from rlx.types import ConfigError, Episode, Message, Task, TaskSource

Pair = tuple[int, int]

ENUMERATED = 2  # up to so many digits every problem exists; beyond, problems are drawn
DRAWN_PAIRS = 10_000


def arithmetic(
    *,
    digits: int = 2,
    operation: Literal["add"] = "add",
    error_rate: float = 0.0,
    filler: int = 0,
    demos: int | None = None,
    dev: int = 200,
    test: int = 500,
    data_seed: int = 0,
) -> TaskSource:
    """Sums of two numbers of at most `digits` digits: prompt "57+68=", answer "125".

    All operands in [0, 10^digits) for one and two digits; 10 000 random unordered pairs for more. Problems are split by
    unordered pair: a+b and b+a never stand in different splits. `dev` and `test` count problems, one order of a pair
    each; `train` holds both orders of all other pairs, shuffled. The split `demos` has one demonstration for each
    training problem (the first `demos` of them): the digits of the sum, but with probability `error_rate` on problems
    with a carry, every carry dropped (`drop_carries`). meta: `carry`, and in demonstrations `correct`.
    With `filler`, a demonstration goes on after its answer for up to so many dots (0 to `filler`, equally likely), which
    never help: length without a reason. Everything is a function of the settings; `data_seed` draws splits and errors.

    Raises ConfigError: a setting out of range.
    """
    if not 1 <= digits <= 9:
        raise ConfigError(f"digits: expected 1 to 9, got {digits}")
    if not 0.0 <= error_rate <= 1.0:
        raise ConfigError(f"error_rate: expected a probability from 0 to 1, got {error_rate}")
    if error_rate > 0 and digits == 1:
        raise ConfigError("error_rate: sums of one digit have no carry to drop; set task.digits to 2 or more")
    if min(dev, test) < 0 or (demos is not None and demos < 1):
        raise ConfigError(f"expected dev and test of at least 0 and demos of at least 1, got {dev}, {test}, {demos}")
    problems = split_problems(digits, dev, test, data_seed)
    return TaskSource(
        {
            "demos": partial(_demonstrations, problems["train"], error_rate, filler, demos, data_seed),
            **{split: partial(_questions, pairs) for split, pairs in problems.items()},
        },
        verifier=partial(answer_match, extract="last_number" if filler else "whole"),
        make_env=SingleTurn,
        max_new_tokens=digits + 4 + 2 * filler,  # the sum's digits and the end of text, and room to go on for too long
    )


def split_problems(digits: int, dev: int, test: int, data_seed: int) -> dict[str, list[Pair]]:
    """Problems (a, b) of the splits train, dev and test, with no unordered pair in two of them.

    Raises ConfigError: dev and test leave nothing to train on. AssertionError: the splits overlap.
    """
    rng = np.random.default_rng(data_seed)
    pairs = _unordered_pairs(digits, rng)
    if dev + test >= len(pairs):
        raise ConfigError(
            f"dev {dev} and test {test} leave nothing to train on: there are {len(pairs)} unordered pairs of "
            f"{digits}-digit numbers; lower task.dev and task.test or raise task.digits"
        )
    shuffled = [pairs[i] for i in rng.permutation(len(pairs))]
    flipped = rng.random(dev + test) < 0.5
    held_out = [(b, a) if flip else (a, b) for (a, b), flip in zip(shuffled, flipped, strict=False)]
    both_orders = sorted({order for a, b in shuffled[dev + test :] for order in ((a, b), (b, a))})
    train = [both_orders[i] for i in rng.permutation(len(both_orders))]
    splits = {"train": train, "dev": held_out[:dev], "test": held_out[dev:]}
    check_disjoint(splits)
    return splits


def _unordered_pairs(digits: int, rng: np.random.Generator) -> list[Pair]:
    """All pairs a <= b below 10^digits, or DRAWN_PAIRS distinct ones (of operands that are uniform)."""
    below = 10**digits
    if digits <= ENUMERATED:
        return [(a, b) for a in range(below) for b in range(a, below)]
    drawn = np.sort(rng.integers(below, size=(2 * DRAWN_PAIRS, 2)), axis=1).tolist()
    return list(dict.fromkeys((a, b) for a, b in drawn))[:DRAWN_PAIRS]


def check_disjoint(splits: Mapping[str, list[Pair]]) -> None:
    """Raise AssertionError if an unordered pair stands in two splits."""
    seen: dict[Pair, str] = {}
    for split, pairs in splits.items():
        for a, b in pairs:
            pair = (min(a, b), max(a, b))
            if seen.setdefault(pair, split) != split:
                raise AssertionError(f"{a}+{b} stands in {seen[pair]} and in {split}")


def drop_carries(a: int, b: int) -> int:
    """Add column by column modulo 10, forgetting every carry, but write the leading column's sum in full.

    57 + 68: 7 + 8 = 15, write 5 and forget the carry; 5 + 6 = 11, written in full: 115. Equal to a + b exactly where no
    column but the leading one carries.
    """
    total, unit = 0, 1
    while max(a, b) >= 10:
        total += (a + b) % 10 * unit
        a, b, unit = a // 10, b // 10, unit * 10
    return total + (a + b) * unit


def _task(a: int, b: int, **meta: bool) -> Task:
    carry = drop_carries(a, b) != a + b
    return Task((Message("user", f"{a}+{b}="),), str(a + b), {"carry": carry, **meta})


def _questions(pairs: list[Pair]) -> list[Episode]:
    return [Episode(_task(a, b), group) for group, (a, b) in enumerate(pairs)]


def _demonstrations(pairs: list[Pair], error_rate: float, filler: int, limit: int | None, data_seed: int) -> list[Episode]:
    errs = np.random.default_rng([data_seed, 1]).random(len(pairs)) < error_rate
    dots = np.random.default_rng([data_seed, 2]).integers(filler + 1, size=len(pairs))
    made = []
    for group, ((a, b), err, extra) in enumerate(zip(pairs[:limit], errs, dots, strict=False)):
        written = drop_carries(a, b) if err else a + b
        said = turn(str(written) + "." * int(extra))
        made.append(demonstration(_task(a, b, correct=written == a + b), group, [said]))
    return made
