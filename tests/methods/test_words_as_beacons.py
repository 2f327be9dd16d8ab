"""Words as Beacons: the bonus, when a subgoal is reached, how it is shown, and what a noisy teacher says. By hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlx.compose import compose
from rlx.envs.beacon_grid import (
    BALL,
    CLOSED,
    DOOR,
    EMPTY,
    FORWARD,
    KEY,
    NOTHING,
    OPEN,
    PICK_UP,
    TOGGLE,
    WALL,
    BeaconGrid,
    Cell,
    Level,
)
from rlx.envs.subgoals import CODES, WIDTHS, Guided, Show, shown
from rlx.envs.teachers import describe, grid_rules, llm_teacher, noisy_teacher, parse, quality
from rlx.methods.words_as_beacons import Guide, beacongrid, bonuses, subgoal_bonus
from rlx.plan import plan
from rlx.rewards.env import env
from rlx.rewards.score import score
from rlx.run import read_json, run
from rlx.types import Component, ConfigError, Episode, Task, Turn

NONE = np.zeros(0, np.int64)


# --------------------------------------------------------------------------- the bonus
def test_the_bonus_falls_with_the_steps_spent_on_the_subgoal() -> None:
    completed = np.zeros(60, np.float32)
    completed[[29, 49]] = 1.0  # after 30 steps, and 20 steps later
    found = bonuses(completed, 120)
    assert found[[29, 49]] == pytest.approx([1 - 30 / 120, 1 - 20 / 120])
    assert np.delete(found, [29, 49]).tolist() == [0.0] * 58
    turn = Turn(NONE, np.zeros(60, np.int64), np.zeros(60, np.float32), token={"completed": completed})
    ((paid,),) = subgoal_bonus([Episode(Task((), None, {"limit": 120}), 0, [turn])])
    assert 0.2 * paid[29] == pytest.approx(0.15)


# --------------------------------------------------------------------------- when a subgoal is reached
def level(*things: tuple[int, int, tuple[int, int, int]]) -> BeaconGrid:
    """One level, the agent at (1, 1) facing east."""
    grid = BeaconGrid([0], rooms=3, limit=120)
    grid.reset()
    inside = grid.cells[0, 1:-1, 1:-1]
    inside[inside[..., 0] != WALL] = (EMPTY, 0, 0)
    for x, y, thing in things:
        grid.cells[0, y, x] = thing
    grid.agent[0], grid.facing[0] = (1, 1), 0
    return grid


class Laid(BeaconGrid):
    """A level that is laid out already."""

    def __init__(self, grid: BeaconGrid) -> None:
        vars(self).update(vars(grid))

    def reset(self) -> np.ndarray:
        return self.view()


def guided(grid: BeaconGrid, subgoals: list[Cell], show: Show = "relative", **settings: Any) -> Guided:
    made = Guided(Laid(grid), lambda levels: [subgoals for _ in levels], [True], show=show, **settings)
    made.reset()
    return made


def completed(env: Guided, *actions: int) -> list[int]:
    return [int(env.step(np.array([action]))[-1]["completed"][0]) for action in actions]


def test_a_door_is_reached_when_it_opens_and_pays_once() -> None:
    env = guided(level((2, 1, (DOOR, 1, CLOSED))), [(2, 1), (4, 4)])
    assert completed(env, NOTHING, TOGGLE, TOGGLE, TOGGLE) == [0, 1, 0, 0]
    assert env.current.tolist() == [1]


def test_a_key_is_reached_when_it_is_taken_and_a_cell_when_it_is_stood_on() -> None:
    env = guided(level((2, 1, (KEY, 1, 0))), [(2, 1), (3, 1)])
    assert completed(env, PICK_UP, FORWARD, FORWARD, FORWARD) == [1, 0, 1, 0]


def test_a_subgoal_that_is_reached_before_its_turn_is_not_paid_unless_its_cell_changes_again() -> None:
    grid = level((2, 1, (DOOR, 1, CLOSED)))
    env = guided(grid, [(1, 2), (2, 1)])
    assert completed(env, TOGGLE) == [0]  # the second one
    assert env.flagged.tolist() == [[False, True, False]]
    grid.agent[0] = (1, 2)
    assert completed(env, NOTHING) == [1]  # the first
    grid.agent[0] = (1, 1)
    assert completed(env, NOTHING, TOGGLE, NOTHING) == [0, 1, 0]


def test_such_a_subgoal_can_be_skipped() -> None:
    grid = level((2, 1, (DOOR, 1, CLOSED)))
    env = guided(grid, [(1, 2), (2, 1), (4, 4)], skip_completed=True)
    completed(env, TOGGLE)
    grid.agent[0] = (1, 2)
    assert completed(env, NOTHING) == [1]
    assert env.current.tolist() == [2]


def test_of_several_in_one_step_the_current_one_alone_is_paid() -> None:
    env = guided(level((2, 1, (DOOR, 1, CLOSED))), [(2, 1), (2, 1)])
    assert completed(env, TOGGLE, NOTHING) == [1, 0]
    assert env.current.tolist() == [1]


def test_after_the_last_there_is_nothing_more() -> None:
    env = guided(level((2, 1, (DOOR, 1, CLOSED))), [(2, 1)], show="representation")
    assert completed(env, TOGGLE) == [1]
    seen, *_ = env.step(np.array([TOGGLE]))
    assert seen[0, -3:].tolist() == [-1.0, -1.0, -1.0]
    assert completed(env, TOGGLE) == [0]


def test_a_subgoal_outside_the_grid_is_never_reached() -> None:
    env = guided(level(), [(99, 1)])
    assert completed(env, *[FORWARD] * 5) == [0] * 5


# --------------------------------------------------------------------------- how it is shown
def show(kind: Show, at: Cell, held: tuple[int, int, int], *, missing: bool = False) -> list[float]:
    found = shown(kind, np.array([at]), np.array([(2, 3)]), np.array([held], np.uint8), np.array([missing]))
    assert found.shape == (1, WIDTHS[kind])
    return found[0].tolist()


def test_a_subgoal_as_the_student_sees_it() -> None:
    assert show("relative", (5, 1), (DOOR, 2, CLOSED)) == [3.0, -2.0]
    assert show("representation", (5, 1), (DOOR, 2, CLOSED)) == [DOOR, 2.0, CLOSED]
    assert show("language", (5, 1), (DOOR, 2, CLOSED)) == CODES[DOOR, 2].tolist()
    assert show("language", (5, 1), (DOOR, 2, OPEN)) == CODES[DOOR, 2].tolist()
    assert show("language", (5, 1), (KEY, 2, 0)) != CODES[DOOR, 2].tolist()


def test_without_a_subgoal_or_for_an_empty_cell_there_is_the_fallback() -> None:
    assert show("relative", (5, 1), (DOOR, 2, CLOSED), missing=True) == [0.0, 0.0]
    assert show("relative", (2, 3), (EMPTY, 0, 0)) == [0.0, 0.0]  # under the agent: the one ambiguous case
    assert show("representation", (5, 1), (DOOR, 2, CLOSED), missing=True) == [-1.0] * 3
    assert show("representation", (5, 1), (EMPTY, 0, 0)) == [-1.0] * 3
    assert show("language", (5, 1), (EMPTY, 0, 0)) == [0.0] * 16


def test_a_hidden_subgoal_is_paid_and_not_shown() -> None:
    env = guided(level((2, 1, (DOOR, 1, CLOSED))), [(2, 1)], show="representation", hidden=True)
    assert env.reset()[0, -3:].tolist() == [-1.0] * 3
    assert completed(env, TOGGLE) == [1]


# --------------------------------------------------------------------------- teachers
def some_levels(rooms: int = 3, count: int = 200) -> list[Level]:
    grid = BeaconGrid(range(count), rooms=rooms, limit=9)
    grid.reset()
    return [grid.level(i) for i in range(count)]


def say(levels: Sequence[Level], errors: str, accuracy: float, mean: float = 1.0, std: float = 1.0) -> list[list[Cell]]:
    return noisy_teacher(levels, accuracy=accuracy, mean=mean, std=std, errors=errors)  # type: ignore[arg-type]


@pytest.mark.parametrize("errors", ["object", "ring", "released"])
def test_an_accuracy_of_1_is_the_oracle_and_of_0_never_is(errors: str) -> None:
    levels = some_levels()
    right = [x.oracle for x in levels]
    assert say(levels, errors, 1.0) == right
    wrong = say(levels, errors, 0.0, mean=0.0)
    assert all(a != b for said, oracle in zip(wrong, right, strict=True) for a, b in zip(said, oracle, strict=True))
    assert say(levels, errors, 0.0, mean=0.0) == wrong


def test_noise_is_as_large_as_it_says() -> None:
    levels = some_levels(count=1000)
    share, mean, std = quality(say(levels, "ring", 0.7, mean=3.0, std=0.0), [x.oracle for x in levels])
    assert share == pytest.approx(0.7, abs=0.03)
    assert (mean, std) == (3.0, 0.0)
    wrong = say(levels, "object", 0.0)
    assert all(cell in x.objects for x, cells in zip(levels, wrong, strict=True) for cell in cells)
    out = say(levels, "released", 0.0, mean=2.0, std=0.0)
    assert out == [[(x + 2, y) for x, y in lvl.oracle] for lvl in levels]


def test_the_ring_is_drawn_on_all_sides() -> None:
    levels = some_levels(count=600)
    pairs = zip(say(levels, "ring", 0.0, mean=1.0, std=0.0), levels, strict=True)
    moved = {(a[0] - b[0], a[1] - b[1]) for said, x in pairs for a, b in zip(said, x.oracle, strict=True)}
    assert moved == {(1, 0), (-1, 0), (0, 1), (0, -1)}


@pytest.mark.parametrize("rooms", [2, 3])
def test_a_backend_reads_a_level_from_its_text_and_lists_the_oracles_subgoals(rooms: int) -> None:
    levels = some_levels(rooms)
    answers = llm_teacher(levels, llm=Component("grid_rules", grid_rules))
    assert quality(answers, [x.oracle for x in levels]) == (1.0, 0.0, 0.0)


def test_a_level_in_words() -> None:
    lvl = Level(0, 11, 6, {(5, 2): (DOOR, 0, CLOSED), (7, 3): (BALL, 2, 0)}, (1, 4), 3, "pick up the ball", [])
    (message,) = describe(lvl)
    assert message.text.splitlines()[1:5] == [
        "Objects:",
        "- closed red door at (5, 2)",
        "- blue ball at (7, 3)",
        "You are at (1, 4), facing north.",
    ]


def test_an_answer_is_read_in_order_and_held_to_the_grid() -> None:
    lvl = Level(0, 11, 6, {}, (1, 1), 0, "", [])
    assert parse("First the door at (5, 2), then\n2. ( 7,3 ). Not (11, 2), (-1, 2) or (3, 6).", lvl) == [(5, 2), (7, 3)]
    assert parse("I cannot see the level.", lvl) == []
    assert len(parse("(1, 1) " * 50, lvl)) == 16


def test_quality_by_hand() -> None:
    said, right = [[(1, 1), (4, 4)], [(2, 2)]], [[(1, 1), (3, 2)], [(2, 2), (5, 5)]]
    assert quality(said, right) == (0.5, 3.0, 0.0)  # one wrong by 1 + 2, one missing


# --------------------------------------------------------------------------- the task
def test_nobody_teaches_in_test_alone_on_the_levels_of_test() -> None:
    source = beacongrid(train=3, dev=2, test=4)
    tasks = {name: [e.task for e in split()] for name, split in source.splits.items()}
    seeds = {name: [t.meta["seed"] for t in found] for name, found in tasks.items()}
    assert seeds["test"] == seeds["test_alone"]
    assert not set(seeds["train"]) & set(seeds["test"] + seeds["dev"])
    assert source.make_vec is not None
    taught, alone = source.make_vec(tasks["test"]).reset(), source.make_vec(tasks["test_alone"]).reset()
    assert (taught[:, :75] == alone[:, :75]).all()
    assert (alone[:, 75:] == -1).all()
    assert (taught[:, 75:] != -1).any(1).all()


@pytest.mark.parametrize(
    ("llm", "number"),
    [({"name": "grid_rules"}, 2), ({"name": "rules", "answers": {r"door at (\(\d+, \d+\))": r"First to \1."}}, 1)],
)
def test_a_recipe_can_ask_a_language_model_instead(llm: dict[str, Any], number: int) -> None:
    config = compose(["words_as_beacons", "task.rooms=2"]).config
    config["task"]["guide"]["llm"] = llm
    task = plan(config).task
    assert task is not None
    assert task.make_vec is not None
    env = task.make_vec([e.task for e in task.splits["test"]()[:3]])
    assert isinstance(env, Guided)
    env.reset()
    assert env.number.tolist() == [number] * 3
    doors = [next(cell for cell, held in env.grid.level(i).objects.items() if held[0] == DOOR) for i in range(3)]
    assert [tuple(goal) for goal in env.goals[:, 0].tolist()] == doors


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"guide\.accuracy"):
        Guide(accuracy=1.5)
    with pytest.raises(ConfigError, match="limit and train"):
        beacongrid(limit=0)


@pytest.mark.parametrize("name", ["words_as_beacons", "paper/words_as_beacons"])
def test_all_bonuses_of_a_level_are_worth_less_than_success(name: str) -> None:
    """N alpha < 1, with the longest list of subgoals: near 1 the optimum can shift."""
    config = compose([name]).config
    weights = {reward["name"]: reward.get("weight", 1.0) for reward in config["stages"]["rl"]["reward"]}
    longest = max(len(x.oracle) for x in some_levels()) if config["task"]["name"] == "beacongrid" else 3
    assert weights["env"] == 1.0
    assert 0 < longest * weights["subgoal_bonus"] < 1.0


def test_what_is_measured_is_the_unshaped_reward() -> None:
    """A bonus is no success, and what the environment paid is logged beside it."""
    turn = Turn(NONE, np.zeros(9, np.int64), np.zeros(9, np.float32))
    turn.token = {"completed": np.eye(9, dtype=np.float32)[4], "reward": np.zeros(9, np.float32)}
    lost = Episode(Task((), None, {"limit": 10}), 0, [turn])
    rewards = [Component("env", env), Component("subgoal_bonus", subgoal_bonus, weight=0.2)]
    score([lost], rewards, "stages.rl.reward")
    assert beacongrid().verifier([lost]) == [0.0]
    assert lost.rewards == {"env": 0.0, "subgoal_bonus": pytest.approx(0.5)}
    assert lost.reward == pytest.approx(0.1)


def test_without_bonus_and_input_it_is_plain_ppo_step_for_step(tmp_path: Path) -> None:
    """The bonus weighs nothing and the subgoals are hidden: metrics and weights are exactly those of PPO in the bare grid."""
    few = ["stages.rl.steps=2", "stages.rl.prompts_per_step=8", *(f"stages.{x}.limit=2" for x in ("rl.eval", "test", "alone"))]
    words = ["words_as_beacons", "task.rooms=2", *few]
    curves, nets, earned = [], [], []
    for name, extra in (
        ("silent", ["task.guide.hidden=true", "stages.rl.reward.1.weight=0.0"]),
        ("plain", ["task.guide.teaches=false", "stages.rl.reward=[{name: env}]"]),
    ):
        folder = tmp_path / name
        run(plan(compose([*words, *extra]).config), folder)
        nets.append(load_file(folder / "rl" / "out" / "model.safetensors"))
        lines = (folder / "rl" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        earned.append(sum(row.get("reward/subgoal_bonus", 0.0) for row in rows))
        curves.append([{k: v for k, v in row.items() if "second" not in k and "bonus" not in k} for row in rows])
        assert read_json(folder / "run.json")["status"] == "finished"
    assert earned[0] > 0 == earned[1]  # there was something to be silent about
    assert curves[0] == curves[1]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0] | nets[1])
