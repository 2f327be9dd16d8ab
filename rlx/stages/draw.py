"""The first half of a step of `online`: play, pay, and keep what is worth training on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from rlx.filters import chain
from rlx.offload import present
from rlx.stages.buffers import Buffer
from rlx.stages.context import Context
from rlx.stages.models import models_of, with_models
from rlx.stages.played import played
from rlx.types import Component, Episode, Keep, Reward, Sampler, Sampling


class Rollouts(Protocol):
    """The settings of a stage that say what is played and kept."""

    sampler: Component[Sampler]
    reward: list[Component[Reward]]
    keep: list[Component[Keep]]
    prompts_per_step: int
    group_size: int
    refill: int
    temperature: float
    stop: list[str]
    max_new_tokens: int | None


def sampling(stage: Rollouts, ctx: Context) -> Sampling:
    """How the policy draws."""
    return Sampling(ctx.max_new_tokens(stage.max_new_tokens), stage.temperature, stop=tuple(stage.stop))


def draw(
    stage: Rollouts,
    loaded: Mapping[str, Any],
    prompts: Iterator[list[Episode]],
    buffers: Mapping[str, Buffer],
    ctx: Context,
    step: int,
) -> tuple[list[Episode], list[Episode]]:
    """Sample, score and filter: the episodes to train on, and all of them.

    With `refill`, again on new prompts until `prompts_per_step` groups are kept or the tries are spent.
    """
    keep = [with_models(k, loaded) for k in stage.keep]
    kept: list[Episode] = []
    seen: list[Episode] = []
    for attempt in range(1 + stage.refill):
        found = played(
            ctx,
            next(prompts),
            stage.group_size,
            sampler=stage.sampler,
            reward=stage.reward,
            models=loaded,
            sampling=sampling(stage, ctx),
            seed=ctx.seeds(step, attempt),
            pools={name: buffer.episodes for name, buffer in buffers.items()},
            step=step,
        )
        seen += found
        have = {e.group for e in kept}
        scored = [e for e in found if not math.isnan(e.reward) and e.num_tokens and e.group not in have]
        with present(*models_of(stage.keep, loaded)):
            kept += chain(scored, keep)
        if len({e.group for e in kept}) >= stage.prompts_per_step:
            break
    if stage.refill:
        groups = set(list(dict.fromkeys(e.group for e in kept))[: stage.prompts_per_step])
        kept = [e for e in kept if e.group in groups]
    return kept, seen
