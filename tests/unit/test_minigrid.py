"""MiniGrid: the oracle's list of each family is what a walk through the level meets, and subgoals go with it."""

from __future__ import annotations

import numpy as np
import pytest

from rlx.envs.beacon_grid import BALL, BOX, CLOSED, DOOR, GOAL, KEY, LOCKED
from rlx.envs.minigrid import MiniGrids
from rlx.methods.words_as_beacons import Guide, minigrid
from rlx.types import ConfigError

pytest.importorskip("minigrid")

FAMILIES = {
    "MiniGrid-KeyCorridorS3R3-v0": [(KEY, 0), (DOOR, LOCKED), (BALL, 0)],
    "MiniGrid-MultiRoom-N2-S4-v0": [(DOOR, CLOSED), (GOAL, 0)],
    "MiniGrid-ObstructedMaze-1Dlh-v0": [(BOX, 0), (DOOR, LOCKED), (BALL, 0)],
    "MiniGrid-ObstructedMaze-1Dlhb-v0": [(BOX, 0), (BALL, 0), (DOOR, LOCKED), (BALL, 0)],
}


@pytest.mark.parametrize("id", FAMILIES)
def test_the_oracle_of_a_family(id: str) -> None:
    grids = MiniGrids(id, range(5))
    assert grids.reset().shape == (5, 7, 7, 3)
    for i in range(5):
        level = grids.level(i)
        held = [level.objects[cell] for cell in level.oracle]
        assert [(kind, 0 if kind == GOAL else state) for kind, _, state in held] == FAMILIES[id]


def test_the_ball_that_blocks_stands_before_the_door() -> None:
    grids = MiniGrids("MiniGrid-ObstructedMaze-1Dlhb-v0", range(5))
    grids.reset()
    for i in range(5):
        _, (x, y), door, _ = grids.level(i).oracle
        assert abs(x - door[0]) + abs(y - door[1]) == 1


def test_a_family_without_an_oracle_is_said() -> None:
    with pytest.raises(ConfigError, match="no oracle is known"):
        MiniGrids("MiniGrid-Empty-5x5-v0", [0]).reset()


def test_a_task_of_levels_with_their_subgoals() -> None:
    source = minigrid(id="MiniGrid-MultiRoom-N2-S4-v0", limit=40, guide=Guide(show="relative"), train=2, dev=1, test=1)
    assert source.make_vec is not None
    env = source.make_vec([e.task for e in source.splits["train"]()])
    seen = env.reset()
    assert seen.shape == (2, 147 + 2)
    assert (seen[:, 147:] != 0).any(1).all()
    for _ in range(40):
        _, reward, terminated, truncated, info = env.step(np.full(2, 6))
    assert truncated.all()
    assert not terminated.any()
    assert reward.tolist() == info["completed"].tolist() == [0.0, 0.0]
