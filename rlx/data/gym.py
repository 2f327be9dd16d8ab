"""An environment of Gymnasium as a task: its rows are seeds."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlx.envs.gym import GymEnvs
from rlx.envs.single import SingleTurn
from rlx.rewards.env import env
from rlx.types import ConfigError, Episode, Message, Task, TaskSource

HELD_OUT = 1_000_000  # the seeds of a held-out split begin that far from one another's


def gym(
    *, id: str, limit: int, settings: dict[str, Any] | None = None, train: int = 20_000, dev: int = 20, test: int = 100
) -> TaskSource:
    """Episodes of a Gymnasium environment with arrays to look at and numbered actions; one for each seed.

    `limit` is the most steps of an episode, `settings` goes to `gymnasium.make`. The verifier is the environment's own
    reward, so the metric `mean_reward` is the return. Raises ConfigError: a setting out of range.
    """
    if min(limit, train) < 1:
        raise ConfigError(f"expected limit and train of at least 1, got {limit} and {train}")

    def split(first: int, size: int) -> list[Episode]:
        return [Episode(Task((Message("user", f"{id}, seed {first + i}"),), None, {"seed": first + i}), i) for i in range(size)]

    return TaskSource(
        {"train": partial(split, 2 * HELD_OUT, train), "dev": partial(split, 0, dev), "test": partial(split, HELD_OUT, test)},
        verifier=env,
        make_env=SingleTurn,
        max_new_tokens=limit,
        make_vec=lambda tasks: GymEnvs(id, [int(task.meta["seed"]) for task in tasks], settings),
    )
