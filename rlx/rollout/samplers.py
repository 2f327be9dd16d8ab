"""Samplers: how episodes are played. `plain` plays each task n times from its start, in lock step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlx.models.language import with_said
from rlx.rollout.noise import key
from rlx.types import ConfigError, Env, Episode, Ids, Message, Policy, Sampling, Status


def plain(
    policy: Policy,
    make_env: Callable[[], Env],
    rows: list[Episode],
    n: int,
    sampling: Sampling,
    seed: tuple[int, ...],
) -> list[Episode]:
    """`n` episodes of each row's task, group by group.

    All that still run take their next turn in one batch. What the environment replies is rendered as an extension of the
    tokens so far; the draws of (seed, row, sample, turn) depend on nothing else.
    """
    episodes = [Episode(row.task, row.group) for row in rows for _ in range(n)]
    envs = [make_env() for _ in episodes]
    talks = [list(env.reset(e.task)) for env, e in zip(envs, episodes, strict=True)]
    running, turn = list(range(len(episodes))), 0
    while running:
        views, keys, order = group_views(policy, episodes, talks, running, n, (*seed, turn))
        played = policy.act(views, keys, sampling)
        for i, taken in zip(order, (t for row in played for t in row), strict=True):
            episode = episodes[i]
            told = sum(len(t.seen) + len(t.did) for t in episode.turns)
            taken.seen = taken.seen[told:]
            said = taken.said or Message("assistant", "")
            reply = envs[i].step(said)
            taken.replies, taken.reward = reply.messages, reply.reward
            episode.turns.append(taken)
            talks[i] = [*with_said(talks[i], said), *reply.messages]
            if not (reply.done or reply.messages):
                raise ConfigError(f"environment {type(envs[i]).__name__}: its reply is neither done nor holds a message")
            cut = bool(taken.info["truncated"])
            if reply.done or cut:
                episode.status = Status.TRUNCATED if cut else Status.FINISHED
        running = [i for i in running if episodes[i].status is Status.RUNNING]
        turn += 1
    for episode in episodes:
        episode.info["max_new_tokens"] = sampling.max_new_tokens
    return episodes


def group_views(
    policy: Policy,
    episodes: list[Episode],
    talks: list[list[Message]],
    running: list[int],
    n: int,
    seed: tuple[int, ...],
) -> tuple[list[Ids], list[list[int]], list[int]]:
    """What each running episode sees (distinct views once), the keys of its draws, and the episodes in that order."""
    prompts: dict[tuple[Message, ...], Ids] = {}
    views: dict[bytes, tuple[Ids, list[int]]] = {}
    for i in running:
        turns, talk = episodes[i].turns, tuple(talks[i])
        if not turns:
            if talk not in prompts:
                prompts[talk] = policy.render(talk)
            ids = prompts[talk]
        else:
            told = [part for turn in turns for part in (turn.seen, turn.did)]
            ids = np.concatenate([*told, policy.extension(talk, len(turns[-1].replies))])
        views.setdefault(ids.tobytes(), (ids, []))[1].append(i)
    order = [i for _, members in views.values() for i in members]
    keys = [[key(*seed, episodes[i].group, i % n) for i in members] for _, members in views.values()]
    return [ids for ids, _ in views.values()], keys, order
