"""The first half of a step of `online`: play, pay, and keep what is worth training on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rlx.filters import chain
from rlx.rewards.score import score
from rlx.stages.buffers import Buffer
from rlx.stages.context import Context
from rlx.stages.models import with_models
from rlx.types import Episode, Play, Sampling

if TYPE_CHECKING:
    from rlx.stages.online import Online


def sampling(stage: Online, ctx: Context) -> Sampling:
    """How the policy draws."""
    return Sampling(ctx.max_new_tokens(stage.max_new_tokens), stage.temperature)


def draw(
    stage: Online,
    loaded: Mapping[str, Any],
    prompts: Iterator[list[Episode]],
    buffers: Mapping[str, Buffer],
    ctx: Context,
    step: int,
) -> tuple[list[Episode], list[Episode]]:
    """Sample, score and filter: the episodes to train on, and all of them.

    With `refill`, again on new prompts until `prompts_per_step` groups are kept or the tries are spent.
    """
    rewards = [with_models(r, loaded) for r in stage.reward]
    keep = [with_models(k, loaded) for k in stage.keep]
    sampler = with_models(stage.sampler, loaded)
    pay = partial(score, rewards=rewards, where=f"stages.{ctx.name}.reward")
    kept: list[Episode] = []
    seen: list[Episode] = []
    for attempt in range(1 + stage.refill):
        play = Play(
            policy=loaded["policy"],
            make_env=ctx.make_env,
            sampling=sampling(stage, ctx),
            seed=ctx.seeds(step, attempt),
            make_vec=ctx.make_vec,
            models=loaded,
            score=pay,
            pools={name: buffer.episodes for name, buffer in buffers.items()},
            step=step,
        )
        played = sampler.call(play, next(prompts), stage.group_size)
        pay(played)
        seen += played
        have = {e.group for e in kept}
        scored = [e for e in played if not math.isnan(e.reward) and e.num_tokens and e.group not in have]
        kept += chain(scored, keep)
        if len({e.group for e in kept}) >= stage.prompts_per_step:
            break
    if stage.refill:
        groups = set(list(dict.fromkeys(e.group for e in kept))[: stage.prompts_per_step])
        kept = [e for e in kept if e.group in groups]
    return kept, seen
