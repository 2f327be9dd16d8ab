"""`merge`: sums of weights by hand, what is exact, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlx.data.synth_pref import synth_pref
from rlx.health import health
from rlx.metrics import mean_reward
from rlx.models.load import read, tiny
from rlx.plan import plan
from rlx.stages.context import Context
from rlx.stages.evaluation import Measure
from rlx.stages.merge import Merge, coefficients, weigh
from rlx.track import Lines, Log, NoTracker
from rlx.types import Component, ConfigError, DataRef, ModelRef

SIZES: dict[str, Any] = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 16}
ALONG = {"b": 1.0, "a": -1.0}


def test_a_sum_by_hand() -> None:
    models = {"sft": {"w": torch.tensor([1.0, 2.0])}, "dpo": {"w": torch.tensor([3.0, 2.0])}}
    into = {"w": torch.zeros(2)}
    weigh(into, models, coefficients({"dpo": 1.0}, {"dpo": 1.0, "sft": -1.0}, 0.5))
    assert into["w"].tolist() == [4.0, 2.0]
    weigh(into, models, coefficients({"dpo": 0.5, "sft": 0.5}, {}, 1.0))
    assert into["w"].tolist() == [2.0, 2.0]


def test_a_model_of_weight_0_is_left_out() -> None:
    assert coefficients({"dpo": 1.0}, {"dpo": 1.0, "sft": -1.0}, 0.0) == {"dpo": 1.0}
    assert coefficients({"dpo": 1.0}, {"dpo": 1.0, "sft": -1.0}, -1.0) == {"sft": 1.0}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        tiny(**SIZES, seed=seed).with_heads({"score": "last"}, seed).save(tmp_path / name / "out")
    tiny(**{**SIZES, "ffn": 32}).save(tmp_path / "wide" / "out")
    tiny(**SIZES).save(tmp_path / "headless" / "out")
    return tmp_path


def context(run_dir: Path, **settings: Any) -> Context:
    log = Log(run_dir / "merged", "merged", display=Lines(), tracker=NoTracker(), health=health)
    given = {**SIZES, **settings}
    model = Component("tiny", partial(tiny, **given), settings=given)
    return Context(run_dir=run_dir, name="merged", seed=0, model=model, task=synth_pref(dev=4), log=log)


def merge(**settings: Any) -> Merge:
    models: dict[str, Any] = {name: ModelRef(stage=name) for name in "ab"}
    return Merge(**{"models": models, "terms": {"b": 1.0}, **settings})


def weights(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    policy = read(str(run_dir / name / "out"), {}, seed=5)
    assert policy.heads is not None
    return {**policy.module.state_dict(), **policy.heads.state_dict()}


@pytest.mark.parametrize(("alpha", "same"), [(0.0, "b"), (-1.0, "a")])
def test_the_ends_are_the_models_themselves_bit_by_bit(run_dir: Path, alpha: float, same: str) -> None:
    merge(direction=ALONG, alpha=[alpha]).run(context(run_dir))
    found, wanted = weights(run_dir, "merged"), weights(run_dir, same)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_an_average_with_its_heads_and_tied_embeddings(run_dir: Path) -> None:
    merge(terms={"a": 0.25, "b": 0.75}).run(context(run_dir, lora={"r": 2}))
    a, b, found = (weights(run_dir, name) for name in ("a", "b", "merged"))
    assert found.keys() == a.keys()
    for key in a:
        torch.testing.assert_close(found[key], 0.25 * a[key] + 0.75 * b[key], atol=1e-6, rtol=0)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_the_alpha_with_the_best_metric_is_written(run_dir: Path) -> None:
    # by the length of alpha's answers: the metric is made up, so that which one is best is known
    seen: list[float] = []

    def rising(greedy: list[Any]) -> float:
        seen.append(float(len(seen) == 1))
        return seen[-1]

    measure = Measure(data=DataRef(split="dev"), metrics=[Component("rising", rising, ("greedy",))], max_new_tokens=2)
    last = merge(direction=ALONG, alpha=[0.5, -1.0, 0.25], eval=measure, choose="rising").run(context(run_dir))
    assert last == {"alpha": -1.0, "eval/rising": 1.0}
    found, wanted = weights(run_dir, "merged"), weights(run_dir, "a")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("other", "said"),
    [("wide", "the weight 'model.layers.0.mlp.gate_proj.weight' has the shapes"), ("headless", "'c' has no weight 'heads.")],
)
def test_models_of_other_shapes_are_refused(run_dir: Path, other: str, said: str) -> None:
    models: dict[str, Any] = {"b": ModelRef(stage="b"), "c": ModelRef(stage=other)}
    with pytest.raises(ConfigError, match="models 'b' and 'c' cannot be merged: .*" + said):
        merge(models=models).run(context(run_dir))


def test_what_is_wrong_is_said_before_anything_is_loaded() -> None:
    measure = Measure(data=DataRef(split="dev"), metrics=[Component("mean_reward", mean_reward, ("greedy",))])
    assert merge().problems() == []
    assert "terms.c: the stage has no model 'c'" in merge(terms={"c": 1.0}).problems()[0]
    assert merge(alpha=[0.1, 0.2]).problems() == ["choose: required, because there are several alpha; a metric of `eval`"]
    assert "choose: `eval` measures no 'acc'" in merge(eval=measure, choose="acc").problems()[0]
    assert merge(terms={}, alpha=[]).problems() == [
        "terms: required; the weight of at least one model",
        "alpha: expected at least one number",
    ]


def test_a_plan_runs_it_after_its_models() -> None:
    fit = {"kind": "fit", "data": "@task/demos", "loss": ["nll"], "steps": 1, "lr": 0.1}
    node = {"kind": "merge", "models": {"a": "@sft", "b": "@more"}, "terms": {"b": 1.5, "a": -0.5}}
    stages = {"m": node, "sft": fit, "more": {**fit, "policy": "@sft"}}
    made = plan({"recipe": "x", "seed": 0, "model": {"name": "tiny"}, "task": {"name": "synth_pref"}, "stages": stages})
    assert list(made.stages) == ["sft", "more", "m"]
    assert made.stages["m"].describe() == "1.5 b + -0.5 a"
