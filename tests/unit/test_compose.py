"""Command line -> config: short words, inheritance, caps, and what the command line changed."""

from pathlib import Path

import pytest

from rlx.compose import Numbers, apply_caps, compose, given_paths, override, prepare, recipes, swapped, words
from rlx.plan import plan
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
    assert apply_caps(config) == [
        "scale=smoke holds the stages to at most steps 2; sets limit 4 where there is none; what you give yourself stays"
    ]
    assert config["stages"] == {
        "a": {"steps": 2, "eval": {"every": 1, "limit": 4}},
        "b": {"steps": 1, "kind": "evaluate", "limit": 4},
    }


def test_caps_hold_what_the_arms_of_a_claim_change_without_a_word():
    config = {
        "scale": "smoke",
        "caps": {"steps": 2, "limit": 4, "budget": 8},
        "stages": {"a": {"steps": 1}},
        "claim": {
            "common": {"stages.a.steps": 9, "stages.b": {"steps": 9, "eval": {"limit": 9}}, "stages.a.lr": 9},
            "arms": {"x": {"stages.a.eval.limit": 9, "stages.a.reward": [{"name": "r", "budget": 9}], "stages.a.steps": 1}},
        },
    }
    assert apply_caps(config) == []
    assert config["claim"] == {
        "common": {"stages.a.steps": 2, "stages.b": {"steps": 2, "eval": {"limit": 4}}, "stages.a.lr": 9},
        "arms": {"x": {"stages.a.eval.limit": 4, "stages.a.reward": [{"name": "r", "budget": 8}], "stages.a.steps": 1}},
    }


def test_what_a_scale_gives_where_the_recipe_gives_nothing():
    config = {
        "caps": {"limit": 4, "unset": {"fit": {"limit": 64}, "evaluate": {"limit": 4, "max_new_tokens": 8}}},
        "stages": {
            "sft": {"kind": "fit", "eval": {"every": 1}},
            "short": {"kind": "fit", "limit": 2},
            "rl": {"kind": "online", "eval": {"limit": 3, "max_new_tokens": 6}},
            "test": {"kind": "evaluate", "max_new_tokens": 5},
            "gone": None,
        },
    }
    assert apply_caps(config) == [
        "scale=None sets limit 64, limit 4, max_new_tokens 8 where there is none; what you give yourself stays"
    ]
    assert config["stages"] == {
        "sft": {"kind": "fit", "limit": 64, "eval": {"every": 1, "limit": 4, "max_new_tokens": 8}},
        "short": {"kind": "fit", "limit": 2},
        "rl": {"kind": "online", "eval": {"limit": 3, "max_new_tokens": 6}},
        "test": {"kind": "evaluate", "limit": 4, "max_new_tokens": 5},
        "gone": None,
    }


def test_a_smoke_test_of_a_shipped_recipe_reads_few_rows():
    stages = compose(["sft_math", "scale=smoke"]).config["stages"]
    assert (stages["sft"]["steps"], stages["sft"]["limit"], stages["sft"]["eval"]["limit"]) == (2, 64, 4)
    assert (stages["test"]["limit"], stages["test"]["max_new_tokens"]) == (4, 8)
    claim = compose(["rloo", "scale=smoke"]).config["claim"]
    assert claim["common"]["stages.variance.steps"] == 2
    assert claim["common"]["stages.variance"]["prompts_per_step"] == 2


def test_numbers_in_recipes():
    import yaml

    assert yaml.load("[1e-4, 1E5, .5, 2.5, 1, 1.0.0, 5e]", Loader=Numbers) == [1e-4, 1e5, 0.5, 2.5, 1, "1.0.0", "5e"]


def test_a_recipe_outside_the_folder_cannot_be_named(mine):
    with pytest.raises(ConfigError, match=r"^recipe=\.\./parent: no recipe is called '\.\./parent'; did you mean 'parent'"):
        compose(["recipe=../parent"], mine)


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("++seed=1", ["seed"]),
        ("scale=smoke", ["scale"]),
        ("++stages.rl.loss=[{name: nll, x: 1}]", ["stages.rl.loss"]),
        ("++task={name: gsm8k, a: {b: 1}}", ["task.name", "task.a.b"]),
        ("~stages.rl.eval", ["stages.rl.eval"]),
    ],
)
def test_the_paths_that_an_override_gives(text, paths):
    assert given_paths(text) == paths


def test_a_misspelt_key_in_a_list_of_the_command_line_is_an_error(mine):
    made = compose(["parent", "stages.sft.loss=[{name: entropy, weigth: 2.0}]"], mine)
    with pytest.raises(
        ConfigError, match=r"^stages\.sft\.loss\.0\.weigth: loss 'entropy' takes no 'weigth'; did you mean 'weight'"
    ):
        plan(made.config, swapped=made.swapped, given=made.given)


