"""Optimisers and learning-rate schedules of the catalogue."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch


def adamw(
    parameters: Iterable[torch.nn.Parameter],
    lr: float,
    *,
    betas: list[float] | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    warmup: int = 0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019). The learner applies `clip` (gradient norm), `schedule` and `warmup` (steps)."""
    b1, b2 = betas if betas is not None else (0.9, 0.999)
    return torch.optim.AdamW(parameters, lr=lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay, fused=True)


def factor(step: int, *, total: int, schedule: str, warmup: int) -> float:
    """What the learning rate is multiplied by at optimiser step `step` (from 0): linear warm-up, then the schedule to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
