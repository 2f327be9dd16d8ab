"""Subgoals for an agent in a grid: how the current one is shown, and when it is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rlx.envs.beacon_grid import COLOURS, EMPTY, KINDS, Cell, Cells, Level
from rlx.types import Floats, Ids, VecEnv, VecStep

Show = Literal["relative", "representation", "language"]
Teacher = Callable[[Sequence[Level]], list[list[Cell]]]

CODE = 16  # size of a phrase's code
WIDTHS = {"relative": 2, "representation": 3, "language": CODE}
# One code for each phrase ("go to the red door"): what stands for a sentence encoder.
CODES: Floats = np.random.default_rng(0).standard_normal((max(KINDS) + 1, len(COLOURS), CODE)).astype(np.float32)


class Grid(VecEnv, Protocol):
    """Levels whose cells can be looked at."""

    @property
    def agent(self) -> Cells:
        """Where the agents stand."""
        ...

    def look(self, at: Cells) -> NDArray[np.uint8]:
        """What one cell of each level holds now, (B,3); a copy."""
        ...

    def level(self, i: int) -> Level:
        """Level i as it is now, as a teacher is told of it."""
        ...


class Guided:
    """A grid whose observations end with the current subgoal. A step's info has `completed`: 1 where that was reached.

    `teacher` says the subgoals of each level, in order; levels that are not `taught` have none. Without a subgoal, the
    observation ends with the fallback (see `shown`), as it always does with `hidden`. The current subgoal at cell p is
    reached by a step after which the agent stands on p, or which changes what p holds. One that is reached before its turn
    is only flagged: it is not paid, and neither is it later, unless its cell changes again or the agent stands there. With
    `skip_completed` it is passed over when its turn comes (Words as Beacons, arXiv 2410.08632).
    """

    def __init__(
        self,
        grid: Grid,
        teacher: Teacher,
        taught: Sequence[bool],
        *,
        show: Show,
        hidden: bool = False,
        skip_completed: bool = False,
    ) -> None:
        self.grid = grid
        self.teacher = teacher
        self.taught = list(taught)
        self.show: Show = show
        self.hidden = hidden
        self.skip_completed = skip_completed

    def reset(self) -> Floats:
        """Every level at its start, with its subgoals asked for."""
        seen = self.grid.reset()
        chosen = [i for i, taught in enumerate(self.taught) if taught]
        levels = {i: self.grid.level(i) for i in chosen}
        lists = dict(zip(chosen, self.teacher(list(levels.values())), strict=True)) if chosen else {}
        longest = max(map(len, lists.values()), default=0)
        self.goals = np.zeros((len(seen), longest + 1, 2), np.int64)  # one more, which never is a goal
        self.number = np.array([len(lists.get(i, [])) for i in range(len(seen))])
        for i, cells in lists.items():
            self.goals[i, : len(cells)] = [c if levels[i].holds(c) else (0, 0) for c in cells]  # a corner is never reached
        self.current = np.zeros(len(seen), np.int64)
        self.flagged = np.zeros(self.goals.shape[:2], bool)
        self._rows = np.arange(len(seen))
        return self._observation(seen)

    def step(self, actions: Ids) -> VecStep:
        """Step the grid, then see which subgoals were reached."""
        before = [self.grid.look(self.goals[:, k]) for k in range(self.goals.shape[1])]  # copies
        seen, reward, terminated, truncated, info = self.grid.step(actions)
        reached = np.stack(
            [
                (self.grid.look(self.goals[:, k]) != old).any(-1) | (self.grid.agent == self.goals[:, k]).all(-1)
                for k, old in enumerate(before)
            ],
            1,
        ) & (np.arange(self.goals.shape[1]) < self.number[:, None])
        completed = reached[self._rows, self.current]
        self.flagged |= reached
        self.current += completed
        while self.skip_completed and (past := self.flagged[self._rows, self.current]).any():
            self.current += past
        return self._observation(seen), reward, terminated, truncated, {**info, "completed": completed.astype(np.float32)}

    def _observation(self, seen: NDArray[Any]) -> Floats:
        at = self.goals[self._rows, self.current]
        missing = (self.current >= self.number) | self.hidden
        said = shown(self.show, at, self.grid.agent, self.grid.look(at), missing)
        return np.concatenate([seen.reshape(len(seen), -1).astype(np.float32), said], 1)


def shown(show: Show, at: Cells, agent: Cells, held: NDArray[np.uint8], missing: NDArray[np.bool_]) -> Floats:
    """A subgoal at cell `at` (B,2) as the student sees it: (B,2), (B,3) or (B,16).

    | show           | value                                | without a subgoal, or for an empty cell |
    |----------------|--------------------------------------|-----------------------------------------|
    | relative       | at - agent                           | (0, 0), also under the agent             |
    | representation | (type, colour, state) of what is there | (-1, -1, -1)                           |
    | language       | code of "go to the red door"          | zeros                                    |
    """
    if show == "relative":
        return np.where(missing[:, None], 0, at - agent).astype(np.float32)
    nothing = missing | (held[:, 0] <= EMPTY)
    if show == "representation":
        return np.where(nothing[:, None], -1.0, held.astype(np.float32)).astype(np.float32)
    kind, colour = held[:, 0].astype(np.int64), held[:, 1].astype(np.int64)
    return np.where(nothing[:, None], 0.0, CODES[kind.clip(max=len(CODES) - 1), colour])
