"""Chains of letters, made up on the spot: each letter follows from the one before it, and only a whole chain counts."""

from __future__ import annotations

import string
from dataclasses import replace
from functools import partial

import numpy as np

from rlx.data.formats import demonstration, turn
from rlx.envs.single import SingleTurn
from rlx.rewards.rules import answer_match
from rlx.types import ConfigError, Episode, Message, Status, Task, TaskSource


def letter_chain(
    *,
    letters: int = 12,
    stride: int = 5,
    length: int = 12,
    noise: float = 0.7,
    guide_noise: float = 0.25,
    demos: int = 4096,
    train: int = 4096,
    data_seed: int = 0,
) -> TaskSource:
    """The prompt is a letter; the answer is `length` letters, each `stride` places after the one before it, around a circle.

    With 12 letters and a stride of 5, "a" asks for "fkdi...". Nothing is paid for a part of the chain: an answer is right
    if all its letters are, and the number of letters, so chance finds one in letters^length. `demos` and `guide_demos` hold
    `demos` answers each, in which a letter is drawn from all with probability `noise` (`guide_noise`), and else follows from
    the letter before it, whatever that is: imitation of them is right with (1 - noise + noise / letters)^length. `train` has
    `train` random first letters; `dev` and `test` have each letter once: there are no other
    prompts, so they are the same. Everything is a function of the settings.

    Raises ConfigError: a setting out of range.
    """
    if not 2 <= letters <= 26 or not 1 <= stride < letters:
        raise ConfigError(f"letter_chain: expected 2 to 26 letters and a stride below that, got {letters} and {stride}")
    if not (0.0 <= noise <= 1.0 and 0.0 <= guide_noise <= 1.0):
        raise ConfigError(f"letter_chain: noise is a probability from 0 to 1, got {noise} and {guide_noise}")
    if min(length, demos, train) < 1:
        raise ConfigError(f"letter_chain: expected a length, demos and train of at least 1, got {length}, {demos}, {train}")
    rule = [(i + stride) % letters for i in range(letters)]
    return TaskSource(
        {
            "demos": partial(_demonstrations, rule, length, noise, demos, (data_seed, 0)),
            "guide_demos": partial(_demonstrations, rule, length, guide_noise, demos, (data_seed, 1)),
            "train": partial(_questions, rule, length, _drawn(letters, train, (data_seed, 2))),
            "dev": partial(_questions, rule, length, list(range(letters))),
            "test": partial(_questions, rule, length, list(range(letters))),
        },
        verifier=partial(answer_match, extract="whole"),
        make_env=SingleTurn,
        max_new_tokens=length,
    )


def _drawn(letters: int, n: int, seed: tuple[int, ...]) -> list[int]:
    """First letters by chance."""
    return [int(x) for x in np.random.default_rng(seed).integers(letters, size=n)]


def _text(chain: list[int]) -> str:
    return "".join(string.ascii_lowercase[i] for i in chain)


def _task(rule: list[int], length: int, first: int) -> Task:
    chain = [first]
    for _ in range(length):
        chain.append(rule[chain[-1]])
    return Task((Message("user", _text(chain[:1])),), _text(chain[1:]))


def _questions(rule: list[int], length: int, firsts: list[int]) -> list[Episode]:
    return [Episode(_task(rule, length, first), group) for group, first in enumerate(firsts)]


def _demonstrations(rule: list[int], length: int, noise: float, n: int, seed: tuple[int, ...]) -> list[Episode]:
    rng = np.random.default_rng(seed)
    firsts = rng.integers(len(rule), size=n)
    stray = rng.random((n, length)) < noise
    others = rng.integers(len(rule), size=(n, length))
    made = []
    for group in range(n):
        chain = [int(firsts[group])]
        for t in range(length):
            chain.append(int(others[group, t] if stray[group, t] else rule[chain[-1]]))
        made.append(
            replace(demonstration(_task(rule, length, chain[0]), group, [turn(_text(chain[1:]))]), status=Status.TRUNCATED)
        )
    return made
