"""The grid of rooms: what moves, opens and is taken, what is seen, what is paid. Levels are laid out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlx.envs.beacon_grid import (
    BALL,
    CLOSED,
    DOOR,
    EMPTY,
    FORWARD,
    GOAL,
    KEY,
    LEFT,
    LOCKED,
    NOTHING,
    OPEN,
    PICK_UP,
    RIGHT,
    TOGGLE,
    WALL,
    BeaconGrid,
)


def laid_out(*things: tuple[int, int, tuple[int, int, int]], rooms: int = 3, limit: int = 120) -> BeaconGrid:
    """One level whose agent stands at (1, 1) facing east, with these things (x, y, what)."""
    grid = BeaconGrid([0], rooms=rooms, limit=limit)
    grid.reset()
    inside = grid.cells[0, 1:-1, 1:-1]
    inside[inside[..., 0] != WALL] = (EMPTY, 0, 0)
    for x, y, thing in things:
        grid.cells[0, y, x] = thing
    grid.agent[0], grid.facing[0] = (1, 1), 0
    return grid


def act(grid: BeaconGrid, *actions: int) -> tuple[np.ndarray, float, bool, bool]:
    """The last of some steps."""
    for action in actions:
        seen, reward, terminated, truncated, _ = grid.step(np.array([action]))
    return seen[0], float(reward[0]), bool(terminated[0]), bool(truncated[0])


def test_it_turns_and_walks_but_not_through_walls_or_things() -> None:
    grid = laid_out((3, 1, (BALL, 0, 0)))
    act(grid, FORWARD, FORWARD)
    assert grid.agent[0].tolist() == [2, 1]
    act(grid, LEFT, FORWARD)
    assert (grid.facing[0], grid.agent[0].tolist()) == (3, [2, 1])
    act(grid, RIGHT, RIGHT, FORWARD)
    assert (grid.facing[0], grid.agent[0].tolist()) == (1, [2, 2])
    act(grid, NOTHING)
    assert grid.agent[0].tolist() == [2, 2]


def test_a_door_opens_and_shuts_and_is_walked_through_when_open() -> None:
    grid = laid_out((2, 1, (DOOR, 1, CLOSED)))
    act(grid, FORWARD)
    assert grid.agent[0].tolist() == [1, 1]
    act(grid, TOGGLE)
    assert grid.cells[0, 1, 2].tolist() == [DOOR, 1, OPEN]
    act(grid, TOGGLE)
    assert grid.cells[0, 1, 2].tolist() == [DOOR, 1, CLOSED]
    act(grid, TOGGLE, FORWARD)
    assert grid.agent[0].tolist() == [2, 1]


def test_a_locked_door_needs_the_key_of_its_colour() -> None:
    grid = laid_out((2, 1, (DOOR, 1, LOCKED)))
    act(grid, TOGGLE)
    assert grid.cells[0, 1, 2, 2] == LOCKED
    grid.carried[0] = (KEY, 2, 0)
    act(grid, TOGGLE)
    assert grid.cells[0, 1, 2, 2] == LOCKED
    grid.carried[0] = (KEY, 1, 0)
    act(grid, TOGGLE)
    assert grid.cells[0, 1, 2, 2] == OPEN


def test_a_key_is_taken_and_seen_in_the_agents_own_cell() -> None:
    grid = laid_out((2, 1, (KEY, 3, 0)))
    seen, *_ = act(grid, NOTHING)
    assert seen[3, 2].tolist() == [KEY, 3, 0]
    seen, *_ = act(grid, PICK_UP)
    assert grid.cells[0, 1, 2].tolist() == [EMPTY, 0, 0]
    assert seen[4, 2].tolist() == [KEY, 3, 0]


def test_the_ball_ends_the_level_and_pays_less_the_later() -> None:
    grid = laid_out((2, 1, (BALL, 3, 0)))
    assert act(grid, *[NOTHING] * 79)[1:] == (0.0, False, False)
    _, reward, terminated, truncated = act(grid, PICK_UP)
    assert reward == pytest.approx(0.4)  # 1 - 0.9 x 80 / 120
    assert (terminated, truncated) == (True, False)
    assert act(grid, PICK_UP)[1:] == (0.0, False, False)


def test_the_goal_is_stood_on_in_two_rooms() -> None:
    grid = laid_out((2, 1, (GOAL, 1, 0)), rooms=2)
    assert act(grid, FORWARD)[2]
    assert grid.agent[0].tolist() == [2, 1]


def test_the_limit_truncates() -> None:
    grid = laid_out(limit=3)
    assert act(grid, NOTHING, NOTHING)[3] is False
    assert act(grid, NOTHING)[1:] == (0.0, False, True)


@pytest.mark.parametrize(("turns", "expected"), [(0, [(2, 1)]), (1, []), (2, []), (3, [(3, 4)])])
def test_the_view_turns_with_the_agent(turns: int, expected: list[tuple[int, int]]) -> None:
    """A ball two to the east and one to the north: facing east two ahead and one left, facing north one ahead, two right."""
    grid = laid_out((4, 2, (BALL, 0, 0)))
    grid.agent[0] = (2, 3)
    seen, *_ = act(grid, *[RIGHT] * turns or [NOTHING])
    assert [tuple(cell) for cell in np.argwhere(seen[..., 0] == BALL).tolist()] == expected


def test_levels_depend_on_their_seed_and_have_their_things_in_the_right_rooms() -> None:
    first, again = BeaconGrid(range(40), rooms=3, limit=9), BeaconGrid(range(39, -1, -1), rooms=3, limit=9)
    first.reset(), again.reset()
    for i in range(40):
        level = first.level(i)
        assert level == again.level(39 - i)
        kinds = [level.objects[cell][0] for cell in level.oracle]
        assert sorted(kinds) == sorted([DOOR, DOOR, KEY, BALL])
        assert kinds[-2:] == [DOOR, BALL]
        assert kinds.index(KEY) == (0 if level.oracle[kinds.index(KEY)][0] < 5 else 1)
        assert level.objects[level.oracle[2]][2] == LOCKED
        assert level.objects[level.oracle[2]][1] == level.objects[level.oracle[kinds.index(KEY)]][1]
        assert level.agent[0] < 5
        assert level.agent not in level.objects
