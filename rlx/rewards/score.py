"""Episodes -> their rewards: every reward of the recipe on every group, weighted, checked, and kept apart by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from rlx import world
from rlx.rewards.pool import Unscored, close, goes_to_workers, pool, unscored
from rlx.types import Component, ConfigError, Episode, Failed, Reward

FAILURES = "failures"  # of an episode's `info`, until they are shown: reward -> why it gave no number
told: set[tuple[str, str]] = set()  # of which rewards, and where, this process has shown a failure


def score(episodes: list[Episode], rewards: Sequence[Component[Reward]], where: str) -> None:
    """Pay episodes that are all there are, and show what failed: `pay`, then `show`."""
    pay(episodes, rewards, where)
    show(episodes, rewards, where)


def begin(rewards: Sequence[Component[Reward]], episode: Episode) -> None:
    """Have the workers begin with an episode that has ended; `pay` asks for what they found."""
    for reward in rewards:
        if goes_to_workers(reward.call):
            pool().begin(reward.call, episode)


def pay(episodes: list[Episode], rewards: Sequence[Component[Reward]], where: str) -> None:
    """Fill `rewards` (name -> unweighted total), `paid` (weighted, by turn) and `reward` (weighted total), group by group.

    `where` is the config key that an error names. A nan part makes the total nan: the episode could not be scored. So it is
    where a reward raises, or takes too long, on one episode; `info` says why until that is shown. Raises ConfigError when a
    reward refuses what it is given, or answers with anything but one number an episode, or one a turn; Failed where memory
    does not suffice.
    """
    groups = [list(members) for _, members in itertools.groupby(episodes, key=lambda e: e.group)]
    try:  # workers compute while other rewards (a reward model) are asked here
        sent = {r.name: pool().send(r.call, episodes) for r in rewards if goes_to_workers(r.call)}
        said = {r.name: [x for group in groups for x in asked(r, group, where)] for r in rewards if r.name not in sent}
        for name, answers in sent.items():
            what = f"{where}: reward {name!r}"
            said[name] = [received(answer, episode, what) for answer, episode in zip(answers, episodes, strict=True)]
    except BaseException:
        close()  # what else was sent is not waited for
        raise
    for episode, *values in zip(episodes, *(said[r.name] for r in rewards), strict=True):
        episode.paid = [0.0] * max(1, len(episode.turns))
        for reward, value in zip(rewards, values, strict=True):
            if isinstance(value, Unscored):
                episode.info.setdefault(FAILURES, {})[reward.name] = value
            parts = by_turn(math.nan, episode, "") if isinstance(value, Unscored) else value
            episode.rewards[reward.name] = float(sum(np.sum(x) for x in parts))
            episode.paid = [a + reward.weight * b for a, b in zip(episode.paid, parts, strict=True)]
        episode.reward = sum(r.weight * episode.rewards[r.name] for r in rewards)


def asked(reward: Component[Reward], group: list[Episode], where: str) -> list[Any]:
    """What one reward pays each turn of each episode of a group; where it raises, why.

    A reward that raises is asked of each episode alone, and of those on which it does not raise once more together. If it
    raises on none of them alone, or on all, or on all others together, the failure is the group's.
    """
    what = f"{where}: reward {reward.name!r}"
    try:
        out = list(reward.call(group))
        if len(out) != len(group):
            raise ConfigError(f"{what} gave {len(out)} numbers for {len(group)} episodes; one each is expected")
        return [by_turn(value, episode, what) for value, episode in zip(out, group, strict=True)]
    except (ConfigError, Failed):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:  # says nothing of an episode, and long groups must not be dropped
        why, *_ = str(error).split("\n")
        raise Failed(f"{what} ran out of memory on {len(group)} episodes: {why}") from error
    except Exception as error:
        failures: list[Any] = [unscored(error)] * len(group)
    if len(group) == 1:
        return failures
    alone = [asked(reward, [episode], where)[0] for episode in group]  # not above: what it raises would have two causes
    rest = [episode for episode, x in zip(group, alone, strict=True) if not isinstance(x, Unscored)]
    if len(rest) in (0, len(group)):
        return failures
    others = iter(asked(reward, rest, where))
    return [x if isinstance(x, Unscored) else next(others) for x in alone]


def received(answer: Future[Any], episode: Episode, what: str) -> Any:
    """What a worker says of an episode, or why nothing."""
    try:
        return by_turn(answer.result(), episode, what)
    except Unscored as failure:
        return failure
    finally:
        world.progress()


def show(episodes: list[Episode], rewards: Sequence[Component[Reward]], where: str) -> None:
    """Print the first failure of each reward, and forget all. The episodes are those of all ranks.

    Raises ConfigError where a reward raised on every episode: the mistake is no episode's.
    """
    found: list[dict[str, Unscored]] = [episode.info.pop(FAILURES, {}) for episode in episodes]
    for name in (reward.name for reward in rewards):
        failures = [(by[name], episode) for by, episode in zip(found, episodes, strict=True) if name in by]
        if not failures:
            continue
        failure, episode = next((pair for pair in failures if pair[0].trace), failures[0])
        place = f"{failure.line}, " if failure.line else ""
        what = f"{where}: reward {name!r} {failure.reason} ({place}on the prompt {prompt(episode)})"
        if len(failures) == len(episodes) and all(why.trace for why, _ in failures):
            raise ConfigError(f"{what}; it raises on every episode") from failure
        if (where, name) not in told:
            told.add((where, name))
            print(f"! {what}; such episodes are left out, and counted as failures\n{failure.trace}", end="", flush=True)


def by_turn(value: Any, episode: Episode, what: str) -> list[Any]:
    """One part for each turn: a number for the whole episode is earned by its last turn. Raises ConfigError."""
    turns = max(1, len(episode.turns))
    if not isinstance(value, list | tuple):
        value = [0.0] * (turns - 1) + [value]
    parts = [x.astype(np.float32) if isinstance(x, np.ndarray) and x.ndim else float(x) for x in value]
    if len(parts) != turns:
        raise ConfigError(f"{what} gave {len(parts)} numbers for an episode of {turns} turns")
    if infinite := [float(y) for x in parts for y in np.ravel(x) if np.isinf(y)]:
        raise ConfigError(f"{what} gave {infinite[0]}; a finite number, or nan for 'could not be scored', is expected")
    return parts


def prompt(episode: Episode) -> str:
    """The last message of an episode's prompt, on one line and shortened."""
    text = "".join(message.text for message in episode.task.prompt[-1:])
    return repr(text if len(text) <= 60 else text[:60] + "...")
