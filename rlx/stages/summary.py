"""What happened in a step, as numbers and on the episodes that are shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

from rlx.learner import Learner
from rlx.types import Batch, Episode, Status

# With more than this (nats a token, in the mean) between the sampled log-probs and the first training forward, the two
# are not the same policy; bfloat16 alone makes about 0.01.
LARGEST_GAP = 0.1


def summary(kept: list[Episode], seen: list[Episode]) -> dict[str, float]:
    """What happened in the rollouts of one step, as numbers."""
    scored = [e for e in seen if not math.isnan(e.reward)]
    mean = {f"reward/{name}": average([e.rewards[name] for e in scored if name in e.rewards]) for name in parts(scored)}
    return {
        "reward": average([e.reward for e in scored]),
        **mean,
        "reward/failures": float(len(seen) - len(scored)),
        "length": average([float(e.num_tokens) for e in seen]),
        "turns": average([float(len(e.turns)) for e in seen]),
        # where the value of what would have come is known, an episode that was cut has lost nothing
        "truncated": average([float(e.status is Status.TRUNCATED and "bootstrap" not in e.info) for e in seen]),
        "groups/no_signal": no_signal(scored),
        "groups/trained_no_signal": no_signal(kept),
        "episodes": float(len(seen)),
        "kept": len(kept) / max(1, len(seen)),
        "tokens": float(sum(e.num_tokens for e in seen)),
        **roles(scored),
    }


def parts(episodes: list[Episode]) -> list[str]:
    """The names of the rewards that were paid."""
    return list(dict.fromkeys(name for episode in episodes for name in episode.rewards))


def roles(episodes: list[Episode]) -> dict[str, float]:
    """Number and mean reward of the episodes of each role, where there are several."""
    agents = sorted({e.agent for e in episodes})
    if len(agents) < 2:
        return {}
    by = {agent: [e.reward for e in episodes if e.agent == agent] for agent in agents}
    return {f"agent/{a}/{k}": v for a, x in by.items() for k, v in (("reward", average(x)), ("episodes", float(len(x))))}


def mark(kept: Sequence[Episode], batch: Batch) -> None:
    """Write each episode's mean advantage into its info, for the samples that are shown."""
    if "adv" in batch:
        means = (batch["adv"] * batch["mask"]).sum(1) / batch["mask"].sum(1).clamp(min=1)
        for episode, value in zip(kept, means.tolist(), strict=True):
            episode.info["advantage"] = value


def check_gap(metrics: dict[str, float], stage: str) -> None:
    """Stop where the tokens were not sampled from the policy that is trained."""
    for name, value in metrics.items():
        if name.endswith("gap/mean") and value > LARGEST_GAP:
            raise RuntimeError(
                f"stages.{stage}: sampled log-probs differ from the training forward by {value:.3g} nats a token: "
                "the rollout engine and the learner do not compute the same policy"
            )


def spent(learners: Collection[Learner], rollouts: int) -> dict[str, float]:
    """What the stage has used so far: optimiser steps, sampled episodes, and tokens trained on (each epoch counts)."""
    return {
        "spent/updates": float(sum(learner.steps for learner in learners)),
        "spent/rollouts": float(rollouts),
        "spent/tokens": float(sum(learner.tokens for learner in learners)),
    }


def no_signal(episodes: list[Episode]) -> float:
    """The share of groups whose rewards are all equal, of those that have several; nan where none has."""
    groups = [list(g) for _, g in itertools.groupby(episodes, key=lambda e: e.group)]
    return average([float(len({e.reward for e in g}) == 1) for g in groups if len(g) > 1])


def average(values: list[float]) -> float:
    """The mean, nan where there is nothing."""
    return sum(values) / len(values) if values else float("nan")
