"""A sampler of environments of arrays: whole episodes of many environments in lock step, one turn each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlx.rollout.noise import key, uniforms
from rlx.types import ConfigError, Episode, Floats, Ids, Play, Status, Turn

CHUNK = 64  # steps whose draws are made at a time
NOTHING: Ids = np.zeros(0, np.int64)


def vector(play: Play, rows: list[Episode], n: int) -> list[Episode]:
    """`n` episodes of each row's task, group by group. The draws of (seed, row, sample, step) depend on nothing else.

    An episode's one turn has the actions as `did`, and as streams `seen` (what was observed before each action), `reward`,
    and what else the environment says of each step. Where the environment truncates an episode, or `max_new_tokens` steps
    cut it, `info["bootstrap"]` is the policy's value of what was seen last, if it offers values. Raises ConfigError where
    the task has no such environments.
    """
    if play.make_vec is None:
        raise ConfigError("sampler 'vector': the task has no environments of arrays")
    episodes = [Episode(row.task, row.group) for row in rows for _ in range(n)]
    env = play.make_vec([e.task for e in episodes])
    keys = [key(*play.seed, e.group, i % n) for i, e in enumerate(episodes)]
    limit = play.sampling.max_new_tokens
    seen = env.reset()
    steps: list[dict[str, NDArray[Any]]] = []  # of each step, one row for each environment
    length = np.zeros(len(episodes), np.int64)
    live = np.arange(len(episodes))
    while live.size and len(steps) < limit:
        if len(steps) % CHUNK == 0:
            noise = uniforms(keys, len(steps) + CHUNK)
        did: Ids = np.zeros(len(episodes), np.int64)
        logp: Floats = np.zeros(len(episodes), np.float32)
        did[live], logp[live] = play.policy.sample(seen[live], noise[live, len(steps)], play.sampling)
        before = seen
        seen, reward, terminated, truncated, info = env.step(did)
        steps.append({"did": did, "logp": logp, "seen": before, "reward": reward, **info})
        length[live] += 1
        for i in live[terminated[live]].tolist():
            episodes[i].status = Status.FINISHED
        cut = live[(truncated & ~terminated)[live]]  # at the limit and at its end: ended
        live = live[~(terminated | truncated)[live]]
        close(play, [episodes[i] for i in cut], seen[cut])
    close(play, [episodes[i] for i in live], seen[live])
    streams = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
    for i, episode in enumerate(episodes):
        token = {name: x[: length[i], i].copy() for name, x in streams.items()}
        paid = float(token["reward"].sum())
        episode.turns = [Turn(NOTHING, token.pop("did"), token.pop("logp"), reward=paid, token=token)]
    return episodes


def close(play: Play, cut: list[Episode], seen: NDArray[Any]) -> None:
    """Mark episodes as truncated, with the value of what they saw last (B,D)."""
    values = play.policy.value(seen) if cut and "value" in play.policy.offers else np.zeros(len(cut))
    for episode, value in zip(cut, values.tolist(), strict=True):
        episode.status = Status.TRUNCATED
        episode.info["bootstrap"] = value
