"""Words as Beacons (arXiv 2410.08632): subgoals that a language model lists guide a small agent through a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from rlx.envs.beacon_grid import BeaconGrid
from rlx.envs.minigrid import MiniGrids
from rlx.envs.single import SingleTurn
from rlx.envs.subgoals import Grid, Guided, Show
from rlx.envs.teachers import Errors, llm_teacher, noisy_teacher
from rlx.types import Backend, Component, ConfigError, Episode, Floats, Message, Task, TaskSource

HELD_OUT = 1_000_000  # the seeds of a held-out split begin that far from one another's


def subgoal_bonus(episodes: list[Episode]) -> list[list[Floats]]:
    """1 - k / limit at each step that completed a subgoal, k the steps spent on it; its weight is the paper's alpha.

    Reads the stream `completed` of each turn and the task's meta["limit"].
    """
    return [[bonuses(turn.token["completed"], int(e.task.meta["limit"])) for turn in e.turns] for e in episodes]


def bonuses(completed: Floats, limit: int) -> Floats:
    """(T,) bonus of each step from (T,) completed, 0 or 1: the count of steps begins anew after each completion."""
    at = np.flatnonzero(completed)
    out = np.zeros(len(completed), np.float32)
    out[at] = 1.0 - np.diff(at, prepend=-1) / limit
    return out


def solved(episodes: list[Episode]) -> list[float]:
    """1 for an episode that its environment paid for, else 0: a sparse reward is paid for success alone."""
    return [float(sum(turn.reward for turn in episode.turns) > 0) for episode in episodes]


# --------------------------------------------------------------------------- tasks
@dataclass(frozen=True, kw_only=True)
class Guide:
    """Who lists the subgoals of a level, and how the agent sees them.

    They come from `llm`, or else from the oracle with the noise of `noisy_teacher`; with `teaches: false` there are none.
    `show` is how the current one is seen (see `shown`). `hidden` keeps them from the agent, who is paid for them all the same.
    `skip_completed` passes over a subgoal that was reached before its turn, which the published code does not.
    """

    teaches: bool = True
    show: Show = "representation"
    hidden: bool = False
    skip_completed: bool = False
    accuracy: float = 1.0
    mean: float = 1.0
    std: float = 1.0
    errors: Errors = "object"
    llm: Component[Backend] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.accuracy <= 1.0:
            raise ConfigError(f"guide.accuracy: expected a probability from 0 to 1, got {self.accuracy}")

    def over(self, grid: Grid, tasks: Sequence[Task]) -> Guided:
        """The grid of some tasks with their subgoals."""
        noise = {"accuracy": self.accuracy, "mean": self.mean, "std": self.std, "errors": self.errors}
        teacher = partial(noisy_teacher, **noise) if self.llm is None else partial(llm_teacher, llm=self.llm)  # type: ignore[arg-type]
        taught = [self.teaches and bool(task.meta["taught"]) for task in tasks]
        return Guided(grid, teacher, taught, show=self.show, hidden=self.hidden, skip_completed=self.skip_completed)


ORACLE = Guide()


def beacongrid(
    *, rooms: Literal[2, 3] = 3, limit: int = 150, guide: Guide = ORACLE, train: int = 20_000, dev: int = 100, test: int = 300
) -> TaskSource:
    """Rooms in a row (see BeaconGrid): 75 numbers and the subgoal to look at, 6 actions.

    Splits have levels of their own; in `test_alone`, nobody teaches on those of `test`. Raises ConfigError: a bad setting.
    """
    if min(limit, train) < 1:
        raise ConfigError(f"expected limit and train of at least 1, got {limit} and {train}")
    return levels(lambda seeds: BeaconGrid(seeds, rooms=rooms, limit=limit), guide, limit, train, dev, test)


def minigrid(
    *, id: str, limit: int, guide: Guide = ORACLE, train: int = 100_000, dev: int = 100, test: int = 300
) -> TaskSource:
    """The same in an environment of MiniGrid, whose own limit of steps is `limit`: 147 numbers and the subgoal, 7 actions."""
    return levels(lambda seeds: MiniGrids(id, seeds), guide, limit, train, dev, test)


def levels(grid: Callable[[list[int]], Grid], guide: Guide, limit: int, train: int, dev: int, test: int) -> TaskSource:
    """The task of a family of levels: its splits, and its environments with their subgoals."""

    def split(first: int, size: int, *, taught: bool = True) -> list[Episode]:
        meta = [{"seed": first + i, "limit": limit, "taught": taught} for i in range(size)]
        return [Episode(Task((Message("user", f"level {m['seed']}"),), None, m), i) for i, m in enumerate(meta)]

    return TaskSource(
        {
            "train": partial(split, 2 * HELD_OUT, train),
            "dev": partial(split, 0, dev),
            "test": partial(split, HELD_OUT, test),
            "test_alone": partial(split, HELD_OUT, test, taught=False),
        },
        verifier=solved,
        make_env=SingleTurn,
        max_new_tokens=limit,
        make_vec=lambda tasks: guide.over(grid([int(task.meta["seed"]) for task in tasks]), tasks),
    )
