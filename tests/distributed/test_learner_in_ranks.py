"""Two ranks take the same steps as one process: any split, masks, groups, coupled terms, a rank without tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from started import run

SCRIPT = Path(__file__).with_name("learn.py")


def learned(file: Path, *stages: str) -> Any:
    run(SCRIPT, file, *stages)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return learned(tmp_path_factory.mktemp("alone") / "found.json")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return learned(tmp_path_factory.mktemp("ranks") / "found.json", "0", "1", "2", "3")


def close(steps: list[dict[str, float]], expected: list[dict[str, float]], what: str) -> None:
    assert len(steps) == len(expected)
    for i, (step, there) in enumerate(zip(steps, expected, strict=True)):
        assert step.keys() == there.keys()
        for key, value in step.items():
            assert value == pytest.approx(there[key], rel=1e-5, abs=1e-5), (what, i, key)


def some(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """The two updates of four with which a learner is replaced; in bfloat16 there is one."""
    return steps[:7] + steps[21:]


def test_two_ranks_learn_what_one_process_learns(alone: Any, ranks: Any) -> None:
    assert all(step["grad_norm"] > 1e-3 for step in alone if "grad_norm" in step)
    assert len(alone) == 4 * 7
    for stage in ("0", "1", "2", "3"):
        close(ranks["steps"][stage], alone, stage)


def test_a_learner_that_goes_on_from_a_state_is_the_unbroken_one(ranks: Any) -> None:
    assert len(ranks["again"]) == 8
    for stage, steps in ranks["again"].items():
        assert steps == some(ranks["steps"][stage]), stage


def test_a_learner_goes_on_under_another_stage(alone: Any, ranks: Any) -> None:
    assert list(ranks["other"]) == ["0 3", "1 0", "2 1", "3 2"]
    for stages, steps in ranks["other"].items():
        close(steps, some(alone), stages)


def test_each_rank_goes_on_with_its_own_random_numbers(ranks: Any) -> None:
    assert ranks["drawn"] == [True, True, True]


def test_an_optimiser_that_cannot_be_divided_is_refused(ranks: Any) -> None:
    assert ranks["refused"] == (
        "optim 'pooled': its state 'ends' is not one number for each weight, and ZeRO gives it weights cut into flat parts, "
        "on which it is another method; take launch=zero0 or launch=local"
    )
