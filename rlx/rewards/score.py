"""Episodes -> their rewards: every reward of the recipe on every group, weighted, checked, and kept apart by name."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlx.types import Component, ConfigError, Episode, Reward


def score(episodes: list[Episode], rewards: Sequence[Component[Reward]], where: str) -> None:
    """Fill `rewards` (name -> unweighted total), `paid` (weighted, by turn) and `reward` (weighted total), group by group.

    `where` is the config key that an error names. Raises ConfigError when a reward raises or answers with anything but one
    number an episode, or one a turn. A nan part makes the total nan: the episode could not be scored.
    """
    for _, members in itertools.groupby(episodes, key=lambda e: e.group):
        group = list(members)
        for episode in group:
            episode.paid = [0.0] * max(1, len(episode.turns))
        for reward in rewards:
            for episode, parts in zip(group, values(reward, group, where), strict=True):
                episode.rewards[reward.name] = float(sum(np.sum(x) for x in parts))
                episode.paid = [a + reward.weight * b for a, b in zip(episode.paid, parts, strict=True)]
        for episode in group:
            episode.reward = sum(r.weight * episode.rewards[r.name] for r in rewards)


def values(reward: Component[Reward], group: list[Episode], where: str) -> list[list[Any]]:
    """What one reward says of one group: for each episode a list, of one part for each turn."""
    what = f"{where}: reward {reward.name!r}"
    try:
        out = list(reward.call(group))
        parts = [by_turn(x, max(1, len(e.turns))) for x, e in zip(out, group, strict=False)]
    except ConfigError:
        raise
    except Exception as error:  # the user's own code: whatever it raises is reported with its place
        raise ConfigError(
            f"{what} raised {type(error).__name__}: {error} ({_at(error)}on the prompt {_asked(group)})"
        ) from error
    if len(out) != len(group):
        raise ConfigError(f"{what} gave {len(out)} numbers for {len(group)} episodes; one each is expected")
    for given, episode in zip(parts, group, strict=True):
        if len(given) != max(1, len(episode.turns)):
            raise ConfigError(f"{what} gave {len(given)} numbers for an episode of {len(episode.turns)} turns")
        if any(np.isinf(x).any() for x in given):
            bad = next(float(y) for x in given for y in np.ravel(x) if np.isinf(y))
            raise ConfigError(f"{what} gave {bad}; a finite number, or nan for 'could not be scored', is expected")
    return parts


def by_turn(value: Any, turns: int) -> list[Any]:
    """One part for each turn: a number for the whole episode is earned by its last turn."""
    if isinstance(value, list | tuple):
        return [x.astype(np.float32) if isinstance(x, np.ndarray) and x.ndim else float(x) for x in value]
    return [0.0] * (turns - 1) + [float(value)]


def _at(error: Exception) -> str:
    """The line of the reward's own file where it raised, also where the error comes from a library that it calls."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call above
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{Path(own[-1].filename).name} line {own[-1].lineno}, " if own else ""


def _asked(group: list[Episode]) -> str:
    """The last message of a group's prompt, on one line and shortened."""
    text = "".join(message.text for message in group[0].task.prompt[-1:])
    return repr(text if len(text) <= 60 else text[:60] + "...")
