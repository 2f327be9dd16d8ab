"""`collect`: answers become rows, rows become data; labels of a judge do not depend on the order of the answers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from rlx.data.files import jsonl
from rlx.data.formats import turn
from rlx.data.write import FORMS, all_pairs, answered, pairs
from rlx.envs.single import SingleTurn
from rlx.health import health
from rlx.llm.rules import rules
from rlx.losses import likelihood
from rlx.models.load import tiny
from rlx.plan import plan
from rlx.rewards.judge import judge
from rlx.rewards.rules import answer_match
from rlx.rollout.samplers import given
from rlx.stages.collect import Collect
from rlx.stages.context import Context
from rlx.stages.fit import Fit
from rlx.stages.rows import first
from rlx.track import Lines, Log, NoTracker
from rlx.types import Component, ConfigError, DataError, DataRef, Episode, Image, Message, Status, Task, TaskSource

SIZES = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}
QUESTIONS = [Episode(Task((Message("user", x),), answer=x, meta={"level": i}), i) for i, x in enumerate("abcd")]
PAIRED = [
    Episode(Task((Message("user", x),)), i, [turn(text)], Status.FINISHED, label=label)
    for i, x in enumerate("ab")
    for text, label in (("good", -1.0), ("bad", 1.0))
]
TASK = TaskSource({"train": lambda: QUESTIONS, "pairs": lambda: PAIRED}, answer_match, SingleTurn, max_new_tokens=5)
NLL = Component("nll", likelihood.nll, ("logp", "mask"))


def context(run_dir: Path, name: str = "rows", seed: int = 0) -> Context:
    log = Log(run_dir / name, name, display=Lines(), tracker=NoTracker(), health=health)
    model = Component("tiny", partial(tiny, **SIZES), settings=SIZES)  # type: ignore[arg-type]
    return Context(run_dir=run_dir, name=name, seed=seed, model=model, task=TASK, log=log)


def first_byte(episodes: list[Episode]) -> list[float]:
    return [float(sum(e.turns[0].did) % 7) for e in episodes]


def collect(reward: Any = first_byte, **settings: Any) -> Collect:
    made: dict[str, Any] = {"data": DataRef(split="train"), "rows": "pairs", "group_size": 4, **settings}
    return Collect(reward=[Component("mine", reward)], **made)


def rows(run_dir: Path, name: str = "rows") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name / "out" / "rows.jsonl").read_text().splitlines()]


def scored(*rewards: float) -> list[Episode]:
    made = [Episode(Task((Message("user", "q"),)), 0, [turn(f"a{i}")], reward=r) for i, r in enumerate(rewards)]
    return made


# --------------------------------------------------------------------------- groups -> rows
def test_pairs_are_the_best_and_the_worst() -> None:
    (row,) = pairs(scored(0.5, 2.0, -1.0), 0.0)
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("a1", "a2")
    assert (row["chosen_reward"], row["rejected_reward"]) == (2.0, -1.0)
    assert pairs(scored(1.0, 1.0), 0.0) == []
    assert pairs(scored(1.0, 0.5), 0.5) == []
    assert len(pairs(scored(1.0, 1.0), -1.0)) == 1
    assert pairs(scored(1.0), -1.0) == []


def test_all_pairs_leaves_out_ties() -> None:
    found = {(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in all_pairs(scored(0.0, 1.0, 1.0), 0.0)}
    assert found == {("a1", "a0"), ("a2", "a0")}


def test_the_forms_are_those_of_the_stage() -> None:
    assert set(FORMS) == set(get_args(get_type_hints(Collect)["rows"]))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_what_is_written_is_read_back(form: str, tmp_path: Path) -> None:
    prompt = (Message("system", "be kind"), Message("user", "q"))
    talk = [turn("one", [Message("user", "go on")]), turn("two")]
    group = [Episode(Task(prompt, "gold", {"level": 3}), 0, talk, reward=r) for r in (1.0, 0.0)]
    from rlx.data.write import jsonl as write

    write(FORMS[form](group, 0.0), tmp_path / "rows.jsonl")
    found = jsonl(path=str(tmp_path / "rows.jsonl"))
    assert all(e.task.prompt == prompt and e.task.answer == "gold" and e.task.meta["level"] == 3 for e in found)
    assert len(found) == {"pairs": 2, "all_pairs": 2, "demonstrations": 2, "best": 1}[form]
    assert [e.label for e in found] == ([1.0, -1.0] if "pairs" in form else [1.0] * len(found))
    assert all(answered(e) == answered(group[0]) for e in found)


def test_a_picture_is_not_text() -> None:
    picture = Message("user", (Image(np.zeros((1, 1, 3), np.uint8)),))
    with pytest.raises(ConfigError, match="picture"):
        pairs([Episode(Task((picture,)), 0, [turn(x)], reward=float(i)) for i, x in enumerate("ab")], 0.0)


# --------------------------------------------------------------------------- the stage
def test_collect_writes_what_fit_reads(tmp_path: Path) -> None:
    found = collect(prompts_per_step=3).run(context(tmp_path))
    written = rows(tmp_path)
    assert found["rows"] == len(written) >= 2
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in written)
    assert found["margin"] == pytest.approx(np.mean([row["chosen_reward"] - row["rejected_reward"] for row in written]))
    assert found["episodes"] == 16.0
    assert [row["level"] for row in written] == sorted(row["level"] for row in written)
    fit = Fit(data=DataRef(stage="rows"), loss=[NLL], steps=1, lr=1e-3, rows_per_step=2)
    assert np.isfinite(fit.run(context(tmp_path, "sft"))["loss"])


def test_collect_repeats_and_does_not_depend_on_its_steps(tmp_path: Path) -> None:
    for name, settings in {"x": {}, "y": {}, "z": {"rows": "demonstrations"}}.items():
        collect(**settings).run(context(tmp_path / name))
    assert rows(tmp_path / "x") == rows(tmp_path / "y")
    assert len(rows(tmp_path / "z")) == 16


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    from rlx.data.write import jsonl as write

    write(
        pairs([Episode(QUESTIONS[0].task, 0, [turn(x)], reward=r) for x, r in (("", 0.0), ("b", 1.0))], 0.0),
        tmp_path / "x.jsonl",
    )
    with pytest.raises(DataError, match="expected text that is not empty"):
        jsonl(path=str(tmp_path / "x.jsonl"))
    (tmp_path / "rows" / "out").mkdir(parents=True)
    (tmp_path / "x.jsonl").rename(tmp_path / "rows" / "out" / "rows.jsonl")
    assert [e.completion for e in context(tmp_path, "dpo").data(DataRef(stage="rows"))] == ["b", ""]


def test_limit_and_best(tmp_path: Path) -> None:
    assert collect(rows="best", limit=2).run(context(tmp_path))["rows_per_prompt"] == 1.0
    assert [row["answer"] for row in rows(tmp_path)] == ["a", "b"]


def test_limit_cuts_no_group(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    assert [(e.group, e.label) for e in ctx.data(DataRef(split="pairs"), 1)] == [(0, -1.0), (0, 1.0)]
    assert len(ctx.data(DataRef(split="pairs"), 9)) == len(ctx.data(DataRef(split="pairs"))) == 4
    apart = [QUESTIONS[i] for i in (0, 1, 0, 2)]
    assert [e.group for e in first(apart, 1)] == [0, 0]
    assert [e.group for e in first(apart, 2)] == [0, 1, 0]


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stages.rows: none of 4 prompts made a row \(rows: pairs, 16 of 16 answers kept\)"):
        collect(lambda episodes: [1.0] * len(episodes)).run(context(tmp_path))


def test_a_judge_labels_the_answers_of_the_data_without_a_policy(tmp_path: Path) -> None:
    fair = {r"answer A\]\ngood": "[[A]]", r"answer B\]\ngood": "[[B]]"}
    reward = partial(judge, llm=Component("rules", partial(rules, answers=fair)))
    stage = collect(reward, data=DataRef(split="pairs"), sampler=Component("given", given), group_size=1)
    assert stage.problems() == []
    ctx = context(tmp_path)
    ctx.model = Component("broken", lambda **_: 1 / 0)  # nothing is loaded
    stage.run(ctx)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows(tmp_path)] == [("good", "bad")] * 2


def test_what_could_not_be_scored_is_not_written(tmp_path: Path) -> None:
    found = collect(lambda group: [float("nan"), *[1.0] * (len(group) - 1)], rows="demonstrations").run(context(tmp_path))
    assert (found["rows"], found["reward/failures"]) == (12.0, 4.0)
    assert {row["reward"] for row in rows(tmp_path)} == {1.0}


def test_given_needs_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompts without an answer"):
        collect(sampler=Component("given", given)).run(context(tmp_path))


def test_a_plan_knows_that_collect_writes_rows() -> None:
    config: dict[str, Any] = {
        "recipe": "x",
        "seed": 0,
        "model": {"name": "tiny"},
        "task": {"name": "synth_pref"},
        "stages": {
            "dpo": {"kind": "fit", "data": "@rows", "loss": [{"name": "nll"}], "steps": 1, "lr": 0.1},
            "rows": {
                "kind": "collect",
                "data": "@task/train",
                "reward": [{"name": "judge", "llm": {"name": "local", "model": "policy"}}],
                "group_size": 2,
                "rows": "pairs",
            },
        },
    }
    assert list(plan(config).stages) == ["rows", "dpo"]
    config["stages"]["rows"] |= {"group_size": 1, "reward": [{"name": "judge", "llm": {"name": "local", "model": "judg"}}]}
    with pytest.raises(ConfigError) as caught:
        plan(config)
    assert "stages.rows.group_size: rows: pairs compares the answers to a prompt; 2 or more are needed" in str(caught.value)
    assert "the stage has no such model; did you mean" in str(caught.value) or "has llm.model='judg'" in str(caught.value)
