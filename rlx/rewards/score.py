"""Episodes -> their rewards: every reward of the recipe on every group, weighted, checked, and kept apart by name."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Sequence
from pathlib import Path

from rlx.types import Component, ConfigError, Episode, Reward


def score(episodes: list[Episode], rewards: Sequence[Component[Reward]], where: str) -> None:
    """Fill `rewards` (name -> unweighted value) and `reward` (weighted total) of each episode, group by group.

    `where` is the config key that an error names. Raises ConfigError when a reward raises or answers with anything but one
    number an episode. A nan part makes the total nan: the episode could not be scored.
    """
    for _, members in itertools.groupby(episodes, key=lambda e: e.group):
        group = list(members)
        for reward in rewards:
            for episode, value in zip(group, values(reward, group, where), strict=True):
                episode.rewards[reward.name] = value
        for episode in group:
            episode.reward = sum(r.weight * episode.rewards[r.name] for r in rewards)


def values(reward: Component[Reward], group: list[Episode], where: str) -> list[float]:
    """What one reward says of one group."""
    what = f"{where}: reward {reward.name!r}"
    try:
        out = list(reward.call(group))
        numbers = [float(x) for x in out]
    except ConfigError:
        raise
    except Exception as error:  # the user's own code: whatever it raises is reported with its place
        raise ConfigError(
            f"{what} raised {type(error).__name__}: {error} ({_at(error)}on the prompt {_asked(group)})"
        ) from error
    if len(numbers) != len(group):
        raise ConfigError(f"{what} gave {len(numbers)} numbers for {len(group)} episodes; one each is expected")
    if bad := [x for x in numbers if math.isinf(x)]:
        raise ConfigError(f"{what} gave {bad[0]}; a finite number, or nan for 'could not be scored', is expected")
    return numbers


def _at(error: Exception) -> str:
    """The line of the reward's own file where it raised, also where the error comes from a library that it calls."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call above
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{Path(own[-1].filename).name} line {own[-1].lineno}, " if own else ""


def _asked(group: list[Episode]) -> str:
    """The last message of a group's prompt, on one line and shortened."""
    text = "".join(message.content for message in group[0].task.prompt[-1:])
    return repr(text if len(text) <= 60 else text[:60] + "...")
