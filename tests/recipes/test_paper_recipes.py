"""Published settings: every value that a paper recipe changes says where it is from, or that nobody has checked it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from rlx.claims import claim_of
from rlx.compose import HEADER, compose, recipes
from rlx.models.tokenizer import byte_tokenizer
from rlx.paths import CONF
from rlx.plan import plan
from rlx.reproduce import arm_config
from rlx.run import run
from rlx.types import ConfigError

KNOWN = recipes()
PAPERS = [name for name in KNOWN if name.startswith("paper/")]
FILLED, GONE = "a mapping or list", "no value"


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value, for every key and list position of a config; FILLED for a mapping or list that is not empty."""
    inside = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    found = {path: FILLED if inside else node} if path else {}
    for key, value in inside:
        found |= flat(value, f"{path}.{key}" if path else str(key))
    return found


def changed(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """The paths of `new` whose value is another in `old`; for one that is gone, the nearest above it that is still there."""
    found = {path for path, value in new.items() if old.get(path, GONE) != value}
    for path in old.keys() - new.keys():
        while path not in new:
            path = path.rpartition(".")[0]
        found.add(path)
    return found


def unlisted(paths: Iterable[str], listed: Iterable[str]) -> list[str]:
    """The paths that are not listed, and stand below none that is."""
    return sorted(p for p in paths if not any(p == above or p.startswith(f"{above}.") for above in listed))


def composed(name: str) -> dict[str, Any]:
    """The values of a recipe without what it says about itself, and of its model without the sizes of conf/model."""
    config = {k: v for k, v in compose([name]).config.items() if k not in (*HEADER, "recipe")}
    sizes = yaml.safe_load((CONF / "model" / "tiny.yaml").read_text()).keys() - {"name"}
    return flat(config | {"model": {k: v for k, v in config["model"].items() if k not in sizes}})


def parent(name: str) -> str:
    """The recipe that a paper recipe inherits."""
    (only,) = KNOWN[name].read()["defaults"]
    return str(only).removeprefix("/recipe/")


def stand_in(name: str) -> str:
    """The task of the recipe that a paper recipe inherits: it is there without a download."""
    return str(composed(parent(name))["task.name"])


def ancestors(name: str) -> list[str]:
    """The recipes that a recipe inherits, its parent first."""
    above = [str(x).removeprefix("/recipe/") for x in KNOWN[name].read().get("defaults", [])]
    return above + [x for one in above for x in ancestors(one)]


def listed(name: str) -> list[str]:
    """The paths that a recipe accounts for."""
    node = KNOWN[name].read()
    return [*node.get("sources", {}), *node.get("unverified", [])]


@pytest.mark.parametrize("name", PAPERS)
def test_it_binds_and_on_one_gpu_and_as_a_smoke_test_of_the_stand_in_task(name: str) -> None:
    for words in ([], ["scale=gpu1"], ["scale=smoke", f"task={stand_in(name)}"]):
        made = compose([name, *words])
        assert plan(made.config, swapped=made.swapped, given=made.given).stages


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_that_differs_from_the_stand_in_is_sourced_or_unverified(name: str) -> None:
    assert unlisted(changed(composed(parent(name)), composed(name)), listed(name)) == []


@pytest.mark.parametrize("name", PAPERS)
def test_every_listed_path_is_there_and_listed_once(name: str) -> None:
    assert sorted(set(listed(name)) - composed(name).keys()) == []
    assert len(listed(name)) == len(set(listed(name)))


@pytest.mark.parametrize("name", PAPERS)
def test_it_says_what_was_published_and_what_it_needs(name: str) -> None:
    node = KNOWN[name].read()
    for row in node["published"]:
        assert (
            {"metric", "setting", "method", "source"}
            <= row.keys()
            <= {"metric", "setting", "control", "method", "source", "ours"}
        )
    assert node["published"]
    assert list(node["requires"]) == ["gpus", "hours", "gated"]
    assert parent(name) not in PAPERS
    if parent(name) == name.removeprefix("paper/"):  # else another paper's use of the same method
        assert node["paper"]["arxiv"] == KNOWN[parent(name)].read()["paper"]["arxiv"]


@pytest.mark.parametrize("name", [n for n, recipe in KNOWN.items() if n not in PAPERS and recipe.read().get("claim")])
def test_a_claim_has_its_published_settings(name: str) -> None:
    assert any(name in ancestors(paper) for paper in PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_its_claim_is_its_own_and_every_arm_binds_also_as_a_smoke_test(name: str) -> None:
    assert KNOWN[name].read()["claim"] != KNOWN[parent(name)].read()["claim"]
    for words in ([], ["scale=smoke", f"task={stand_in(name)}"]):
        made = compose([name, *words])
        claim = claim_of(made.config)
        assert len(claim.seeds) >= 3
        for arm in claim.names:
            config = arm_config(made.config, claim, arm, {}, 0)
            assert plan(config, swapped=made.swapped, given=made.given).stages


# --------------------------------------------------------------------------- what these recipes alone use
def test_rloo_trains_on_a_reward_model_with_the_model_that_it_starts_from_as_reference(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = byte_tokenizer()
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, num_labels=1, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"post {i} TL;DR:", "completion": " short"} for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["paper/rloo", "scale=smoke", f"task.path={tmp_path}", f"stages.rl.reward.0.path={tmp_path / 'rm'}"]
    run(plan(compose(words).config), tmp_path / "run")
    trained = [json.loads(line) for line in (tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()]
    assert trained[-1]["step"] == 2
    assert trained[-1]["reward"] == trained[-1]["reward/reward_model"] != 0.0
    assert trained[-1]["grad_norm"] > 0.0
    tested = [json.loads(line) for line in (tmp_path / "run/test/metrics.jsonl").read_text().splitlines()]
    assert {row["policy"] for row in tested} == {"start", "rl"}


def test_a_stage_cannot_be_called_model() -> None:
    config = compose(["sft_math"]).config
    config["stages"] = {"model": config["stages"]["sft"]}
    with pytest.raises(ConfigError) as caught:
        plan(config | {"objective": "model/eval/accuracy"})
    expected = "stages.model: @model already means what the recipe starts from; call the stage something else"
    assert str(caught.value) == expected


def test_caps_reach_into_lists() -> None:
    made = compose(["paper/dapo", "scale=gpu1"])
    assert made.config["stages"]["rl"]["reward"][1] == {"name": "soft_overlong", "budget": 256}
    assert "budget 256" in made.notices[0]


# --------------------------------------------------------------------------- the comparison itself
def test_a_change_is_seen_wherever_it_is() -> None:
    old = flat({"a": {"x": 1, "y": [{"n": 1}, {"n": 2}]}, "b": [1], "c": {"z": 1}, "d": 1})
    new = flat({"a": {"x": 2, "y": [{"n": 1}]}, "b": [], "c": None, "d": 1, "e": {"new": 1}})
    assert changed(old, new) == {"a.x", "a.y", "b", "c", "e", "e.new"}


def test_a_listed_path_covers_itself_and_what_is_below_it() -> None:
    assert unlisted(["a.x", "a.xy", "b", "b.c.d"], ["a.x", "b"]) == ["a.xy"]
