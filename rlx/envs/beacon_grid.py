"""A grid of rooms in a row behind doors: many levels in one array, stepped together. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlx.types import Ids, VecStep

# What a cell holds, as (type, colour, state): the indices of MiniGrid.
UNSEEN, EMPTY, WALL, DOOR, KEY, BALL, BOX, GOAL = 0, 1, 2, 4, 5, 6, 7, 8
OPEN, CLOSED, LOCKED = 0, 1, 2
KINDS = {WALL: "wall", DOOR: "door", KEY: "key", BALL: "ball", BOX: "box", GOAL: "goal"}
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
LEFT, RIGHT, FORWARD, PICK_UP, TOGGLE, NOTHING = range(6)

ROOM, VIEW = 4, 5  # cells inside a room; side of what the agent sees
STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])  # (x, y) of facing east, south, west, north
FACING = ("east", "south", "west", "north")

Cell = tuple[int, int]
Cells = NDArray[np.int64]  # (B,2): x, y of one cell in each level


@dataclass(frozen=True)
class Level:
    """What a teacher is told of one level at its start; `oracle` is the right list of subgoals."""

    seed: int
    width: int
    height: int
    objects: dict[Cell, tuple[int, int, int]]
    agent: Cell
    facing: int
    mission: str
    oracle: list[Cell]

    def holds(self, cell: Cell) -> bool:
        """Whether the cell is in the grid."""
        return 0 <= cell[0] < self.width and 0 <= cell[1] < self.height


class BeaconGrid:
    """Levels drawn from their seeds: rooms of 4 x 4 cells in a row, an egocentric view of 5 x 5 cells.

    Two rooms: a closed door, and a goal to stand on. Three rooms: a closed door, then a locked one, its key in one of the
    first two rooms, and a ball to pick up in the last. The view has the agent in the middle of its last row, looking up, and
    shows what the agent carries in its own cell; walls do not hide what is behind them. An episode pays 1 - 0.9 t / limit
    when it succeeds at step t, else 0, and is truncated after `limit` steps.
    """

    def __init__(self, seeds: Sequence[int], *, rooms: int, limit: int) -> None:
        self.seeds = list(seeds)
        self.rooms = rooms
        self.limit = limit
        self.size = (1 + (ROOM + 1) * rooms, ROOM + 2)  # width, height

    def reset(self) -> NDArray[np.uint8]:
        """Every level at its start; what the agents see, (B,5,5,3)."""
        width, height = self.size
        n, edge = len(self.seeds), VIEW - 1
        self._padded = np.zeros((n, height + 2 * edge, width + 2 * edge, 3), np.uint8)
        self.cells = self._padded[:, edge : edge + height, edge : edge + width]  # (B,height,width,3), a view
        self.agent = np.zeros((n, 2), np.int64)
        self.facing = np.zeros(n, np.int64)
        self.carried = np.zeros((n, 3), np.uint8)
        self.time = np.zeros(n, np.int64)
        self.done = np.zeros(n, bool)
        self._index = np.arange(n)
        self._oracle = [self._build(i, np.random.default_rng((seed, self.rooms))) for i, seed in enumerate(self.seeds)]
        return self.view()

    def _build(self, i: int, rng: np.random.Generator) -> list[Cell]:
        """Draw one level; its right subgoals."""
        cells = self.cells[i]
        cells[:] = (EMPTY, 0, 0)
        cells[[0, -1]] = cells[:, :: ROOM + 1] = (WALL, 5, 0)
        colours = rng.integers(len(COLOURS), size=3).tolist()

        def put(room: int, thing: tuple[int, int, int]) -> Cell:
            free = np.argwhere(cells[:, room * (ROOM + 1) : (room + 1) * (ROOM + 1), 0] == EMPTY)
            y, x = (free[rng.integers(len(free))] + (0, room * (ROOM + 1))).tolist()
            cells[y, x] = thing
            return x, y

        def door(after: int, state: int) -> Cell:
            x, y = (after + 1) * (ROOM + 1), int(rng.integers(1, ROOM + 1))
            cells[y, x] = (DOOR, colours[after], state)
            return x, y

        first = door(0, CLOSED)
        if self.rooms == 2:
            oracle = [first, put(1, (GOAL, 1, 0))]
        else:
            locked, at = door(1, LOCKED), int(rng.integers(2))
            key = put(at, (KEY, colours[1], 0))
            ball = put(2, (BALL, colours[2], 0))
            oracle = [*((key, first) if at == 0 else (first, key)), locked, ball]
        self.agent[i] = put(0, (EMPTY, 0, 0))
        self.facing[i] = rng.integers(4)
        return oracle

    def step(self, actions: Ids) -> VecStep:
        """One action in each level that is not done: what is seen, reward, terminated, truncated, and nothing more."""
        live = ~self.done
        self.time += live
        act = np.where(live, actions, NOTHING)
        self.facing = (self.facing + (act == RIGHT) - (act == LEFT)) % 4
        ahead = self.agent + STEPS[self.facing]
        kind, colour, state = self.look(ahead).T
        opened = (kind == DOOR) & (state == OPEN)
        moved = (act == FORWARD) & ((kind == EMPTY) | (kind == GOAL) | opened)
        self.agent[moved] = ahead[moved]
        solved = moved & (kind == GOAL) | (act == PICK_UP) & (kind == BALL)
        taken = (act == PICK_UP) & (kind == KEY) & (self.carried[:, 0] == 0)
        self.carried[taken] = self.look(ahead)[taken]
        self._write(taken | (act == PICK_UP) & (kind == BALL), ahead, (EMPTY, 0, 0))
        fits = (state != LOCKED) | (self.carried[:, 0] == KEY) & (self.carried[:, 1] == colour)
        turned = (act == TOGGLE) & (kind == DOOR) & fits
        self.cells[self._index[turned], ahead[turned, 1], ahead[turned, 0], 2] = np.where(opened, CLOSED, OPEN)[turned]
        truncated = live & ~solved & (self.time >= self.limit)
        self.done |= solved | truncated
        reward = np.where(solved, 1.0 - 0.9 * self.time / self.limit, 0.0).astype(np.float32)
        return self.view(), reward, solved, truncated, {}

    def _write(self, where: NDArray[np.bool_], at: Cells, thing: tuple[int, int, int]) -> None:
        self.cells[self._index[where], at[where, 1], at[where, 0]] = thing

    def look(self, at: Cells) -> NDArray[np.uint8]:
        """What one cell of each level holds now, (B,3); a copy."""
        held: NDArray[np.uint8] = self.cells[self._index, at[:, 1], at[:, 0]]
        return held

    def view(self) -> NDArray[np.uint8]:
        """What the agents see, (B,5,5,3)."""
        dx, dy = OFFSETS[self.facing, ..., 0], OFFSETS[self.facing, ..., 1]
        x, y = self.agent[:, 0, None, None] + dx + VIEW - 1, self.agent[:, 1, None, None] + dy + VIEW - 1
        seen: NDArray[np.uint8] = self._padded[self._index[:, None, None], y, x]
        carrying = self.carried[:, 0] > 0
        seen[carrying, -1, VIEW // 2] = self.carried[carrying]
        return seen

    def level(self, i: int) -> Level:
        """Level i as it is now, in words for a teacher to be told; its oracle is of the start."""
        kinds = self.cells[i, :, :, 0]
        found = {
            (x, y): tuple(self.cells[i, y, x].tolist()) for y, x in np.argwhere((kinds != EMPTY) & (kinds != WALL)).tolist()
        }
        mission = "stand on the goal" if self.rooms == 2 else "pick up the ball"
        x, y = self.agent[i].tolist()
        return Level(self.seeds[i], *self.size, found, (x, y), int(self.facing[i]), mission, self._oracle[i])


def offsets() -> NDArray[np.int64]:
    """(4,5,5,2): the (x, y) of each cell of the view relative to the agent, for each way that it may face."""
    ahead = np.arange(VIEW - 1, -1, -1)[:, None]
    right = np.arange(VIEW)[None] - VIEW // 2
    return np.stack([ahead[..., None] * STEPS[f] + right[..., None] * STEPS[(f + 1) % 4] for f in range(4)])


OFFSETS = offsets()
