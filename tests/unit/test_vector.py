"""The sampler of environments of arrays: one turn an episode, draws of their own, what is cut has a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlx.envs.single import SingleTurn
from rlx.models.nets import mlp
from rlx.rewards.env import env
from rlx.rewards.score import score
from rlx.rollout.vector import vector
from rlx.types import Component, ConfigError, Episode, Floats, Ids, Play, Sampling, Status, Task, VecStep

LENGTHS = {0: 3, 1: 70, 2: 2}  # of the episode of a task


class Clock:
    """Sees (task, time), pays 0.5 a step, ends after as many steps as the task says; task 2 is truncated there."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = [int(task.meta["number"]) for task in tasks]
        self.length = np.array([LENGTHS[number] for number in self.tasks])

    def reset(self) -> Floats:
        self.time = 0
        return self._seen()

    def _seen(self) -> Floats:
        return np.array([(number, self.time) for number in self.tasks], np.float32)

    def step(self, actions: Ids) -> VecStep:
        self.time += 1
        ended = self.length == self.time
        cut = np.array(self.tasks) == 2
        pay = np.full(len(self.tasks), 0.5, np.float32)
        return self._seen(), pay, ended & ~cut, ended & cut, {"twice": 2 * actions.astype(np.float32)}


def play(limit: int = 100) -> Play:
    return Play(mlp(inputs=2, actions=3, sizes=[4], seed=5), SingleTurn, Sampling(limit), (1, 2), make_vec=Clock)


def rows(*numbers: int) -> list[Episode]:
    return [Episode(Task((), None, {"number": number}), number) for number in numbers]


def test_an_episode_is_one_turn_of_as_many_steps_as_it_took() -> None:
    episodes = vector(play(), rows(0, 1, 2), 2)
    assert [(e.group, len(e.turns), e.num_tokens) for e in episodes] == [
        (0, 1, 3), (0, 1, 3), (1, 1, 70), (1, 1, 70), (2, 1, 2), (2, 1, 2),
    ]  # fmt: skip
    first = episodes[0].turns[0]
    assert first.token["seen"].tolist() == [[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]]
    assert first.token["reward"].tolist() == [0.5, 0.5, 0.5]
    assert first.token["twice"].tolist() == (2 * first.did).tolist()
    assert first.reward == 1.5
    assert len(first.seen) == 0
    assert not np.array_equal(episodes[2].turns[0].did, episodes[3].turns[0].did)


def test_the_draws_of_an_episode_do_not_depend_on_its_company() -> None:
    together, alone = vector(play(), rows(0, 1, 2), 2), vector(play(), rows(1), 2)
    for a, b in zip(together[2:4], alone, strict=True):
        assert a.turns[0].did.tolist() == b.turns[0].did.tolist()
        np.testing.assert_allclose(a.turns[0].logp, b.turns[0].logp, atol=1e-6)


def test_what_was_cut_has_the_value_of_what_was_seen_last() -> None:
    playing = play(limit=50)
    ended, cut, truncated = vector(playing, rows(0, 1, 2), 1)
    assert (ended.status, cut.status, truncated.status) == (Status.FINISHED, Status.TRUNCATED, Status.TRUNCATED)
    assert "bootstrap" not in ended.info
    assert cut.num_tokens == 50
    for episode, seen in ((cut, (1, 50)), (truncated, (2, 2))):
        value = playing.policy.value(np.array([seen], np.float32))[0]
        assert episode.info["bootstrap"] == pytest.approx(float(value), abs=1e-6)


def test_what_the_environment_pays_is_paid_where_it_was_paid_and_by_weight() -> None:
    playing = play()
    episodes = vector(playing, rows(0, 2), 1)
    score(episodes, [Component("env", env, weight=2.0)], "reward")
    assert [e.reward for e in episodes] == [3.0, 2.0]
    batch = playing.policy.collate(episodes)
    assert batch["reward"].tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]  # not the stream of that name, which is unweighted
    torch.testing.assert_close(batch["bootstrap"][1].item(), episodes[1].info["bootstrap"])
    assert batch["turn_done"].tolist() == [[1.0], [0.0]]


def test_a_task_without_such_environments_is_refused() -> None:
    with pytest.raises(ConfigError, match="no environments of arrays"):
        vector(Play(None, SingleTurn, Sampling(4), (0,)), rows(0), 1)
