"""Doubling on a dial of ten: questions of eight levels for a policy that proposes, solves and judges them (see roles.py).

A question is "348.....", eight places wide; its answer is each number doubled, modulo 10: "686". The level is how many
numbers there are, 1 to 8. What is not of this form cannot be answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from rlx.data.formats import demonstration, turn
from rlx.data.roles import LETTERS, score, tagged
from rlx.envs.single import SingleTurn
from rlx.types import ConfigError, Episode, Message, Task, TaskSource

LEVELS = 8
HIGH, LOW = 9, 2  # the marks of what is right, and of what is not


def clock_doubles(
    *,
    expert: int = 3,
    error_rate: float = 0.6,
    invalid: float = 0.4,
    demos: int = 8000,
    held_out: list[int] | None = None,
    seeds: int = 200,
    dev: int = 200,
    test: int = 400,
    data_seed: int = 0,
) -> TaskSource:
    """Questions, and demonstrations of the three roles.

    `demos`: half of them solve questions of all levels: without fault up to level `expert`, beyond it each double that passes
    10 is 9 with probability `error_rate`. A quarter propose questions of uniform level (near the level of a reference, in
    half of them), a share `invalid` of which lacks a number. A quarter judge, without fault. `train`: `seeds` questions of
    levels 1 to `expert`, to begin with. `dev` and `test`: questions of the levels `held_out` (default: 4 to 6), in no other
    split. `proposals` asks for `dev` questions, `verdicts` for `dev` marks of answers. Verifier: 1 for a right answer, a
    question that can be answered, a mark on the right side of 5.5.

    Raises ConfigError: a setting out of range.
    """
    if not 1 <= expert <= LEVELS or not (0 <= error_rate <= 1 and 0 <= invalid <= 1):
        raise ConfigError(f"expected expert of 1 to {LEVELS} and shares of 0 to 1, got {expert}, {error_rate}, {invalid}")
    held_out = held_out or [4, 6]
    if len(held_out) != 2 or not 3 < held_out[0] <= held_out[1] <= LEVELS:
        raise ConfigError(f"held_out: expected two levels from 4 to {LEVELS}, got {held_out}")
    rng = np.random.default_rng(data_seed)
    low, high = held_out
    kept: dict[str, None] = {}
    while len(kept) < dev + test:
        kept[drawn(rng, int(rng.integers(low, high + 1)))] = None
    tests = list(kept)
    return TaskSource(
        {
            "demos": partial(_demonstrations, expert, error_rate, invalid, demos, frozenset(tests), data_seed),
            "train": partial(_seeds, seeds, expert, data_seed),
            "dev": partial(_asked, tests[:dev]),
            "test": partial(_asked, tests[dev:]),
            "proposals": partial(_proposals, dev),
            "verdicts": partial(_verdicts, tests[:dev], data_seed),
        },
        verifier=verifier,
        make_env=SingleTurn,
        max_new_tokens=28,
    )


def level(question: str | None) -> int | None:
    """How many numbers there are, 1 to 8; None for what cannot be answered."""
    if question is None or len(question) != LEVELS:
        return None
    numbers = question.rstrip(".")
    return len(numbers) if numbers and set(numbers) <= set("0123456789") else None


def solution(question: str) -> str:
    """Each number doubled, modulo 10: "348....." -> "686"."""
    return _doubled(question, lambda double: double % 10)


def right(question: str, answer: str | None) -> bool:
    """Whether the question can be answered, and this is its answer."""
    return level(question) is not None and answer == solution(question)


def drawn(rng: np.random.Generator, numbers: int) -> str:
    """A question of so many numbers."""
    return "".join(map(str, rng.integers(10, size=numbers).tolist())).ljust(LEVELS, ".")


# --------------------------------------------------------------------------- what scores
def verifier(episodes: list[Episode]) -> list[float]:
    """1 where the policy did well in the role that the task asks of it: solver, proposer or judge."""
    return [float(_well(e.completion, e.task)) for e in episodes]


def clock_level(episodes: list[Episode]) -> list[float]:
    """The level of the question that an episode proposes; nan for one that cannot be answered."""
    found = [level(tagged(e.completion, LETTERS.question)) for e in episodes]
    return [float("nan") if numbers is None else float(numbers) for numbers in found]


def clock_judge(
    conversations: Sequence[Sequence[Message]],
    *,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    """An exact checker that answers as a judge would: 9 for what is right, 2 for what is not."""
    return [[_mark(_checked(talk[-1].text))] * n for talk in conversations]


def _checked(prompt: str) -> bool:
    rest = prompt[2:]
    if prompt.startswith(LETTERS.rate_question[:2]):
        return level(rest) is not None
    question, _, answer = rest.partition("=")
    return right(question, answer)


def _well(text: str, task: Task) -> bool:
    if task.meta["role"] == "solver":
        return right(task.meta["question"], tagged(text, LETTERS.answer))
    if task.meta["role"] == "proposer":
        return level(tagged(text, LETTERS.question)) is not None
    mark = score(text, LETTERS.score)
    return mark is not None and (mark > 0.5) == (task.answer == "right")


# --------------------------------------------------------------------------- rows
def _task(role: str, prompt: str, answer: str | None = None, question: str = "") -> Task:
    return Task((Message("user", prompt),), answer, {"role": role, "question": question})


def _asked(questions: Sequence[str]) -> list[Episode]:
    tasks = [_task("solver", LETTERS.solve.format(question=q), solution(q), q) for q in questions]
    return [Episode(task, group) for group, task in enumerate(tasks)]


def _seeds(count: int, expert: int, data_seed: int) -> list[Episode]:
    rng = np.random.default_rng([data_seed, 1])
    return _asked([drawn(rng, int(rng.integers(1, expert + 1))) for _ in range(count)])


def _proposals(count: int) -> list[Episode]:
    return [Episode(_task("proposer", LETTERS.propose), group) for group in range(count)]


def _verdicts(questions: Sequence[str], data_seed: int) -> list[Episode]:
    rng = np.random.default_rng([data_seed, 2])
    rows = []
    for group, question in enumerate(questions):
        prompt, good = _judged(question, rng)
        rows.append(Episode(_task("judge", prompt, "right" if good else "wrong"), group))
    return rows


def _judged(question: str, rng: np.random.Generator) -> tuple[str, bool]:
    """A judge's prompt on a right or a wrong answer, equally likely: wrong as the demonstrator errs, else in one number."""
    answer = solution(question)
    if rng.random() < 0.5:
        wrong = _doubled(question, lambda double: 9 if double > 9 and rng.random() < 0.5 else double % 10)
        at = int(rng.integers(len(answer)))
        other = answer[:at] + str((int(answer[at]) + int(rng.integers(1, 10))) % 10) + answer[at + 1 :]
        answer = wrong if wrong != answer else other
    return LETTERS.rate_answer.format(question=question, answer=answer), right(question, answer)


