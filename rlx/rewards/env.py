"""What the environment itself paid, as a reward of the recipe."""

from __future__ import annotations

from rlx.types import Episode, Floats, Status


def env(episodes: list[Episode]) -> list[list[float | Floats]]:
    """Return what the environment (or the sampler) paid for each turn; in a vector environment, for each of its steps."""
    return [[turn.token.get("reward", turn.reward) for turn in episode.turns] for episode in episodes]


def played_out(episodes: list[Episode], *, horizon: int, rest: float = -1.0) -> list[list[float]]:
    """What the environment paid for each turn; an episode that the token limit cut pays `rest` for each turn that is left.

    Where every turn costs, an answer that never ends would else be the cheapest. `horizon`: the most turns of an episode.
    """
    found = []
    for episode in episodes:
        paid = [turn.reward for turn in episode.turns]
        if episode.status is Status.TRUNCATED and paid:
            paid[-1] += rest * max(0, horizon - len(paid))
        found.append(paid)
    return found
