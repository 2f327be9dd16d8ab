"""Levels of MiniGrid as a grid of subgoals: what its cells hold, and the oracle's list for the families of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlx.envs.beacon_grid import BALL, BOX, DOOR, EMPTY, KEY, LOCKED, WALL, Cell, Cells, Level
from rlx.envs.gym import make
from rlx.types import ConfigError, Ids, VecStep


class MiniGrids:
    """Environments of one MiniGrid id, one for each seed, with the partial view of 7 x 7 cells that it ships."""

    def __init__(self, id: str, seeds: Sequence[int]) -> None:
        self.id = id
        self.seeds = list(seeds)
        self.envs = [make(id).unwrapped for _ in seeds]

    def reset(self) -> NDArray[np.uint8]:
        """Every level at its start; what the agents see, (B,7,7,3)."""
        self._seen = np.stack([env.reset(seed=s)[0]["image"] for env, s in zip(self.envs, self.seeds, strict=True)])
        self._done = np.zeros(len(self.envs), bool)
        self._oracle = [oracle(self.id, env) for env in self.envs]
        return self._seen.copy()

    def step(self, actions: Ids) -> VecStep:
        """One action in each level that is not done."""
        reward = np.zeros(len(self.envs), np.float32)
        terminated, truncated = np.zeros_like(self._done), np.zeros_like(self._done)
        for i in np.flatnonzero(~self._done).tolist():
            seen, reward[i], terminated[i], truncated[i], _ = self.envs[i].step(int(actions[i]))
            self._seen[i] = seen["image"]
        self._done |= terminated | truncated
        return self._seen.copy(), reward, terminated, truncated & ~terminated, {}

    @property
    def agent(self) -> Cells:
        """Where the agents stand."""
        return np.array([env.agent_pos for env in self.envs], np.int64).reshape(-1, 2)

    def look(self, at: Cells) -> NDArray[np.uint8]:
        """What one cell of each level holds now, (B,3)."""
        return np.array([held(env, cell) for env, cell in zip(self.envs, at.tolist(), strict=True)], np.uint8).reshape(-1, 3)

    def level(self, i: int) -> Level:
        """Level i as it is now."""
        env = self.envs[i]
        cells = [(x, y) for y in range(env.height) for x in range(env.width)]
        found = {cell: thing for cell in cells if (thing := held(env, cell))[0] not in (EMPTY, WALL)}
        x, y = map(int, env.agent_pos)
        return Level(self.seeds[i], env.width, env.height, found, (x, y), int(env.agent_dir), env.mission, self._oracle[i])


def held(env: Any, cell: Sequence[int]) -> tuple[int, int, int]:
    """(type, colour, state) of a cell; wall outside the grid."""
    x, y = cell
    if not (0 <= x < env.width and 0 <= y < env.height):
        return WALL, 0, 0
    thing = env.grid.get(x, y)
    kind, colour, state = (EMPTY, 0, 0) if thing is None else thing.encode()
    return int(kind), int(colour), int(state)


def oracle(id: str, env: Any) -> list[Cell]:
    """The right subgoals of a level at its start.

    KeyCorridor: key, locked door, ball. MultiRoom: the doors on the way, goal. ObstructedMaze 1Dlh: box, door, ball; 1Dlhb:
    box, the ball that blocks the door, door, ball. Raises ConfigError for another family.
    """
    things = [((x, y), held(env, (x, y))) for y in range(env.height) for x in range(env.width)]
    places: dict[int, list[Cell]] = {}
    for cell, (kind, _, state) in things:
        places.setdefault(-DOOR if kind == DOOR and state == LOCKED else kind, []).append(cell)
    if "KeyCorridor" in id:
        return [*places[KEY], *places[-DOOR], *places[BALL]]
    if "MultiRoom" in id:
        doors = [tuple(map(int, room.exitDoorPos)) for room in env.rooms[:-1]]
        return [*((x, y) for x, y in doors), tuple(map(int, env.goal_pos))]  # type: ignore[list-item]
    if "ObstructedMaze-1Dlh" in id:
        target = tuple(map(int, env.obj.init_pos))
        blocking = [ball for ball in places[BALL] if ball != target]
        return [*places[BOX], *blocking, *places[-DOOR], target]  # type: ignore[list-item]
    raise ConfigError(f"{id}: no oracle is known for this family (known: KeyCorridor, MultiRoom, ObstructedMaze-1Dlh)")
