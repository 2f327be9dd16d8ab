"""Two ranks take the same steps as one process: any split, masks, groups, coupled terms, a rank without tokens.

And for every loss of the catalogue under every reduction they get its loss, gradient and metrics. What a frozen model says
is known to both if the first knows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fill
import learn
import pytest
import torch
import walk
from catalogued import cases, check

from rlx.ranks import free_port


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks find, started as a launcher would. A start takes seconds, so that there is one for all."""
    file = tmp_path_factory.mktemp("ranks") / "found.pt"
    own = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(Path(__file__).with_name("in_ranks.py")), str(file)]
    children = [subprocess.Popen(command, env={**own, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    return torch.load(file)


@pytest.fixture(scope="module")
def ranks(found: Any) -> Any:
    return found["learned"]


@pytest.fixture(scope="module")
def alone() -> Any:
    return learn.in_one()


def close(steps: list[dict[str, float]], expected: list[dict[str, float]], what: str) -> None:
    assert len(steps) == len(expected)
    for i, (step, there) in enumerate(zip(steps, expected, strict=True)):
        assert step.keys() == there.keys()
        for key, value in step.items():
            assert value == pytest.approx(there[key], rel=1e-5, abs=1e-5), (what, i, key)


def some(steps: list[dict[str, float]], num: int) -> list[dict[str, float]]:
    """The updates with which a learner is replaced, by the number of their lines: the first, or the first and the last."""
    assert num in (7, 14)
    return (steps[:7] + steps[-7:])[:num]


def test_two_ranks_learn_what_one_process_learns(alone: Any, ranks: Any) -> None:
    without = [i for i, step in enumerate(alone) if step.get("grad_norm", 1.0) <= 1e-3]
    assert without == [22, 25]  # the second batch, of which nothing is paid
    assert len(alone) == 5 * 7
    for stage in ("0", "1", "2", "3"):
        close(ranks["steps"][stage], alone, stage)


def test_a_learner_that_goes_on_from_a_state_is_the_unbroken_one(ranks: Any) -> None:
    assert len(ranks["again"]) == 8
    for stage, steps in ranks["again"].items():
        assert steps == some(ranks["steps"][stage], len(steps)), stage


def test_a_learner_goes_on_under_another_stage(alone: Any, ranks: Any) -> None:
    assert list(ranks["other"]) == ["0 3", "1 0", "2 1", "3 2", "offloaded 3 2"]
    for stages, steps in ranks["other"].items():
        close(steps, some(alone, len(steps)), stages)


def test_a_gradient_is_used_once(ranks: Any) -> None:
    """Also where it is kept in the host's memory: a weight without one in the next step stays where it is."""
    assert ranks["moved"] == [[True, False]] * 5


def test_each_rank_goes_on_with_its_own_random_numbers(ranks: Any) -> None:
    assert ranks["drawn"] == [True, True, True]


def test_tasks_that_every_rank_has_stay_its_own(ranks: Any) -> None:
    assert ranks["shared"] == [True, True]


def test_ranks_share_a_budget_of_requests(ranks: Any) -> None:
    assert ranks["budget"] == [[None, 1, 3, 4], [None, 0, 2, 4]]


def test_an_optimiser_that_cannot_be_divided_is_refused(ranks: Any) -> None:
    assert ranks["refused"] == (
        "optim 'pooled': its state 'ends' is not one number for each weight, and ZeRO gives it weights cut into flat parts, "
        "on which it is another method; take launch=zero0 or launch=local"
    )


def test_every_loss_is_the_same_in_two_ranks(found: Any) -> None:
    """Tokens are shared unequally, and in a second step one has none."""
    expected, ranks = walk.in_one(), found["walked"]
    assert list(ranks) == ["2", "3"]
    for stage, losses in ranks.items():
        assert list(losses) == list(expected) == [str(case) for case in cases()]
        assert sum(tokens[0] != tokens[1] for (_, tokens), _ in losses.values()) > len(losses) / 2
        for case, steps in losses.items():
            for what, (step, tokens), (there, _) in zip(("a batch", "a rank without"), steps, expected[case], strict=True):
                assert (min(tokens) > 0) == (what == "a batch"), (stage, case, tokens)
                check(f"ZeRO-{stage}, {case}, {what}", step, there)


def test_what_a_frozen_model_says_is_computed_once(found: Any) -> None:
    """Also where ranks do not see the same disk: the first reads and writes it. An offloaded one says the same bits."""
    expected, filled = fill.in_one(), found["filled"]
    sizes = [2 * n + 1 for n in fill.ANSWERS]
    assert [read for _, read in expected] == [sum(sizes[:3]), sum(sizes[3:]), 0]
    for name in ("first", "again"):
        for rank in filled[name]:
            for (logp, _), (there, _) in zip(rank, expected, strict=True):
                torch.testing.assert_close(logp, there, atol=1e-6, rtol=1e-6)
    first, again = ([sum(rank[i][1] for rank in filled[name]) for i in range(len(fill.ROWS))] for name in ("first", "again"))
    # A rank without a unit of its own goes through the shortest once more.
    assert first == [pytest.approx(sum(sizes[:3]), abs=max(sizes[:3])), pytest.approx(sum(sizes[3:]), abs=max(sizes[3:])), 0]
    assert again == [0, 0, 0]
    for offloaded, stayed in zip(filled["offloaded"], filled["first"], strict=True):
        assert [read for _, read in offloaded] == [read for _, read in stayed]
        assert all(torch.equal(x, there) for (x, _), (there, _) in zip(offloaded, stayed, strict=True))
    assert filled["files"] == [2, 0]
