"""Episodes of a stage: its sampler plays, its rewards pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlx import world
from rlx.offload import Brought, present
from rlx.rewards.score import score
from rlx.stages.context import Sources
from rlx.stages.models import models_of, with_models
from rlx.stages.spread import spread, together
from rlx.types import Component, Episode, Play, Reward, Sampler, Sampling


def played(
    at: Sources,
    rows: list[Episode],
    n: int,
    *,
    sampler: Component[Sampler],
    reward: Sequence[Component[Reward]],
    models: Mapping[str, Any],
    sampling: Sampling,
    seed: tuple[int, ...],
    pools: Mapping[str, Sequence[Episode]] | None = None,
    step: int = 0,
) -> list[Episode]:
    """`n` episodes of each row, played with the stage's `models` (the policy among them, where one is asked) and paid."""
    rewards = [with_models(r, models) for r in reward]

    def pay(episodes: list[Episode]) -> None:
        with present(*models_of(reward, models)):
            score(episodes, rewards, f"stages.{at.name}.reward")

    play = Play(models.get("policy"), at.make_env, sampling, seed, at.make_vec, Brought(models), pay, pools or {}, step)

    def paid(share: list[Episode]) -> list[Episode]:
        with present(*models_of([sampler], models)):
            episodes: list[Episode] = with_models(sampler, models).call(play, share, n)
        pay(episodes)
        return episodes

    with world.phase("rollouts"):
        return spread(rows, paid, together=together(sampler))
