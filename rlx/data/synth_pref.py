"""Preferences made up on the spot: a gold reward that is known exactly, and pairs labelled by it with noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import numpy as np

from rlx.data.formats import demonstration, turn
from rlx.envs.single import SingleTurn
from rlx.types import ConfigError, Episode, Message, Task, TaskSource

LETTERS = "abcdefghij"
WANTED = 3  # letters of a prompt
WANTED_PAYS, OTHER_COSTS, ROOM, OVER = 0.25, 0.5, 8, 0.5
LONGEST = ROOM + 1  # a demonstrator's answer: nearly all that is seen is short enough


def synth_pref(
    *,
    pairs: int = 2000,
    noise: float = 0.5,
    flip: float = 0.0,
    dev: int = 64,
    test: int = 150,
    test_pairs: int = 500,
    max_new_tokens: int = 14,
    data_seed: int = 0,
) -> TaskSource:
    """Three letters are asked for ("cab"), an answer is a word, and the gold reward counts letters and minds length.

    The gold reward, in units of its own, of a word of n letters, k of them asked for:
    k / 4 - (n - k) / 2 - max(0, n - 8) / 2. It is at most 2: eight letters, all asked for. The demonstrator writes 1 to 9
    letters, so nearly all that a learned reward sees is short enough: there, one more right letter is always better. A
    policy that follows it further writes on past the eighth letter, the learned reward goes on rising and the gold one falls.

    Splits: `train`, `dev`, `test` are prompts, all different; `demos` the training prompts with an answer of the
    demonstrator's, of any quality; `pairs` two of its answers to a training prompt, of which the better is chosen with
    probability sigmoid(difference of gold / noise) (noise=0: always); with probability `flip` the label is turned round
    after that. `chosen` are the chosen ones alone, as demonstrations. `test_pairs` are pairs of test prompts whose labels are
    right. meta of a pair: `gold_margin`, gold of the chosen minus gold of the rejected. The task's verifier is the gold
    reward. Everything is a function of the settings; `data_seed` draws it.

    Raises ConfigError: a setting out of range.
    """
    if min(pairs, test_pairs, dev, test) < 1 or noise < 0 or not 0 <= flip <= 1:
        raise ConfigError(
            f"expected pairs, test_pairs, dev and test of at least 1, noise of at least 0 and flip from 0 to 1, got {pairs}, "
            f"{test_pairs}, {dev}, {test}, {noise} and {flip}"
        )
    asked = ["".join(p) for p in permutations(LETTERS, WANTED)]
    if dev + test >= len(asked):
        raise ConfigError(f"dev {dev} and test {test} leave nothing to train on: there are {len(asked)} prompts")
    order = [asked[i] for i in np.random.default_rng(data_seed).permutation(len(asked))]
    held, train = order[: dev + test], order[dev + test :]
    draw: Callable[[int], np.random.Generator] = lambda i: np.random.default_rng([data_seed, i])  # noqa: E731
    labelled = partial(_pairs, train, pairs, noise, flip)
    return TaskSource(
        {
            "train": partial(_prompts, train),
            "dev": partial(_prompts, held[:dev]),
            "test": partial(_prompts, held[dev:]),
            "demos": lambda: _demonstrations(train, 2 * len(train), draw(1)),
            "pairs": lambda: labelled(draw(2)),
            "chosen": lambda: [row for row in labelled(draw(2)) if row.label == 1.0],
            "test_pairs": lambda: _pairs(held[dev:], test_pairs, 0.0, 0.0, draw(3)),
        },
        verifier=gold_reward,
        make_env=SingleTurn,
        max_new_tokens=max_new_tokens,
    )


def gold(asked: str, said: str) -> float:
    """The gold reward of a word (see `synth_pref`); white space does not count."""
    letters = [letter for letter in said if not letter.isspace()]
    wanted = sum(letter in asked for letter in letters)
    return WANTED_PAYS * wanted - OTHER_COSTS * (len(letters) - wanted) - OVER * max(0, len(letters) - ROOM)


def gold_reward(episodes: list[Episode]) -> list[float]:
    """The gold reward of each episode."""
    return [gold(episode.task.prompt[-1].text, episode.completion) for episode in episodes]


# --------------------------------------------------------------------------- rows
def _prompts(asked: list[str]) -> list[Episode]:
    return [Episode(Task((Message("user", text),)), group) for group, text in enumerate(asked)]


def _word(asked: str, draw: np.random.Generator) -> str:
    """One answer of the demonstrator's: of any length it writes, each letter asked for with a chance of its own."""
    care, rest = draw.uniform(0.2, 1.0), [letter for letter in LETTERS if letter not in asked]
    size = int(draw.integers(1, LONGEST + 1))
    return "".join(str(draw.choice(list(asked) if draw.random() < care else rest)) for _ in range(size))


def _demonstrations(asked: list[str], count: int, draw: np.random.Generator) -> list[Episode]:
    words = [asked[i % len(asked)] for i in range(count)]
    return [demonstration(Task((Message("user", x),)), i, [turn(_word(x, draw))]) for i, x in enumerate(words)]


def _pairs(asked: list[str], count: int, noise: float, flip: float, draw: np.random.Generator) -> list[Episode]:
    """Pairs of answers whose gold rewards differ, each two rows of a group."""
    rows: list[Episode] = []
    while len(rows) < 2 * count:
        text = asked[len(rows) // 2 % len(asked)]
        first, second = _word(text, draw), _word(text, draw)
        gap = gold(text, first) - gold(text, second)
        if gap == 0:
            continue
        wins = gap > 0 if noise == 0 else draw.random() < 1 / (1 + np.exp(-gap / noise))
        wins = bool(wins) != (draw.random() < flip)
        chosen, rejected = (first, second) if wins else (second, first)
        task = Task((Message("user", text),), meta={"gold_margin": gap if wins else -gap})
        rows += [demonstration(task, len(rows) // 2, [turn(x)], y) for x, y in ((chosen, 1.0), (rejected, -1.0))]
    return rows


# --------------------------------------------------------------------------- a judge
JUDGED = re.compile(
    r"\[Conversation\]\n(.*?)\n\n\[The start of answer A\]\n(.*)\n\[The end of answer A\]\n\n"
    r"\[The start of answer B\]\n(.*)\n\[The end of answer B\]",
    re.DOTALL,
)


def synth_judge(
    conversations: Sequence[Sequence[Message]],
    *,
    noise: float = 0.3,
    place: float = 0.3,
    length: float = 0.0,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    """A stand-in for a model that judges: the gold reward with errors, asked as the reward `judge` asks.

    It prefers answer A where gold(A) - gold(B) + `place` + `length` (letters of A - letters of B) + e is positive, e normal
    with standard deviation `noise`: `place` is its bias for the answer that it reads first, `length` for the longer one. e
    depends on the question, its number among the `n` and `seed` alone. `temperature` and `max_new_tokens` change nothing.

    Raises ConfigError: something else was asked.
    """
    found = []
    for talk in conversations:
        match = JUDGED.search(talk[-1].text)
        if match is None:
            raise ConfigError("llm synth_judge: it answers the question of the reward `judge` alone")
        asked, a, b = match.groups()
        gap = gold(asked, a) - gold(asked, b) + place + length * (len(a) - len(b))
        text = [*talk[-1].text.encode(), seed]
        errors = np.random.default_rng(text).normal(0.0, noise, n)
        found.append(["[[A]]" if gap + e > 0 else "[[B]]" for e in errors])
    return found
