"""A composed config -> a plan."""

import copy

import pytest

from rlx.plan import cycle, plan
from rlx.types import ConfigError

CONFIG = {
    "recipe": "x",
    "seed": 0,
    "model": {"name": "tiny", "layers": 1},
    "task": {"name": "arithmetic", "digits": 2},
    "objective": "rl/eval/accuracy",
    "stages": {
        "test": {"kind": "evaluate", "policies": {"rl": "@rl"}, "data": "@task/test", "metrics": ["accuracy"]},
        "rl": {
            "kind": "online",
            "policy": "@sft:best",
            "data": "@task/train",
            "reward": "answer_match",
            "advantage": "group_zscore",
            "loss": [{"name": "clipped_surrogate", "clip_low": 0.1}],
            "watch": ["clip_fraction"],
            "prompts_per_step": 2,
            "group_size": 4,
            "steps": 3,
            "lr": 1e-3,
            "eval": {"every": 1, "data": "@task/dev", "metrics": ["accuracy"]},
        },
        "sft": {"kind": "fit", "data": "@task/demos", "loss": "nll", "steps": 2, "lr": 1e-3},
    },
}


def changed(path: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    node = config
    for part in parents:
        node = node[part]
    node[last] = value
    return config


def test_stages_run_after_what_they_start_from():
    made = plan(copy.deepcopy(CONFIG))
    assert list(made.stages) == ["sft", "rl", "test"]
    assert made.inputs == {"test": ["rl"], "rl": ["sft"], "sft": []}
    assert made.objective == ("rl", "eval/accuracy")


def test_a_watch_takes_what_it_leaves_unset_from_the_loss():
    (watch,) = plan(copy.deepcopy(CONFIG)).stages["rl"].watch
    assert watch.settings["clip_low"] == 0.1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", None, "stages.test.data: '@task/test' needs a task, and the recipe has none; give task=NAME"),
        ("stages", {}, "stages: a recipe needs at least one stage"),
        ("stages", 3, "stages: expected a mapping, got 3"),
        ("stages.rl.temperature", -1, "stages.rl.temperature: expected more than 0, got -1.0"),
        ("stages.rl.eval.samples", 0, "stages.rl.eval.samples: expected at least 1, got 0"),
        ("stages.sft.policy", "@test", "stages: test -> rl -> sft -> test: each starts from the next, so none can run first"),
        ("stages.sft.policy", "@sft", "stages: sft -> sft: each starts from the next, so none can run first"),
        ("objective", "rl", "objective: stage 'rl' measures no ''; write stage/metric"),
        ("objective", "test/sft/accuracy", "objective: stage 'test' measures no 'sft/accuracy'; write stage/metric"),
        ("track", {"name": "none"}, None),
        ("objective", "rl/reward", None),
        ("objective", "test/rl/accuracy", None),
    ],
)
def test_mistakes_of_the_whole(path, value, message):
    if message is None:
        plan(changed(path, value))
        return
    with pytest.raises(ConfigError) as caught:
        plan(changed(path, value))
    assert str(caught.value).splitlines()[0].partition("; did you")[0].partition(" (known")[0] == message


def test_a_model_directory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert plan(changed("model", {"name": "mine"})).model.settings["path"] == "mine"
    assert plan(changed("model", "owner/name")).model.settings["path"] == "owner/name"
    with pytest.raises(ConfigError, match=r"^model\.name: 'other' is no model of rlx, no directory here and no hub id"):
        plan(changed("model", {"name": "other"}))


def test_cycle_names_only_those_that_wait_for_one_another():
    inputs = {"a": ["b"], "b": ["c"], "c": ["b"], "d": []}
    assert cycle(inputs, ["a", "b", "c"]) == ["b", "c", "b"]
