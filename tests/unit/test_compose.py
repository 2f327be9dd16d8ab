"""Command line -> config: short words, inheritance, caps, and what the command line changed."""

from pathlib import Path

import pytest

from rlx.compose import Numbers, apply_caps, compose, override, prepare, recipes, swapped, words
from rlx.types import ConfigError

PARENT = """\
purpose: parent
model: {name: tiny, layers: 2}
task: {name: arithmetic, digits: 2}
claim: {says: a claim of the parent}
stages:
  sft: {kind: fit, data: "@task/demos", loss: [{name: nll}], steps: 100, lr: 1e-3}
  more: {kind: fit, policy: "@sft", data: "@task/demos", loss: [{name: nll}], steps: "${stages.sft.steps}", lr: 1e-3}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "parent.yaml").write_text(PARENT)
    (tmp_path / "child.yaml").write_text("defaults: [/recipe/parent]\npurpose: child\nstages: {sft: {steps: 7}}\n")
    return tmp_path


def test_words():
    assert words(["grpo_math", "seed=1", "~stages.rl.eval"]) == ["recipe=grpo_math", "seed=1", "~stages.rl.eval"]
    with pytest.raises(ConfigError, match="'seed': expected key=value"):
        words(["grpo_math", "seed"])


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("seed=1", "++seed=1"),
        ("+seed=1", "++seed=1"),
        ("model=a/b", "++model.name=a/b"),
        ("task.path=x", "++task.path=x"),
        ("task={name: gsm8k}", "++task={name: gsm8k}"),
        ("scale=smoke", "scale=smoke"),
        ("~stages.rl.eval", "~stages.rl.eval"),
        ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_trials=3"),
        ("hydra/sweeper=optuna", "hydra/sweeper=optuna"),
    ],
)
def test_override(text, sent):
    assert override(text, ["recipe", "scale"]) == sent


def test_inheritance_keeps_headers_to_their_file(mine):
    child = compose(["child"], mine).config
    assert (child["purpose"], child["recipe"], "claim" in child) == ("child", "child", False)
    assert (child["stages"]["sft"]["steps"], child["stages"]["sft"]["lr"]) == (7, 1e-3)
    assert child["stages"]["more"]["steps"] == 7
    assert compose(["parent"], mine).config["claim"] == {"says": "a claim of the parent"}


def test_what_the_command_line_changed(mine):
    made = compose(["parent", "task=gsm8k", "seed=2", "stages.sft.loss.0.name=entropy"], mine)
    assert made.config["task"] == {"name": "gsm8k", "digits": 2}
    assert made.config["seed"] == 2
    assert made.swapped == {"task", "stages.sft.loss.0"}
    assert {"seed", "task.name"} <= made.given
    assert swapped({"a": {"name": "x"}}, {"a": {"name": "y"}}) == ["a"]


def test_two_settings_that_are_wrong_are_told_together(mine):
    with pytest.raises(ConfigError) as caught:
        prepare(["parent", "seed=0,1", "hydra.x=1", "scale=smokey"], recipes(mine))
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["seed=0,1", "hydra.x=1", "scale=smokey"]


def test_a_sweep_takes_several_values_and_hydras_settings(mine):
    sent = prepare(["recipe=parent,child", "seed=0,1", "hydra/sweeper=optuna"], recipes(mine), sweep=True)
    assert sent == ["recipe=parent,child", "++seed=0,1", "hydra/sweeper=optuna"]


def test_caps_hold_every_stage_and_say_so():
    config = {
        "scale": "smoke",
        "caps": {"steps": 2, "unset": {"evaluate": {"limit": 4}}},
        "stages": {"a": {"steps": 9, "eval": {"every": 1}}, "b": {"steps": 1, "kind": "evaluate"}},
    }
    assert apply_caps(config) == ["stages.a.steps: 9 -> 2 (scale=smoke)"]
    assert config["stages"] == {
        "a": {"steps": 2, "eval": {"every": 1, "limit": 4}},
        "b": {"steps": 1, "kind": "evaluate", "limit": 4},
    }


def test_numbers_in_recipes():
    import yaml

    assert yaml.load("[1e-4, 1E5, .5, 2.5, 1, 1.0.0, 5e]", Loader=Numbers) == [1e-4, 1e5, 0.5, 2.5, 1, "1.0.0", "5e"]


def test_a_recipe_outside_the_folder_cannot_be_named(mine):
    with pytest.raises(ConfigError, match=r"^recipe=\.\./parent: no recipe is called '\.\./parent'; did you mean 'parent'"):
        compose(["recipe=../parent"], mine)
