"""How tokens are drawn, as the stages that measure, collect and select say it."""

from __future__ import annotations

from typing import Protocol

from rlx.stages.context import Context
from rlx.types import Sampling


class Drawn(Protocol):
    """The settings of a stage that say how an answer is drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: list[str]
    max_new_tokens: int | None


def drawing(stage: Drawn, ctx: Context) -> Sampling:
    """The same for an engine."""
    limit = ctx.max_new_tokens(stage.max_new_tokens)
    return Sampling(limit, stage.temperature, stage.top_k, stage.top_p, stage.min_p, tuple(stage.stop))


def drawing_problems(stage: Drawn) -> list[str]:
    """One line for each setting that is out of its range."""
    found = [] if stage.top_k >= 0 else [f"top_k: expected 0 (all tokens) or more, got {stage.top_k}"]
    if not 0 < stage.top_p <= 1:
        found.append(f"top_p: expected more than 0 and at most 1, got {stage.top_p}")
    if not 0 <= stage.min_p < 1:
        found.append(f"min_p: expected 0 to below 1, a share of the likeliest token's probability, got {stage.min_p}")
    return found + stop_problems(stage.stop)


def stop_problems(stop: list[str]) -> list[str]:
    """One line for each stop string that is empty."""
    return [f"stop.{i}: an empty text would end every answer at its first token" for i, s in enumerate(stop) if not s]
