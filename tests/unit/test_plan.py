"""A composed config -> a plan."""

import copy

import numpy as np
import pytest

from rlx.plan import plan, without
from rlx.references import cycle
from rlx.types import ConfigError, Episode, Message, Task, Turn

NO = np.zeros(0, np.int64)
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("task", "stages.task: @task already means the recipe's task; call the stage something else"),
        ("../x", "stages: '../x': a stage's name is made of letters, digits, '_', '-' and '.', and begins with no '.'"),
        (".x", "stages: '.x': a stage's name is made of letters, digits, '_', '-' and '.', and begins with no '.'"),
        ("a b", "stages: 'a b': a stage's name is made of letters, digits, '_', '-' and '.', and begins with no '.'"),
        ("a-1.b_c", None),
    ],
)
def test_names_of_stages(name, message):
    config = copy.deepcopy(CONFIG)
    config["stages"][name] = copy.deepcopy(config["stages"]["sft"])
    if message is None:
        assert name in plan(config).stages
        return
    with pytest.raises(ConfigError) as caught:
        plan(config)
    assert str(caught.value) == message


def test_the_reward_verifier_is_the_tasks_own():
    def paid(**task) -> list[float]:
        config = changed("stages.rl.reward", [{"name": "verifier", "weight": 2.0}])
        config["task"] = {"name": "arithmetic", "digits": 2, **task}
        made = plan(config)
        (reward,) = made.stages["rl"].reward
        assert (reward.name, reward.weight) == ("verifier", 2.0)
        told = Episode(Task((Message("user", "1+1="),), "2"), 0, [Turn(NO, NO, NO, said=Message("assistant", "so it is 2"))])
        return reward.call([told])

    assert paid() == [0.0]  # the whole answer has to be the number
    assert paid(filler=2) == [1.0]  # the last number of the answer


def test_the_reward_verifier_needs_a_task():
    config = changed("stages.rl.reward", "verifier")
    rows = {"name": "hub", "path": "owner/name"}
    config |= {"task": None, "objective": "rl/reward"}
    config["stages"] = {"rl": config["stages"]["rl"] | {"policy": None, "data": rows, "eval": None}}
    with pytest.raises(ConfigError) as caught:
        plan(config)
    assert str(caught.value) == "stages.rl.reward: the recipe has no task, so it has no verifier; give task=NAME"


def test_a_trusted_model_does_not_vouch_for_others():
    config = changed("model", {"name": "a/b", "trust_remote_code": True})
    with pytest.raises(ConfigError, match=r"^model\.trust_remote_code: would run code .* add --trust a/b$"):
        plan(config)
    config["stages"]["test"]["policies"]["other"] = "c/d"
    with pytest.raises(ConfigError) as caught:
        plan(config, trusted=["a/b"])
    assert str(caught.value) == (
        "stages.test.policies.other: with model.trust_remote_code this would run code that comes with the model; "
        "to allow it add --trust c/d"
    )
    assert plan(config, trusted=["a/b", "c/d"]).model.settings["trust_remote_code"] is True
    config["stages"]["rl"]["models"] = {"old": {"from": "e/f"}}
    with pytest.raises(ConfigError, match=r"^stages\.rl\.models\.old\.from: .* add --trust e/f$"):
        plan(config, trusted=["a/b", "c/d"])


WRITERS = {
    "collect": ({"reward": "answer_match", "rows": "best"}, "rows, which `data` takes"),
    "select": ({"into": {"some": ["mixed_groups"]}}, "selections of rows, which `data` takes"),
    "evaluate": ({"policies": {"base": "@model"}, "metrics": ["accuracy"]}, "metrics"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_weights_come_from_a_stage_that_writes_some(kind):
    settings, writes = WRITERS[kind]
    config = changed("stages.rl.policy", "@before:best")
    config["stages"]["before"] = {"kind": kind, "data": "@task/dev", **settings}
    config["stages"]["rl"]["models"] = {"old": {"from": "@before"}}
    with pytest.raises(ConfigError) as caught:
        plan(config)
    assert str(caught.value).splitlines() == [
        f"stages.rl.policy: '@before:best' names weights, and stage 'before' writes {writes}",
        f"stages.rl.models.old.from: '@before' names weights, and stage 'before' writes {writes}",
    ]


@pytest.mark.parametrize(
    ("base", "old", "told"),
    [
        ("tiny_vlm", {}, ("policy", "tiny_vlm")),
        ("tiny_t5", {"from": "@sft"}, ("policy", "tiny_t5")),
        ("tiny", {"model": "tiny_t5"}, ("old", "tiny_t5")),
        ("tiny", {"from": "@sft"}, None),
        ("owner/name", {"from": "@sft"}, None),  # seen when it is loaded
    ],
)
def test_only_causal_language_models_are_mixed(base, old, told):
    config = changed("model", {"name": base})
    config["stages"]["rl"]["models"] = {"old": old, "both": {"mix": {"policy": 0.5, "old": 0.5}}}
    if told is None:
        assert plan(config).stages["rl"].specs()["both"].mix
        return
    with pytest.raises(ConfigError) as caught:
        plan(config)
    part, kind = told
    assert str(caught.value).splitlines()[0] == (
        f"stages.rl.models.both.mix: {part!r} is a model {kind!r}, which cannot be mixed; a mixture is of causal language "
        "models of text alone"
    )


def test_dropped_keys_leave_the_config_wherever_they_stood():
    config = {"a": {"b": [{"x": 1, "y": 2}]}, "c": {"name": "n", "z": 3}}
    assert without(config, ["a.b.0.x", "c.0.z"]) == {"a": {"b": [{"y": 2}]}, "c": {"name": "n"}}
    assert config["c"]["z"] == 3
