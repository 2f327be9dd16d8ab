"""`repeat`: rounds become plain stages, with what each carries to the next."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from rlx.build import Binder
from rlx.claims import claim_of
from rlx.compose import apply_caps
from rlx.plan import plan
from rlx.run import run
from rlx.types import ConfigError
from rlx.unroll import moved, renamed, unrolled

FIT = {"kind": "fit", "data": "@task/demos", "loss": [{"name": "nll"}], "steps": 1, "rows_per_step": 4, "lr": 1e-2}
COLLECT = {
    "kind": "collect",
    "policy": "@policy",
    "data": "@task/train",
    "reward": ["verifier"],
    "group_size": 2,
    "limit": 4,
    "margin": -1,
    "rows": "pairs",
}
LOOP: dict[str, Any] = {
    "kind": "repeat",
    "times": 2,
    "carry": {"policy": "@sft"},
    "stages": {"rows": COLLECT, "more": {**FIT, "policy": "@policy", "data": "@rows", "rows_per_step": 2}},
    "next": {"policy": "@more"},
}
STAGES: dict[str, Any] = {
    "sft": FIT,
    "loop": LOOP,
    "test": {
        "kind": "evaluate",
        "policies": {"one": "@loop-1-more", "last": "@loop"},
        "data": "@task/dev",
        "metrics": ["mean_reward"],
    },
}
MODEL = {"name": "tiny", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 16}


def config(**stages: Any) -> dict[str, Any]:
    task = {"name": "synth_pref", "dev": 2, "max_new_tokens": 4}
    return {"recipe": "x", "seed": 0, "model": MODEL, "task": task, "stages": {**STAGES, **stages}}


def test_each_round_starts_from_what_the_last_one_made() -> None:
    binder = Binder()
    found = unrolled(STAGES, binder)
    assert binder.errors == []
    assert list(found) == ["sft", "loop-1-rows", "loop-1-more", "loop-2-rows", "loop-2-more", "test"]
    assert [found[f"loop-{i}-rows"]["policy"] for i in (1, 2)] == ["@sft", "@loop-1-more"]
    assert [found[f"loop-{i}-more"]["data"] for i in (1, 2)] == ["@loop-1-rows", "@loop-2-rows"]
    assert found["test"]["policies"] == {"one": "@loop-1-more", "last": "@loop-2-more"}
    assert found["loop-1-rows"]["data"] == "@task/train"


def test_stages_without_a_repeat_stay_as_they_are() -> None:
    plain = {name: node for name, node in STAGES.items() if name == "sft"}
    assert unrolled(plain, Binder()) == plain


def test_references_keep_what_follows_the_name() -> None:
    names = {"rl": "@loop-1-rl", "policy": "@sft", "loop/critic": "@loop-2-rl/critic", "loop": "@loop-2-rl"}
    node = ["@rl:best", "@rl/critic", "@rlx", "@policy", "@loop/critic", "@loop:best", {"a": "rl @rl"}, 3]
    wanted = [
        "@loop-1-rl:best",
        "@loop-1-rl/critic",
        "@rlx",
        "@sft",
        "@loop-2-rl/critic",
        "@loop-2-rl:best",
        {"a": "rl @rl"},
        3,
    ]
    assert renamed(node, names) == wanted


def test_several_things_are_carried() -> None:
    loop = {
        "kind": "repeat",
        "times": 2,
        "carry": {"policy": "@sft", "judge": "@sft"},
        "stages": {"more": {**FIT, "policy": "@policy", "reference": "@judge"}},
        "next": {"policy": "@more", "judge": "@policy"},
    }
    found = unrolled({"sft": FIT, "loop": loop, "x": {"models": {"a": "@loop", "b": "@loop/judge"}}}, Binder())
    assert [found[f"loop-{i}-more"]["reference"] for i in (1, 2)] == ["@sft", "@sft"]
    assert found["x"] == {"models": {"a": "@loop-2-more", "b": "@loop-1-more"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"times": 0}, "stages.loop.times: expected at least 1, got 0"),
        ({"timess": 2}, "stages.loop.timess: stage kind 'repeat' takes no 'timess'; did you mean 'times'?"),
        ({"next": {}}, "stages.loop.next.policy: required, because 'policy' is carried"),
        ({"next": {"policy": "@more", "q": "@more"}}, "stages.loop.carry.q: required, because `next` names 'q'"),
        ({"stages": {}}, "stages.loop.stages: a round needs at least one stage"),
        ({"stages": {"sft": FIT}}, "stages.loop.stages.sft: @sft already means something outside"),
        ({"stages": {"policy": FIT}}, "stages.loop.carry.policy: a stage of the round has that name, too"),
        ({"stages": {"again": LOOP}}, "stages.loop.stages.again: a repeat within a repeat"),
        ({"stages": {"more": {**FIT, "lrr": 1}}}, "stages.loop-1-more.lrr: stage kind 'fit' takes no 'lrr'"),
    ],
)
def test_mistakes_are_said_with_their_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(config(loop={**LOOP, **change}))
    assert said in str(caught.value)


def test_what_the_command_line_says_of_a_round_is_said_of_all() -> None:
    paths = ["stages.loop.stages.more.loss.0", "stages.loop", "stages.sft.lr", "model", "stages.loop.times"]
    assert moved(paths, STAGES) == {
        "stages.loop-1-more.loss.0",
        "stages.loop-2-more.loss.0",
        "stages.loop",
        "stages.sft.lr",
        "model",
        "stages.loop.times",
    }


def test_a_scale_holds_the_stages_of_a_round() -> None:
    made = copy.deepcopy({**config(), "caps": {"times": 1, "steps": 2, "set": {"collect": {"margin": -5}}}})
    made["stages"]["loop"]["stages"]["more"]["steps"] = 9
    apply_caps(made)
    loop = made["stages"]["loop"]
    assert (loop["times"], loop["stages"]["more"]["steps"], loop["stages"]["rows"]["margin"]) == (1, 2, -5)


def test_a_claim_may_measure_a_round() -> None:
    claim = {"says": "so", "checks": [{"metric": "loop-2-more/loss", "max": 9.0}]}
    assert claim_of({**config(), "claim": claim}).metrics == ["loop-2-more/loss"]
    claim = {"says": "so", "checks": [{"metric": "loop-3-more/loss", "max": 9.0}]}
    with pytest.raises(ConfigError, match="names no stage"):
        claim_of({**config(), "claim": claim})


def test_a_loop_runs_and_is_taken_up_where_it_was(tmp_path: Path) -> None:
    made = plan(config())
    info = run(made, tmp_path)
    assert info["status"] == "finished"
    assert (tmp_path / "loop-2-rows" / "out" / "rows.jsonl").is_file()
    assert (tmp_path / "loop-1-rows" / "out" / "rows.jsonl").read_text() != (
        tmp_path / "loop-2-rows" / "out" / "rows.jsonl"
    ).read_text()
    assert run(plan(config()), tmp_path)["status"] == "finished"
    assert plan(made.config).config == made.config