def _demonstrations(
    expert: int, error_rate: float, invalid: float, count: int, tests: frozenset[str], data_seed: int
) -> list[Episode]:
    rng = np.random.default_rng([data_seed, 3])
    made = []
    for group in range(count):
        numbers = int(rng.integers(1, LEVELS + 1))
        question = drawn(rng, numbers)
        while question in tests:
            question = drawn(rng, numbers)
        errs = error_rate if numbers > expert else 0.0
        task, text = (_solved, _solved, _proposed, _rated)[group % 4](question, rng, errs, invalid)
        made.append(demonstration(task, group, [turn(text)]))
    return made


def _solved(question: str, rng: np.random.Generator, errs: float, invalid: float) -> tuple[Task, str]:
    answer = _doubled(question, lambda double: 9 if double > 9 and rng.random() < errs else double % 10)
    return _task("solver", LETTERS.solve.format(question=question), None, question), f"<a>{answer}</a>"


def _proposed(question: str, rng: np.random.Generator, errs: float, invalid: float) -> tuple[Task, str]:
    near = min(LEVELS, max(1, len(question.rstrip(".")) + int(rng.integers(-1, 2))))
    prompt = LETTERS.refer.format(question=drawn(rng, near)) if rng.random() < 0.5 else LETTERS.propose
    return _task("proposer", prompt), f"<q>{_broken(question, rng) if rng.random() < invalid else question}</q>"


def _rated(question: str, rng: np.random.Generator, errs: float, invalid: float) -> tuple[Task, str]:
    if rng.random() < 0.5:
        prompt, good = _judged(question, rng)
    else:
        good = bool(rng.random() < 0.5)
        prompt = LETTERS.rate_question.format(question=question if good else _broken(question, rng))
    return _task("judge", prompt), _mark(good)


def _broken(question: str, rng: np.random.Generator) -> str:
    """The question without one of its numbers, none but the last where there are several."""
    at = int(rng.integers(max(1, len(question.rstrip(".")) - 1)))
    return question[:at] + "." + question[at + 1 :]


def _mark(good: bool) -> str:
    return f"<{LETTERS.score}>{HIGH if good else LOW}</{LETTERS.score}>"


def _doubled(question: str, rule: Callable[[int], int]) -> str:
    return "".join(str(rule(2 * int(number))) for number in question.rstrip("."))
