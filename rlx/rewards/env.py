"""What the environment itself paid, as a reward of the recipe."""

from __future__ import annotations

from rlx.types import Episode, Floats


def env(episodes: list[Episode]) -> list[list[float | Floats]]:
    """Return what the environment (or the sampler) paid for each turn; in a vector environment, for each of its steps."""
    return [[turn.token.get("reward", turn.reward) for turn in episode.turns] for episode in episodes]
