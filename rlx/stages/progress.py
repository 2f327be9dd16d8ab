"""What `fit` and `online` do beside training: evaluate, keep the best weights, log, and write checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rlx.stages.context import Context
from rlx.stages.evaluation import Eval, evaluated
from rlx.types import Episode


class Training(Protocol):
    """The settings of a stage that say when."""

    steps: int
    eval: Eval | None
    log_every: int
    checkpoint_every: int


def before(stage: Training, policy: Any, ctx: Context, used: Mapping[str, float]) -> dict[str, float]:
    """Evaluate before the first step, if the stage evaluates at all; what it measured. `used` is what was spent by then."""
    if stage.eval is None or ctx.step:  # a stage that goes on has done so
        return {}
    measured, episodes = evaluated(policy, stage.eval, ctx)
    ctx.log.step(0, {**measured, **used}, episodes)
    ctx.judge(measured, stage.eval.patience)
    return measured


def after(
    stage: Training,
    policy: Any,
    ctx: Context,
    step: int,
    metrics: Mapping[str, float],
    shown: Sequence[Episode] | None = None,
) -> dict[str, float]:
    """End a step: evaluate, log and write a checkpoint where it is time to; the metrics with what was measured.

    `shown` are the samples of a step that is logged; without them, those of the evaluation. Every evaluation is logged.
    """
    found, measured = dict(metrics), dict[str, float]()
    episodes: list[Episode] = []
    if stage.eval is not None and stage.eval.due(step, stage.steps):
        measured, episodes = evaluated(policy, stage.eval, ctx)
        found |= measured
        ctx.judge(found, stage.eval.patience)
    if step % stage.log_every == 0 or step == stage.steps or measured:
        ctx.log.step(step, found, episodes if shown is None else list(shown))
    if stage.checkpoint_every and step % stage.checkpoint_every == 0:
        ctx.checkpoint(f"step-{step:06d}")
    return found
