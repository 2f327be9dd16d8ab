"""Episodes of a stage: its sampler plays, its rewards pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlx import world
from rlx.offload import Brought, present
from rlx.rewards.score import begin, pay, show
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
    where = f"stages.{at.name}.reward"

    def paid(episodes: list[Episode]) -> list[Episode]:
        with present(*models_of(reward, models)):
            pay(episodes, rewards, where)
        return episodes

    def shown(episodes: list[Episode]) -> None:
        show(paid(episodes), rewards, where)

    play = Play(
        models.get("policy"),
        at.make_env,
        sampling,
        seed,
        make_vec=at.make_vec,
        models=Brought(models),
        score=shown,
        pools=pools or {},
        step=step,
        ended=partial(begin, rewards),
    )

    def made(share: list[Episode]) -> list[Episode]:
        with present(*models_of([sampler], models)):
            episodes: list[Episode] = with_models(sampler, models).call(play, share, n)
        return paid(episodes)

    with world.phase("rollouts"):
        episodes = spread(rows, made, together=together(sampler))
    show(episodes, rewards, where)
    return episodes
