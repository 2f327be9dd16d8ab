r"""Rewards that need no model: is the answer right, is the form right, is it too long."""

from __future__ import annotations

import functools
import re
from typing import Literal

from rlx.rewards import answers
from rlx.rewards.pool import pooled
from rlx.types import ConfigError, DataError, Episode

ANSWER_LAST = r".*(####\s*[-+]?\$?[0-9][0-9.,/]*%?|\\boxed\{[^\n]{1,400}\}[.$\s]*)"


def verifier(episodes: list[Episode]) -> list[float]:
    """What the recipe's task says of an answer, in training as in its test: 1 where it is right, else 0.

    plan() puts the task's own verifier in this place. Raises ConfigError: without a task there is none.
    """
    raise ConfigError("the recipe has no task, so it has no verifier")


@functools.cache
def math_verify() -> None:
    """Import what compares formulas, with what it loads when it is first used."""
    from rlx.rewards.latex import same_math

    same_math("x+1", "1+x")


@pooled(math_verify, method="math_verify")
def answer_match(
    episodes: list[Episode],
    *,
    extract: Literal["auto", "boxed", "hash", "last_number", "whole"] = "auto",
    method: Literal["exact", "math_verify"] = "exact",
    timeout: float = 2.0,
    after: str | None = None,
) -> list[float]:
    r"""1 where the completion's final answer equals the task's, else 0; nan where the comparison ran out of time.

    extract: how the final answer is found, see `answers.extract`. method: `exact` compares numbers as fractions and all
    else as text; `math_verify` asks the package of that name, too, where those differ (LaTeX, sets, algebra).
    timeout: seconds of wall clock for an answer, with `math_verify`, which works in a worker process. after: a heading; only
    the first line after its last occurrence is read, and the whole completion where there is none. Raises DataError if a task
    has no answer.
    """

    def score(episode: Episode) -> float:
        gold, said = _gold(episode), answers.extract(_told(episode.completion, after), extract)
        return 0.0 if said is None else float(_same(gold, said, method))

    return [score(episode) for episode in episodes]


def _told(completion: str, after: str | None) -> str:
    if after is None or after not in completion:
        return completion
    lines = completion.rpartition(after)[2].strip().splitlines()
    return lines[0] if lines else ""


def _gold(episode: Episode) -> str:
    if episode.task.answer is None or not str(episode.task.answer).strip():
        prompt = episode.task.prompt[-1].text if episode.task.prompt else ""
        raise DataError(
            f"reward answer_match: the task {prompt[:60]!r} (group {episode.group}) has no answer; "
            "the data need a column 'answer', or columns: {answer: ITS NAME}"
        )
    return answers.extract_gold(episode.task.answer)


def _same(gold: str, said: str, method: str) -> bool:
    same = answers.same_answer(gold, said)
    if same or method == "exact":
        return same
    from rlx.rewards.latex import same_math

    return same_math(gold, said)


def format(episodes: list[Episode], *, pattern: str = ANSWER_LAST) -> list[float]:
    r"""1 where the completion has the form of `pattern`, else 0.

    pattern: a regular expression that has to match all of the completion, stripped of white space at both ends; `.`
    matches a new line, too. By default the completion has to end in `#### NUMBER` or in `\boxed{...}`. A pattern with
    nested repetition can take exponential time: it is the recipe's own and is not limited. Raises ConfigError if it is
    no regular expression.
    """
    try:
        form = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"reward format: pattern {pattern!r} is no regular expression: {error}") from None
    return [float(form.fullmatch(episode.completion.strip()) is not None) for episode in episodes]


def soft_overlong(episodes: list[Episode], *, limit: int | None = None, budget: int) -> list[float]:
    """0 up to L - c tokens, then (L - c - n) / c, and -1 past L (DAPO, Yu et al. 2025, eq. 13).

    n: tokens of the completion. limit: L, in tokens; by default the stage's max_new_tokens. budget: c, the tokens
    before the limit over which the penalty grows. Raises ConfigError unless 0 < budget <= limit.
    """
    return [_overlong(episode.num_tokens, _limit(episode) if limit is None else limit, budget) for episode in episodes]


def _limit(episode: Episode) -> int:
    limit = episode.info.get("max_new_tokens")
    if limit is None:
        raise DataError(
            "reward soft_overlong: the episodes do not say at how many tokens they were cut (info: max_new_tokens); "
            "set its limit"
        )
    return int(limit)


def _overlong(num_tokens: int, limit: int, budget: int) -> float:
    if not 0 < budget <= limit:
        raise ConfigError(f"reward soft_overlong: budget has to be from 1 to the limit of {limit} tokens, got {budget}")
    return min(0.0, max(-1.0, (limit - budget - num_tokens) / budget))


def length(episodes: list[Episode], *, target: int | None = None, scale: float = 0.01) -> list[float]:
    """-scale * n without a target, else -scale * |n - target|; n: tokens of the completion."""
    return [-scale * abs(episode.num_tokens - (target or 0)) for episode in episodes]


def constant(episodes: list[Episode], *, value: float) -> list[float]:
    """`value` for every episode: the level of a reward model's scores, which says nothing about which answer is better."""
    return [value for _ in episodes]
