"""Samplers: how episodes are played. `plain` plays each task n times from its start, in lock step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlx.envs.single import SingleTurn
from rlx.models.language import with_said
from rlx.models.reader import remembering
from rlx.rollout.noise import key
from rlx.types import (
    Component,
    ConfigError,
    DataError,
    Ended,
    Env,
    Episode,
    Ids,
    Message,
    Play,
    Sampler,
    Sampling,
    Status,
    TextPolicy,
    Turn,
    View,
)


def plain(play: Play, rows: list[Episode], n: int) -> list[Episode]:
    """`n` episodes of each row's task, group by group. The draws of (seed, row, sample, turn) depend on nothing else."""
    episodes = [Episode(row.task, row.group) for row in one_a_group(rows) for _ in range(n)]
    envs = [play.make_env() for _ in episodes]
    talks = [list(env.reset(e.task)) for env, e in zip(envs, episodes, strict=True)]
    finish(play, episodes, envs, talks, n)
    return episodes


def given(play: Play, rows: list[Episode], n: int) -> list[Episode]:
    """The rows' own answers, unpaid; nothing is played. So rewards label what the data has. Raises DataError: no answer."""
    if any(not row.turns for row in rows):
        raise DataError("sampler 'given': the data has prompts without an answer; it needs completions, messages or pairs")
    return [Episode(row.task, row.group, row.turns, row.status, agent=row.agent, info=dict(row.info)) for row in rows]


given.idle = True  # type: ignore[attr-defined]  # it asks no policy


def plays(sampler: Component[Sampler]) -> bool:
    """Whether a sampler asks the policy for anything."""
    return not getattr(getattr(sampler.call, "func", sampler.call), "idle", False)


def one_a_group(rows: list[Episode]) -> list[Episode]:
    """The first row of each group: the two rows of a pair ask the same thing, and would be played with the same draws."""
    return list({row.group: row for row in reversed(rows)}.values())[::-1]


def finish(play: Play, episodes: list[Episode], envs: list[Env], talks: list[list[Message]], n: int) -> None:
    """Play episodes on until they end: all that still run take their next turn in one batch.

    `talks` are their conversations so far, and samples of a task follow each other, `n` of each. What the environment
    replies is rendered as an extension of the tokens so far. `play.ended` is told of each episode when it ends: if its
    environment has nothing to say, while the turns of others are decoded.
    """
    running, turn = [i for i, e in enumerate(episodes) if e.status is Status.RUNNING], 0

    def ended(k: int, own: Turn) -> None:
        i = running[k]
        if type(envs[i]) is SingleTurn and not episodes[i].turns:
            play.ended(replace(episodes[i], turns=[own], status=status(own)))

    with remembering(play.policy):
        while running:
            taken = take(
                play.policy,
                [episodes[i] for i in running],
                [talks[i] for i in running],
                play,
                (turn,),
                [i % n for i in running],
                ended,
            )
            for i, own in zip(running, taken, strict=True):
                talks[i] = answer(episodes[i], envs[i], talks[i], own)
                if episodes[i].status is not Status.RUNNING and type(envs[i]) is not SingleTurn:
                    play.ended(episodes[i])
            running = [i for i in running if episodes[i].status is Status.RUNNING]
            turn += 1
    for episode in episodes:
        episode.info["max_new_tokens"] = play.sampling.max_new_tokens


