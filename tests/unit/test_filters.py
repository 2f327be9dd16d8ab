"""Which episodes are trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlx.advantages import group_zscore
from rlx.filters import correct, mixed_groups, top_returns, untruncated
from rlx.types import ConfigError, Episode, Status, Task

NAN = float("nan")


def episodes(rewards: list[float], groups: list[int]) -> list[Episode]:
    return [Episode(Task(prompt=()), group=g, reward=r) for r, g in zip(rewards, groups, strict=True)]


def kept(some: list[Episode], all_: list[Episode]) -> list[int]:
    return [i for i, episode in enumerate(all_) if any(episode is one for one in some)]


def test_mixed_groups_drops_whole_groups_without_signal() -> None:
    #                   mixed     all right  mixed, interleaved with all wrong
    rows = episodes([1.0, 0.0, 1.0, 1.0, 0.5, 0.0, 0.25, 0.0], [4, 4, 2, 2, 9, 7, 9, 7])
    assert kept(mixed_groups(rows), rows) == [0, 1, 4, 6]


def test_mixed_groups_needs_two_scores_that_differ() -> None:
    rows = episodes([1.0, NAN, NAN, NAN, 1.0, 1.0, NAN, 1.0, 0.0, NAN, 3.0], [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 5])
    assert kept(mixed_groups(rows), rows) == [7, 8, 9]


def test_what_mixed_groups_drops_has_no_advantage() -> None:
    """0.1 + 0.2 is not 0.3 in float64, but it is in float32, where advantages are computed."""
    rows = episodes([0.1 + 0.2, 0.3, 0.3, 0.3 + 1e-6], [0, 0, 1, 1])
    ret = torch.tensor([row.reward for row in rows])
    adv = group_zscore(ret, torch.tensor([row.group for row in rows]), torch.ones(4, 1, dtype=torch.bool))
    assert kept(mixed_groups(rows), rows) == [2, 3]
    assert (adv[:, 0] != 0).tolist() == [False, False, True, True]


def test_correct_keeps_the_threshold_itself_and_no_unscored_episode() -> None:
    rows = episodes([1.0, 0.99, NAN, 1.5, -1.0], [0, 0, 0, 1, 1])
    assert kept(correct(rows), rows) == [0, 3]
    assert kept(correct(rows, threshold=-1.0), rows) == [0, 1, 3, 4]


def test_top_returns_keeps_what_reaches_the_quantile_of_all_returns() -> None:
    draws = np.random.default_rng(0).normal(size=200).tolist()
    rows = episodes([*draws, NAN], [i // 4 for i in range(201)])
    cutoff = np.quantile(draws, 0.9)
    assert kept(top_returns(rows), rows) == [i for i, x in enumerate(draws) if x >= cutoff]
    assert len(top_returns(rows)) == 20
    assert len(top_returns(rows, quantile=0.0)) == 200
    assert kept(top_returns(rows, quantile=1.0), rows) == [int(np.argmax(draws))]


def test_top_returns_keeps_ties() -> None:
    rows = episodes([-12.0, -3.0, -3.0, -5.0], [0, 0, 1, 1])
    assert kept(top_returns(rows), rows) == [1, 2]
    assert len(top_returns(episodes([0.1] * 3, [0] * 3))) == 3
    with pytest.raises(ConfigError, match=r"a quantile from 0 to 1, got 90"):
        top_returns(rows, quantile=90)


def test_untruncated() -> None:
    rows = episodes([0.0] * 4, [0] * 4)
    for row, status in zip(rows, [Status.FINISHED, Status.TRUNCATED, Status.RUNNING, Status.TRUNCATED], strict=True):
        row.status = status
    assert kept(untruncated(rows), rows) == [0, 2]


def test_nothing_to_filter() -> None:
    assert mixed_groups([]) == correct([]) == untruncated([]) == top_returns([]) == []
    assert top_returns(episodes([NAN], [0])) == []
