"""Evaluation metrics against values worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from rlx import metrics
from rlx.types import ConfigError, Episode, Message, Status, Task, Turn

NAN = float("nan")


def sample(reward: float, text: str = "", num_tokens: int = 0, status: Status = Status.FINISHED) -> Episode:
    turn = Turn(np.zeros(0, np.int64), np.zeros(num_tokens, np.int64), np.zeros(0, np.float32), Message("assistant", text))
    return Episode(Task(()), group=0, turns=[turn], status=status, reward=reward)


def groups(*rewards: list[float]) -> list[list[Episode]]:
    return [[sample(reward) for reward in group] for group in rewards]


def test_accuracy_leaves_out_what_could_not_be_scored():
    assert metrics.accuracy(groups([1.0], [1.0 - 1e-7], [0.999], [NAN])) == pytest.approx(2 / 3, abs=1e-12)
    assert math.isnan(metrics.accuracy(groups([NAN])))
    assert math.isnan(metrics.accuracy([]))


def test_means_are_over_tasks():
    sampled = groups([1.0, 0.0, NAN], [1.0, 1.0, 1.0, 1.0], [NAN])
    assert metrics.sampled_accuracy(sampled) == pytest.approx(0.75, abs=1e-12)
    assert metrics.mean_reward(groups([0.5, -0.5, NAN], [2.0])) == pytest.approx(1.0, abs=1e-12)


def test_pass_at_by_hand():
    assert metrics.pass_at(groups([1.0, 0.0, 0.0, 0.0]), k=2) == pytest.approx(0.5, abs=1e-12)
    assert metrics.pass_at(groups([1.0, 0.0, 0.0, 0.0], [0.0] * 4), k=2) == pytest.approx(0.25, abs=1e-12)
    assert metrics.pass_at(groups([1.0, 1.0, 1.0, 0.0]), k=2) == 1.0
    assert metrics.pass_at(groups([1.0] + [0.0] * 4999), k=2500) == pytest.approx(0.5, abs=1e-12)


def test_pass_at_is_the_mean_over_all_subsets():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    subsets = [float(max(subset)) for subset in itertools.combinations(rewards, 3)]
    assert metrics.pass_at(groups(rewards), k=3) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_needs_enough_samples():
    with pytest.raises(ConfigError, match=r"pass@5: needs k >= 1 and at least k samples of each task, got 4 samples"):
        metrics.pass_at(groups([1.0] * 5, [1.0] * 4), k=5)
    assert metrics.pass_at(groups([1.0, 0.0], [0.0, NAN]), k=2) == 1.0  # too few scored: left out


def vote(*pairs: tuple[str, float]) -> list[list[Episode]]:
    return [[sample(reward, text) for text, reward in pairs]]


def test_maj_at_counts_equal_answers_together():
    assert metrics.maj_at(vote(("0.5", 1.0), ("#### 1/2", 1.0), ("3", 0.0)), k=3) == 1.0
    assert metrics.maj_at(vote(("5", 1.0), ("3", 0.0), ("#### 3", 0.0)), k=3) == 0.0


def test_maj_at_reads_the_first_k():
    assert metrics.maj_at(vote(("5", 1.0), ("3", 0.0), ("3", 0.0)), k=1) == 1.0


def test_maj_at_ties_votes_and_silence():
    assert metrics.maj_at(vote(("5", 1.0), ("3", 0.0)), k=2) == 0.5
    assert metrics.maj_at(vote(("5", 1.0), ("no idea", 0.0), ("none at all", 0.0)), k=3) == 1.0
    assert metrics.maj_at(vote(("no idea", 0.0)), k=1) == 0.0
    assert math.isnan(metrics.maj_at(vote(("5", NAN)), k=1))
    with pytest.raises(ConfigError, match="maj@3"):
        metrics.maj_at(vote(("5", 1.0), ("3", 0.0)), k=3)


def test_lengths_and_truncation():
    right, wrong, cut = sample(1.0, "", 3), sample(0.0, "", 7), sample(0.0, "", 10, Status.TRUNCATED)
    assert metrics.length([[right], [wrong], [cut]]) == pytest.approx(20 / 3, abs=1e-12)
    assert metrics.wrong_length([[right, wrong], [cut]]) == 8.5
    assert math.isnan(metrics.wrong_length([[right]]))
    assert metrics.excess_length([[right, wrong], [cut]]) == 8.5 - right.num_tokens
    assert math.isnan(metrics.excess_length([[right]]))
    assert metrics.truncated([[right, wrong], [cut, right]]) == 0.25


def test_wilson():
    np.testing.assert_allclose(metrics.wilson(8, 10), (0.490162, 0.943318), rtol=0, atol=1e-6)
    assert metrics.wilson(0, 20)[0] == 0.0
    assert metrics.wilson(20, 20)[1] == 1.0
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        metrics.wilson(3, 2)
