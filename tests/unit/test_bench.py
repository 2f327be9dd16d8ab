"""scripts/bench.py: its arithmetic, its data and its verdicts. What it measures is not tested."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import bench
import pytest
from benchmark.clock import Clock, Passes
from benchmark.floor import forward, needed, packed, padded
from benchmark.prepare import prepare
from benchmark.rlx_side import planned
from benchmark.sides import middle, rate, tokens
from benchmark.table import lines
from benchmark.workloads import MEMORY, WORKLOADS, Layout, Workload, groups, rows, settings

from rlx.stages.rows import tokenized

GROUPS = [(10, [3, 5]), (2, [1, 1])]


def test_flops_by_hand() -> None:
    layout = Layout(layers=1, hidden=4, heads=2, kv_heads=1, ffn=8)
    assert layout.body == 4 * 4 + 2 * (4 * 2) + 4 * 4 + 3 * 4 * 8  # query, key and value, output, feed-forward
    pairs = (50 + 30 + 4.5 + 50 + 12.5) + (2 + 2 + 0.5 + 2 + 0.5)  # a prompt's own once
    assert forward(layout, 100, GROUPS) == 2 * 144 * 22 + 4 * 4 * pairs + 2 * 100 * 4 * 10
    assert needed(Workload("x", "grpo", 100, 2, layout=layout), GROUPS) == 4 * forward(layout, 100, GROUPS)
    assert needed(Workload("x", "rm", 100, 2, layout=layout), GROUPS) == 3 * forward(layout, 0, GROUPS)
    assert packed(GROUPS) == [(10, [3]), (10, [5]), (2, [1]), (2, [1])]
    assert padded(GROUPS) == [(10, [5])] * 4


@pytest.mark.parametrize("name", WORKLOADS)
def test_rows_are_the_tokens_that_they_say(name: str, tmp_path: Path) -> None:
    work = WORKLOADS[name]
    prepare(work, tmp_path)
    made = planned(work, tmp_path, "cpu")
    found = made.stages["bench"].data.source.call()  # type: ignore[attr-defined]
    policy = made.model.call(seed=0)
    assert policy.module.num_parameters() == work.layout.body + 256 * (work.vocab + 4 * 2 + 1) + 4 * (256 + 2 * 128)
    if work.kind == "grpo":
        lengths = [len(policy.render(row.task.prompt)) for row in found]
        assert all(work.prompt[0] <= n <= work.prompt[1] for n in lengths)
        assert len(lengths) == work.rows * work.steps
        assert len(policy.end_ids) == work.ends
        return
    turns = [(row.group, row.turns[0]) for row in tokenized(found, policy, None, "data")]
    by_group = [list(same) for _, same in itertools.groupby(turns, lambda x: x[0])]
    assert [(len(same[0][1].seen), [len(t.did) for _, t in same]) for same in by_group] == groups(work)
    assert all(i >= 4 for _, turn in turns for i in [*turn.seen, *turn.did[:-1]])


def test_rows_are_the_same_each_time() -> None:
    assert rows(WORKLOADS["dpo"]) == rows(WORKLOADS["dpo"])
    assert MEMORY["dpo"].vocab == 150_000


def test_micro_batches_of_trl_make_up_the_batch() -> None:
    for work in WORKLOADS.values():
        assert all(work.sequences % setting.micro == 0 for setting in settings(work).values())


class Ticks(Clock):
    """A clock on which each look takes one second."""

    def __init__(self) -> None:
        self.looks = itertools.count()
        super().__init__("cpu")

    def now(self) -> float:
        return float(next(self.looks))


def test_time_inside_another_phase_is_its_own() -> None:
    clock = Ticks()
    inner = clock.timed(lambda: "done", "inner")
    with clock.phase("outer"):
        assert inner() == "done"
    clock.lap()
    assert clock.spent == {"rest": 2.0, "outer": 2.0, "inner": 1.0}


def test_a_worker_reports_each_pass_and_ends_when_nothing_is_asked() -> None:
    out = io.StringIO()
    passes = Passes(Clock("cpu"), 2, [], out, io.StringIO("\n"))
    for prompt in (1, 2, 3):
        passes.played(prompt, [4])
        passes.step()
    with pytest.raises(SystemExit):
        passes.step()
    found = [json.loads(line)["groups"] for line in out.getvalue().splitlines()]
    assert found == [[[1, [4]], [2, [4]]], [[3, [4]]]]


def done(seconds: float, **phases: float) -> dict[str, Any]:
    return {"seconds": seconds, "wall": 2 * seconds, "groups": GROUPS, "phases": phases, "peak": 10 * seconds}


def test_tokens_and_medians() -> None:
    sft, grpo = WORKLOADS["sft_mixed"], WORKLOADS["grpo_short"]
    assert (tokens(grpo, GROUPS), tokens(sft, GROUPS)) == (10, 10 + 20 + 4)
    assert rate(grpo, done(5.0), "wall") == 1.0
    found = middle(grpo, [done(1.0, update=1.0), done(2.0, update=2.0), done(5.0, rest=5.0)], flops=1.0)
    assert found["tokens_per_second"] == 5.0
    assert found["seconds_a_step"] == 1.0  # two steps a pass
    assert found["phases"] == {"update": 0.5, "rest": 0.0}
    assert found["peak_bytes"] == 50.0


@pytest.mark.parametrize(
    ("ratio", "unit", "said"),
    [
        (2.9, "tokens/s", ""),
        (2.8, "tokens/s", "x: 2.80x is worse than the 3.00x of x.json by 7%"),
        (3.1, "bytes", ""),
        (3.2, "bytes", "x: 3.20x is worse than the 3.00x of x.json by 6%"),
    ],
)
def test_a_ratio_that_fell_is_told(ratio: float, unit: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"ratio": 3.0}), encoding="utf-8")
    made = {"name": "x", "ratio": ratio, "unit": unit}
    assert bench.complaint(made, tmp_path / "x.json") == said
    assert bench.complaint(made, tmp_path / "none.json") == ""


@pytest.mark.parametrize(("loss", "gradient", "largest"), [(2e-5, 0, 1), (0, 2e-5, 1), (0, 0, 0), (0, float("nan"), 1)])
def test_sides_that_differ_are_not_timed(loss: float, gradient: float, largest: float) -> None:
    bench.check(WORKLOADS["dpo"], {"loss": 1e-6, "gradient": 1e-6, "largest": 0.1})
    with pytest.raises(bench.Unequal, match="dpo: the two sides do not compute the same"):
        bench.check(WORKLOADS["dpo"], {"loss": loss, "gradient": gradient, "largest": largest})


def test_the_table_has_a_row_a_result(tmp_path: Path) -> None:
    side = {**middle(WORKLOADS["grpo_short"], [done(1.0, update=1.0)], 1e9), "setting": "micro 8"}
    made = {"name": "x", "unit": "tokens/s", "ratio": 2.0, "spread": [1.9, 2.1], "rlx": side, "trl": side, "trl_default": side}
    (tmp_path / "x.json").write_text(json.dumps(made), encoding="utf-8")
    (tmp_path / "y.json").write_text(json.dumps({"unit": "bytes", "line": "y memory 0.5x"}), encoding="utf-8")
    head, rule, row, _, peaks = lines(tmp_path).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert "2.00x" in row
    assert peaks == "* y memory 0.5x"
