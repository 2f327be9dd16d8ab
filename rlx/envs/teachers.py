"""Who lists the subgoals of a level: a language model that is asked, or the oracle with a language model's errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlx.envs.beacon_grid import COLOURS, DOOR, FACING, KINDS, Cell, Level
from rlx.types import Backend, Component, Message

Errors = Literal["object", "ring", "released"]
STATES = ("open", "closed", "locked")


def noisy_teacher(levels: Sequence[Level], *, accuracy: float, mean: float, std: float, errors: Errors) -> list[list[Cell]]:
    """The oracle's lists, each subgoal corrupted with probability 1 - accuracy: what is known of a language model's answers.

    | errors   | a wrong subgoal is                                                                          |
    |----------|---------------------------------------------------------------------------------------------|
    | object   | the cell of another object of the level, uniformly                                          |
    | ring     | a cell of the grid at Manhattan distance d, uniformly; d ~ N(mean, std), rounded, at least 1 |
    | released | d cells to the right, as in the published code; it may be outside the grid                  |

    A level's draws depend on its seed alone: it has one list, as a file of a language model's answers would.
    """
    found = []
    for level in levels:
        rng = np.random.default_rng((level.seed, 1))
        wrong = rng.random(len(level.oracle)) >= accuracy
        found.append(
            [corrupted(c, level, rng, mean, std, errors) if w else c for c, w in zip(level.oracle, wrong, strict=True)]
        )
    return found


def corrupted(cell: Cell, level: Level, rng: np.random.Generator, mean: float, std: float, errors: Errors) -> Cell:
    """A wrong cell in a right one's place."""
    if errors == "object":
        others = [c for c in level.objects if c != cell]
        return others[rng.integers(len(others))] if others else cell
    distance = max(1, round(rng.normal(mean, std)))
    if errors == "released":
        return cell[0] + distance, cell[1]
    away = np.abs(np.arange(level.width) - cell[0]) + np.abs(np.arange(level.height) - cell[1])[:, None]
    ring = np.argwhere(away == min(distance, int(away.max())))
    y, x = ring[rng.integers(len(ring))].tolist()
    return x, y


def llm_teacher(levels: Sequence[Level], *, llm: Component[Backend]) -> list[list[Cell]]:
    """What a language model answers, asked about all levels at once, greedily; a level is asked about at its start."""
    texts = llm.call([describe(level) for level in levels])
    return [parse(own[0], level) for own, level in zip(texts, levels, strict=True)]


def grid_rules(
    conversations: Sequence[Sequence[Message]],
    *,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    """Answers to `describe` by rules alone, for rooms in a row: a language model that makes no mistakes.

    Room by room from the left: the key if there is one, then the door, the ball or the goal. The settings change nothing.
    """
    return [[_listed(talk[-1].text)] * n for talk in conversations]


def _listed(text: str) -> str:
    places = re.findall(r"- (?:\w+ )?\w+ (door|key|ball|goal) at \((\d+), (\d+)\)", text)
    doors = [int(x) for kind, x, _ in places if kind == "door"]

    def order(place: tuple[str, str, str]) -> tuple[int, int]:
        room = sum(int(place[1]) > x for x in doors)  # a door closes the room on its left
        return room, ("key", "door", "ball", "goal").index(place[0])

    return "\n".join(f"{i}. ({x}, {y})" for i, (_, x, y) in enumerate(sorted(places, key=order), 1))


# --------------------------------------------------------------------------- words
def describe(level: Level) -> tuple[Message, ...]:
    """A level in words, and how to answer: what a teacher is asked."""

    def thing(kind: int, colour: int, state: int) -> str:
        return " ".join([*([STATES[state]] if kind == DOOR else []), COLOURS[colour], KINDS.get(kind, "thing")])

    lines = [
        f"A grid of {level.width} columns and {level.height} rows; (0, 0) is its upper left corner, (x, y) counts to the "
        "right and down. Walls divide it into rooms.",
        "Objects:",
        *(f"- {thing(*held)} at ({x}, {y})" for (x, y), held in level.objects.items()),
        f"You are at ({level.agent[0]}, {level.agent[1]}), facing {FACING[level.facing]}.",
        f"Task: {level.mission}. Doors have to be opened; a locked door needs the key of its colour, which you have to fetch.",
        "List the cells to go to, in order, one a line, as (x, y). Write nothing else.",
    ]
    return (Message("user", "\n".join(lines)),)


def parse(text: str, level: Level, limit: int = 16) -> list[Cell]:
    """The cells (x, y) of an answer in order: at most `limit`, those outside the grid left out."""
    found = [(int(x), int(y)) for x, y in re.findall(r"\(\s*(-?\d+)\s*,\s*(-?\d+)\s*\)", text)]
    return [cell for cell in found if level.holds(cell)][:limit]


def quality(answers: Sequence[Sequence[Cell]], oracles: Sequence[Sequence[Cell]]) -> tuple[float, float, float]:
    """How good a teacher is: share of right subgoals, and mean and standard deviation of the wrong ones' Manhattan error.

    A subgoal is right if it stands at its place in the oracle's list; one that is missing counts as wrong, without an error.
    """
    pairs = [(a[i] if i < len(a) else None, cell) for a, o in zip(answers, oracles, strict=True) for i, cell in enumerate(o)]
    wrong = [abs(a[0] - o[0]) + abs(a[1] - o[1]) for a, o in pairs if a is not None and a != o]
    share = sum(a == o for a, o in pairs) / max(1, len(pairs))
    return share, float(np.mean(wrong)) if wrong else 0.0, float(np.std(wrong)) if wrong else 0.0
