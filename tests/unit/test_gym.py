"""Gymnasium's environments as arrays: seeds, ends, and what is missing."""

from __future__ import annotations

import numpy as np
import pytest

from rlx.data.gym import gym
from rlx.envs.gym import GymEnvs, make
from rlx.types import ConfigError

gymnasium = pytest.importorskip("gymnasium")


def test_each_environment_has_its_own_seed_and_stops_where_it_ends() -> None:
    envs = GymEnvs("CartPole-v1", [7, 8])
    start = envs.reset()
    expected, _ = gymnasium.make("CartPole-v1").reset(seed=8)
    np.testing.assert_array_equal(start[1], expected)
    ended = np.zeros(2, bool)
    for _ in range(30):  # always to the left: the pole falls
        before = ended.copy()
        seen, reward, terminated, truncated, info = envs.step(np.zeros(2, np.int64))
        ended |= terminated
        assert reward[before].tolist() == [0.0] * int(before.sum())
    assert ended.all()
    assert not truncated.any()
    assert info == {}
    np.testing.assert_array_equal(envs.step(np.ones(2, np.int64))[0], seen)


def test_a_limit_of_steps_truncates() -> None:
    envs = GymEnvs("CartPole-v1", [0], {"max_episode_steps": 2})
    envs.reset()
    assert envs.step(np.array([0]))[3].tolist() == [False]
    _, _, terminated, truncated, _ = envs.step(np.array([1]))
    assert (terminated.tolist(), truncated.tolist()) == ([False], [True])


def test_splits_have_seeds_of_their_own() -> None:
    source = gym(id="CartPole-v1", limit=500, train=5, dev=3, test=4)
    seeds = {split: {int(e.task.meta["seed"]) for e in make()} for split, make in source.splits.items()}
    assert [len(found) for found in seeds.values()] == [5, 3, 4]
    assert len(set.union(*seeds.values())) == 12


def test_an_unknown_environment_is_said() -> None:
    with pytest.raises(ConfigError, match="CartPool-v1"):
        make("CartPool-v1")
    with pytest.raises(ConfigError, match="limit and train"):
        gym(id="CartPole-v1", limit=0)
