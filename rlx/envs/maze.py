"""The text maze of LMRL-Gym (Abdulhai et al. 2023, arXiv 2311.18232): a "double T", fully or partially observed."""

from __future__ import annotations

from collections import deque

from rlx.types import ConfigError, Message, Reply, Task

Cell = tuple[int, int]  # row, column

MOVES: dict[str, Cell] = {
    "move left\n": (0, -1),
    "move right\n": (0, 1),
    "move up\n": (-1, 0),
    "move down\n": (1, 0),
}
# The order in which an observation names walls.
SIDES: dict[str, Cell] = {"to your right": (0, 1), "to your left": (0, -1), "above you": (-1, 0), "below you": (1, 0)}
GOAL: Cell = (8, 6)
FREE = frozenset(
    [(1, c) for c in (*range(1, 6), *range(7, 12))]
    + [(r, c) for r in (2, 3, 4) for c in (3, 9)]
    + [(5, c) for c in range(3, 10)]
    + [(r, 6) for r in (6, 7, 8)]
)
STARTS = sorted(FREE - {GOAL})
MOST_MOVES = 100


class Maze:
    """Walk to the goal: 0 for the move that reaches it, -1 for any other, -4 for a text that is no move.

    The text of a move is exact, its line feed included ("move left\\n"); anything else, and a move into a wall, leaves the
    position as it is. The step after `most_moves` moves ends the episode, whatever it is. The start is the task's answer.
    """

    def __init__(self, *, observed: bool = True, most_moves: int = MOST_MOVES) -> None:
        self.observed = observed
        self.most_moves = most_moves
        self.at: Cell = GOAL
        self.moves = 0

    def reset(self, task: Task) -> tuple[Message, ...]:
        """Stand at the start of `task`; all episodes of a group have the same. Raises ConfigError for a cell that is none."""
        start = tuple(task.answer)
        if start not in STARTS:
            raise ConfigError(f"maze: {task.answer!r} is no start; expected (row, column) of a free cell")
        self.at, self.moves = (int(start[0]), int(start[1])), 0
        return task.prompt

    def step(self, said: Message) -> Reply:
        """Make one move."""
        if self.moves >= self.most_moves:
            return Reply((Message("user", "Failure\n"),), reward=-1.0)
        self.moves += 1
        move = MOVES.get(said.text)
        if move is not None:
            self.at = moved(self.at, move)
        if self.at == GOAL:
            return Reply((Message("user", "Success\n"),))
        seen = (Message("user", observation(self.at, observed=self.observed)),)
        return Reply(seen, reward=-4.0 if move is None else -1.0, done=False)


def moved(at: Cell, move: Cell) -> Cell:
    """The cell after a move."""
    to = at[0] + move[0], at[1] + move[1]
    return to if to in FREE else at


def walls(at: Cell) -> str:
    """The sentence on the walls around a cell."""
    found = [side for side, move in SIDES.items() if moved(at, move) == at]
    if not found:
        return "There are no walls near you."
    return f"There {'is a wall' if len(found) == 1 else 'are walls'} {', '.join(found)}."


def observation(at: Cell, *, observed: bool) -> str:
    """What the policy is told in a cell: walls alone, or the goal and the position before them."""
    if not observed:
        return walls(at) + "\n"
    goal, here = (", ".join(" ".join(str(x)) for x in cell) for cell in (GOAL, at))
    return f"The goal is at position {goal}. Your current position is at position {here}. {walls(at)}\n"


def distances() -> dict[Cell, int]:
    """The number of moves from each free cell to the goal (breadth first)."""
    found, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        cell = queue.popleft()
        for move in MOVES.values():
            if (to := moved(cell, move)) not in found:
                found[to] = found[cell] + 1
                queue.append(to)
    return found


def shortest(at: Cell) -> str:
    """A move that brings a cell nearer to the goal: the first of MOVES that does."""
    far = distances()
    return next(text for text, move in MOVES.items() if far[moved(at, move)] < far[at])
