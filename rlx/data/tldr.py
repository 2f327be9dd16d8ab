"""TL;DR: Reddit posts to summarise (Stiennon et al. 2020, arXiv:2009.01325)."""

from __future__ import annotations

from rlx.data.formats import placed_episodes
from rlx.data.questions import split_rows
from rlx.envs.single import SingleTurn
from rlx.types import ConfigError, Episode, TaskSource


def tldr(*, path: str = "trl-lib/tldr", dev: int = 200, test: int = 500, limit: int | None = None) -> TaskSource:
    """Posts to summarise, from the hub or from a folder with train, validation and test files; columns prompt, completion.

    train, dev (the first `dev` posts of the validation file) and test (the first `test` of its file) are prompts alone,
    demos the training posts with the summaries that people wrote; `limit` cuts every split. No summary is right or wrong:
    evaluate with a reward model as `verifier`. A summary has at most 53 tokens (Huang et al. 2024, arXiv:2403.17031).

    Raises ConfigError: no such data, or a size below 1. DataError: a row that does not fit.
    """
    if min(dev, test, limit or 1) < 1:
        raise ConfigError(f"expected dev, test and limit of at least 1, got {dev}, {test} and {limit}")
    return TaskSource(
        {
            "demos": lambda: posts(path, "train")[:limit],
            "train": lambda: unanswered(posts(path, "train")[:limit]),
            "dev": lambda: unanswered(posts(path, "validation")[:dev][:limit]),
            "test": lambda: unanswered(posts(path, "test")[:test][:limit]),
        },
        verifier=no_verifier,
        make_env=SingleTurn,
        max_new_tokens=53,
    )


def posts(path: str, split: str) -> list[Episode]:
    """A split's posts with their summaries."""
    return placed_episodes(split_rows(path, split), source=f"{path} [{split}]")


def unanswered(rows: list[Episode]) -> list[Episode]:
    """The prompts alone, to be played."""
    return [Episode(row.task, row.group) for row in rows]


def no_verifier(episodes: list[Episode]) -> list[float]:
    """Raise ConfigError: what a summary is worth, only a reward model or a judge can say."""
    raise ConfigError(
        "task tldr has no verifier: give `eval`, or a stage that evaluates, verifier: {name: reward_model, path: ...}"
    )
