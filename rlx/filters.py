"""Filters: which episodes of a step are trained on. Order is kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rlx.types import Component, ConfigError, Episode, Keep, Status


def chain(episodes: list[Episode], keep: Sequence[Component[Keep]]) -> list[Episode]:
    """What is left after each filter in turn."""
    for each in keep:
        episodes = each.call(episodes)
    return episodes


def mixed_groups(episodes: list[Episode]) -> list[Episode]:
    """The groups whose scored rewards differ, whole: a group with fewer than two scored episodes (not nan) has none.

    In the others every advantage over the group is 0 (dynamic sampling of DAPO, Yu et al. 2025, arXiv 2503.14476,
    section 3.2). Rewards are compared as float32, as advantages are computed: what is dropped is 0 exactly.
    """
    rewards: dict[int, set[np.float32]] = defaultdict(set)
    for episode in episodes:
        if not math.isnan(episode.reward):
            rewards[episode.group].add(np.float32(episode.reward))
    return [episode for episode in episodes if len(rewards[episode.group]) > 1]


def correct(episodes: list[Episode], *, threshold: float = 1.0) -> list[Episode]:
    """The episodes whose total reward is at least `threshold` (rejection sampling); nan is not."""
    return [episode for episode in episodes if episode.reward >= threshold]


def top_returns(episodes: list[Episode], *, quantile: float = 0.9) -> list[Episode]:
    """The episodes whose total reward is at least this quantile of all that were scored (filtered behaviour cloning).

    0.9 keeps the best tenth, and what ties with its last. The quantile is that of the episodes given: of a step's, in a stage
    or buffer. Between two returns it is interpolated, as numpy does; both sides are compared in float64.

    Raises ConfigError if quantile is not from 0 to 1.
    """
    if not 0 <= quantile <= 1:
        raise ConfigError(f"top_returns: expected a quantile from 0 to 1, got {quantile}")
    scored = [episode for episode in episodes if not math.isnan(episode.reward)]
    cutoff = np.quantile([episode.reward for episode in scored], quantile) if scored else 0.0
    return [episode for episode in scored if episode.reward >= cutoff]


def pass_rate(episodes: list[Episode], *, low: float = 0.0, high: float = 1.0, threshold: float = 1.0) -> list[Episode]:
    """The groups of which a share from `low` to `high` is right, whole: total reward of at least `threshold`.

    With low = high = 1 what the policy has learned, with high = 0 what is out of its reach (PeBR-R1, arXiv 2509.13031).
    An episode that could not be scored counts for nothing; a group without a scored one is left out.
    """
    right: dict[int, list[bool]] = defaultdict(list)
    for episode in episodes:
        if not math.isnan(episode.reward):
            right[episode.group].append(episode.reward >= threshold - 1e-6)
    share = {group: sum(found) / len(found) for group, found in right.items()}
    return [episode for episode in episodes if low <= share.get(episode.group, -1.0) <= high]


def untruncated(episodes: list[Episode]) -> list[Episode]:
    """The episodes that the token limit did not cut (overlong filtering of DAPO, section 3.4).

    They leave their group's statistics, too. On its own this lets a policy hide failures by running long: keep an eye
    on `truncated`.
    """
    return [episode for episode in episodes if episode.status is not Status.TRUNCATED]


def roles(episodes: list[Episode], *, of: list[str]) -> list[Episode]:
    """The episodes that the policy played in one of these roles (`agent`)."""
    return [episode for episode in episodes if episode.agent in of]