def test_what_a_swapped_task_does_not_take_is_gone_from_the_plans_config(mine):
    made = compose(["parent", "task=gsm8k"], mine)
    found = plan(made.config, swapped=made.swapped, given=made.given)
    assert found.notices == ["task.digits: dropped, because task 'gsm8k' takes no 'digits'"]
    assert (found.config["task"], made.config["task"]) == ({"name": "gsm8k"}, {"name": "gsm8k", "digits": 2})
    assert plan(found.config).notices == []
    made = compose(["parent", "task={name: gsm8k, digit: 2}"], mine)
    with pytest.raises(ConfigError, match=r"^task\.digit: task 'gsm8k' takes no 'digit'"):
        plan(made.config, swapped=made.swapped, given=made.given)


def test_the_config_holds_the_sizes_of_a_named_model(mine):
    sizes = {"layers": 4, "hidden": 128, "heads": 4, "kv_heads": 4, "ffn": 384}
    assert compose(["grpo_math"]).config["model"] == {"name": "tiny", **sizes}
    assert compose(["parent", "model.hidden=64"], mine).config["model"] == {"name": "tiny", **sizes, "layers": 2, "hidden": 64}
    smoke = compose(["grpo_math", "scale=smoke"]).config["model"]
    assert smoke == {"name": "tiny", "layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}


def test_what_the_user_gives_stays_whatever_the_scale_says():
    keep = "stages.rl.keep=[{name: correct}]"
    composed = compose(["grpo_math", "scale=smoke", keep, "stages.rl.steps=5", "stages.test.limit=7"])
    stages = composed.config["stages"]
    assert (stages["rl"]["keep"], stages["rl"]["steps"], stages["test"]["limit"]) == ([{"name": "correct"}], 5, 7)
    assert stages["rl"]["prompts_per_step"] == 2
    held, model = compose(["dapo", "scale=smoke"]).notices
    assert "; stages.rl.keep is []; " in held
    assert model == "scale=smoke makes the model small: layers 2, hidden 32, heads 2, kv_heads 2, ffn 64"


def test_a_smoke_test_keeps_the_kind_of_a_model_of_rlxs_own(mine):
    small = {"name": "tiny_t5", "layers": 2, "hidden": 32, "heads": 2, "ffn": 64}
    own = small | {"letters": "abcdefghijkl"}
    assert compose(["rlgf", "scale=smoke"]).config["model"] == own
    assert compose(["rlgf", "scale=smoke", "model.hidden=48"]).config["model"] == own | {"hidden": 48}
    assert compose(["parent", "scale=smoke", "model=tiny_t5"], mine).config["model"] == small


@pytest.mark.parametrize("recipe", ["parent", "child"])
def test_sizes_go_without_a_word_when_another_model_is_put_in_place(mine, recipe):
    made = compose([recipe, "model=a/b", "model.dtype=bf16", "scale=smoke"], mine)
    assert made.config["model"] == {"name": "a/b", "dtype": "bf16"}
    assert not [n for n in plan(made.config, swapped=made.swapped, given=made.given).notices if n.startswith("model")]
    made = compose([recipe, "model=a/b", "model.layers=3"], mine)
    with pytest.raises(ConfigError, match=r"^model\.layers: model 'pretrained' takes no 'layers'"):
        plan(made.config, swapped=made.swapped, given=made.given)


def test_a_resolver_is_found_in_what_the_yaml_means_and_not_in_its_comments(mine):
    (mine / "fine.yaml").write_text("# not like ${oc.env:HOME}\n" + PARENT)
    assert compose(["fine"], mine).config["purpose"] == "parent"
    for bad in ('purpose: "\\x24{oc.env:HOME}"', 'paper: {"${oc.env:HOME}": 1}', "stages: [{a: ['${oc.env:HOME}']}]"):
        (mine / "bad.yaml").write_text(bad + "\n")
        with pytest.raises(ConfigError) as caught:
            compose(["bad"], mine)
        said = "'${oc.env:' is a resolver; a recipe may only refer to its own keys"
        assert str(caught.value) == f"{mine / 'bad.yaml'}: {said}"


def test_a_smoke_test_samples_a_few_tokens_where_the_stage_sets_no_limit():
    stages = compose(["grpo_math", "scale=smoke"]).config["stages"]
    assert stages["rl"]["max_new_tokens"] == 8
    assert compose(["grpo_math", "scale=smoke", "stages.rl.max_new_tokens=3"]).config["stages"]["rl"]["max_new_tokens"] == 3


def test_on_is_a_key_and_not_a_truth_value(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("on: yes\na: [true, off, 1e-4]\n")
    assert recipes(tmp_path)["x"].read() == {"on": "yes", "a": [True, "off", 1e-4]}