def take(
    policy: TextPolicy,
    episodes: Sequence[Episode],
    talks: Sequence[Sequence[Message]],
    play: Play,
    draw: tuple[int, ...],
    samples: Sequence[int],
    ended: Ended | None = None,
) -> list[Turn]:
    """The next turn of each episode, none of them played yet. Equal views are read once.

    `ended` may be told of a turn and its episode's place before all have ended. An episode's draws depend on the play's seed,
    on `draw`, on its group and on its number among the group's `samples`.
    """
    prompts: dict[tuple[Message, ...], Ids] = {}
    views: dict[tuple[bytes, tuple[int, ...]], tuple[View, list[int]]] = {}
    for i, (episode, talk) in enumerate(zip(episodes, talks, strict=True)):
        view = sight(policy, episode, talk, prompts)
        views.setdefault((view.ids.tobytes(), tuple(map(id, view.images))), (view, []))[1].append(i)
    order = [i for _, members in views.values() for i in members]
    keys = [[key(*play.seed, *draw, episodes[i].group, samples[i]) for i in members] for _, members in views.values()]
    tell = None if ended is None else lambda k, turn: ended(order[k], turn)
    played = policy.act([view for view, _ in views.values()], keys, play.sampling, tell)
    turns = dict(zip(order, (turn for row in played for turn in row), strict=True))
    for i, turn in turns.items():
        before = sum(len(t.seen) + len(t.did) for t in episodes[i].turns)
        turn.seen = turn.seen[before:]
    return [turns[i] for i in range(len(episodes))]


def sight(policy: TextPolicy, episode: Episode, talk: Sequence[Message], prompts: dict[tuple[Message, ...], Ids]) -> View:
    """What an episode's policy sees: its tokens so far, and the new messages as an extension of them."""
    images = tuple(image for message in talk for image in message.images)
    if not episode.turns:
        told_ = tuple(talk)
        if told_ not in prompts:
            prompts[told_] = policy.render(told_)
        return View(prompts[told_], images)
    before = [part for turn in episode.turns for part in (turn.seen, turn.did)]
    return View(np.concatenate([*before, policy.extension(talk, len(episode.turns[-1].replies))]), images)


def answer(episode: Episode, env: Env, talk: list[Message], turn: Turn) -> list[Message]:
    """Add a turn to its episode and let the environment answer; the conversation after it.

    Raises ConfigError where an environment neither ends the episode nor says anything.
    """
    said = turn.said or Message("assistant", "")
    reply = env.step(said)
    turn.replies, turn.reward = reply.messages, reply.reward
    turn.info |= reply.info
    episode.turns.append(turn)
    if not (reply.done or reply.messages):
        raise ConfigError(f"environment {type(env).__name__}: its reply is neither done nor holds a message")
    if reply.done or turn.info["truncated"]:
        episode.status = status(turn)
    return [*with_said(talk, said), *reply.messages]


def resampled(
    policy: TextPolicy, states: Sequence[tuple[Episode, int]], sampling: Sampling, seed: tuple[int, ...]
) -> list[Episode]:
    """For each state (an episode before its turn k), an episode whose last turn is drawn anew by `policy` in it.

    The earlier turns are not trained on, and nobody answers the last: the episode ends with it, or is cut in it.
    `info["fresh"]` marks the episodes; they are in the groups of those they come from.
    """
    made, views = [], []
    for episode, k in states:
        before = episode.turns[:k]
        seen = np.concatenate([*(part for t in before for part in (t.seen, t.did)), episode.turns[k].seen])
        told = [*episode.task.prompt, *(message for t in before for message in t.replies)]
        views.append(View(seen, tuple(image for message in told for image in message.images)))
        past = [frozen(t) for t in before]
        made.append(Episode(episode.task, episode.group, past, agent=episode.agent, info={"fresh": True}))
    played = policy.act(views, [[key(*seed, i)] for i in range(len(views))], sampling)
    for episode, (turn,) in zip(made, played, strict=True):
        turn.seen = turn.seen[sum(len(t.seen) + len(t.did) for t in episode.turns) :]
        episode.turns.append(turn)
        episode.status = status(turn)
    return made


def status(last: Turn) -> Status:
    """How an episode with this last turn has ended."""
    return Status.TRUNCATED if last.info["truncated"] else Status.FINISHED


def frozen(turn: Turn) -> Turn:
    """The same turn, none of it trained on."""
    return Turn(turn.seen, turn.did, turn.logp, turn.said, turn.replies, token={"trained": np.zeros(len(turn.did), bool)})
