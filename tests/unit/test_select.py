"""select: rows sorted by what a policy makes of them, and the references to what it selects; pass_rate; frozen parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_stages import TRAIN, context

from rlx.compose import compose
from rlx.filters import pass_rate
from rlx.plan import plan
from rlx.run import run
from rlx.stages.select import Select
from rlx.types import Component, ConfigError, Episode, Task


def group(number: int, *rewards: float) -> list[Episode]:
    """The episodes of one prompt."""
    return [Episode(Task(()), number, reward=r) for r in rewards]


def test_pass_rate_by_hand() -> None:
    nan = float("nan")
    episodes = [*group(0, 1, 1), *group(1, 0, 1), *group(2, 0, 0), *group(3, nan, 1), *group(4, nan, nan)]
    kept = {
        name: sorted({e.group for e in pass_rate(episodes, **bounds)})
        for name, bounds in {
            "easy": {"low": 1.0},
            "medium": {"low": 0.01, "high": 0.99},
            "hard": {"high": 0.0},
            "all": {},
        }.items()
    }
    assert kept == {"easy": [0, 3], "medium": [1], "hard": [2], "all": [0, 1, 2, 3]}
    assert len(pass_rate(episodes, low=1.0)) == 4
    assert {e.group for e in pass_rate(group(0, 0.5, 0.5), low=1.0, threshold=0.5)} == {0}


def recipe(**stages: Any) -> dict[str, Any]:
    """A config of given stages on arithmetic, at the sizes of smoke."""
    config = compose(["grpo_math", "scale=smoke"]).config
    return {k: v for k, v in config.items() if k not in ("objective", "claim")} | {"stages": stages}


SORT = {
    "kind": "select",
    "data": "@task/train",
    "reward": [{"name": "length", "scale": 1.0}],
    "samples": 3,
    "limit": 6,
    "max_new_tokens": 8,
    "into": {
        "short": [{"name": "pass_rate", "low": 1.0, "threshold": -7.0}],
        "long": [{"name": "pass_rate", "high": 0.99, "threshold": -7.0}],
    },
}
FIT = {"kind": "fit", "data": "@task/demos", "loss": [{"name": "nll"}], "steps": 1, "rows_per_step": 2, "limit": 4, "lr": 1e-3}
ONLINE = {
    "kind": "online",
    "reward": [{"name": "verifier"}],
    "advantage": [{"name": "group_mean"}],
    "loss": [{"name": "policy_gradient"}],
    "steps": 1,
    "prompts_per_step": 2,
    "group_size": 2,
    "max_new_tokens": 4,
    "lr": 1e-3,
}


def test_selections_partition_the_rows_and_can_be_trained_on(tmp_path: Path) -> None:
    made = plan(recipe(rl={**ONLINE, "data": "@sort/all"}, sort={**SORT, "into": {**SORT["into"], "all": []}, "empty": "all"}))
    assert list(made.stages) == ["sort", "rl"]
    run(made, tmp_path)
    out = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "sort/out").glob("*.json")}
    assert set(out) == {"short", "long", "all"}
    assert made.task is not None
    rows = [row.group for row in made.task.splits["train"]()[:6]]
    assert out["all"] == {"split": "train", "groups": rows}
    if out["short"]["groups"] != rows != out["long"]["groups"]:
        assert sorted(out["short"]["groups"] + out["long"]["groups"]) == sorted(rows)
    (line,) = [json.loads(x) for x in (tmp_path / "sort/metrics.jsonl").read_text().splitlines()]
    assert line["share/all"] == 1.0
    assert line["spent/rollouts"] == 18


def test_what_could_not_be_scored_is_in_no_selection(tmp_path: Path) -> None:
    def reward(episodes: list[Episode]) -> list[float]:
        bad = {"a": 2, "b": 1}.get(episodes[0].task.prompt[0].text, 0)
        return [float("nan") if i < bad else 1.0 for i in range(len(episodes))]

    mine: list[Component[Any]] = [Component("mine", reward)]
    several = Component("several", lambda episodes: [e for e in episodes if sum(x.group == e.group for x in episodes) > 1])
    select = Select(data=TRAIN, into={"any": [], "several": [several]}, reward=mine, samples=2, limit=3)
    metrics = select.run(context(tmp_path, "sort"))
    found = [json.loads((tmp_path / f"sort/out/{name}.json").read_text())["groups"] for name in ("any", "several")]
    assert found == [[1, 2], [2]]
    assert [metrics[k] for k in ("share/any", "share/several", "reward", "reward/failures", "kept")] == [
        2 / 3,
        1 / 3,
        1,
        3,
        0.5,
    ]


def test_shares_are_of_groups(tmp_path: Path) -> None:
    mine: list[Component[Any]] = [Component("mine", lambda episodes: [1.0] * len(episodes))]
    ctx = context(tmp_path, "sort")
    ctx.rows["/train"] = [row for row in ctx.data(TRAIN) for _ in range(2)]
    assert Select(data=TRAIN, into={"any": []}, reward=mine, samples=1, limit=2).run(ctx)["share/any"] == 1.0


def test_a_selection_without_a_row_is_a_mistake(tmp_path: Path) -> None:
    into = {"right": [{"name": "pass_rate", "low": 1.0, "threshold": 5.0}]}
    with pytest.raises(ConfigError, match=r"stages\.sort\.into\.right: no row passes its filters \(mean reward "):
        run(plan(recipe(sort={**SORT, "into": into})), tmp_path)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"rl": {**ONLINE, "data": "@sort/shrt"}, "sort": SORT}, "stages.rl.data: stage 'sort' selects no 'shrt'"),
        ({"rl": {**ONLINE, "data": "@sort"}, "sort": SORT}, "stages.rl.data: stage 'sort' writes no rows"),
        ({"rl": {**ONLINE, "data": "@fit/x"}, "fit": FIT}, "stages.rl.data: stage 'fit' selects no 'x'"),
        ({"sort": {**SORT, "into": {}}}, "stages.sort.into: required; name at least one selection"),
        ({"sort": {**SORT, "data": {"name": "jsonl", "path": "x"}}}, "stages.sort.data: expected a split of the task"),
    ],
)
def test_mistakes(stages: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(recipe(**stages))
    assert message in str(caught.value)


# --------------------------------------------------------------------------- frozen parts
def test_a_frozen_part_has_no_part_that_is_not_there(tmp_path: Path) -> None:
    made = plan(recipe(sft={**FIT, "models": {"policy": {"freeze": ["self_atn"]}}}))
    with pytest.raises(ConfigError, match=r"stages\.sft: freeze: the model has no part 'self_atn'.*self_attn"):
        run(made, tmp_path)
