"""Losses of a critic: (N,T), in squared units of reward. `returns` and `old_value` come without gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import maximum as larger

from rlx.tensors import inside
from rlx.types import ConfigError


def value_mse(value: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """(V - R)^2 / 2: (N,T). Its minimum is the expected return of each state."""
    return (inside(value, mask) - inside(returns, mask)).square() / 2


def expectile_value(value: Tensor, returns: Tensor, mask: Tensor, *, expectile: float = 0.9) -> Tensor:
    """w (V - R)^2, w = expectile where R is above V, else 1 - expectile: (N,T). With 0.5 it is `value_mse`.

    Its minimum is that expectile of R: near 1, what the best of the stored actions bring, without drawing any (IQL,
    Kostrikov et al. 2021, arXiv 2110.06169). Turn by turn: `read: {value: v, returns: target_q, mask: turn_mask}`.

    Raises ConfigError if expectile is not between 0 and 1.
    """
    if not 0 < expectile < 1:
        raise ConfigError(f"expectile_value: expectile must be between 0 and 1, got {expectile}")
    ahead = inside(returns, mask) - inside(value, mask)
    return torch.where(ahead > 0, expectile, 1 - expectile) * ahead.square()


def clipped_value(value: Tensor, old_value: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2) -> Tensor:
    """max((V - R)^2, (V' - R)^2) / 2 with V' = V_old + clip(V - V_old, -clip, clip): (N,T).

    A value that has moved by more than `clip` (in units of reward) towards its target has no gradient: the critic moves
    as little in an update as PPO's policy does (Schulman et al., OpenAI baselines, ppo2, 2017).

    Raises ConfigError if clip is not positive.
    """
    if clip <= 0:
        raise ConfigError(f"clipped_value: clip must be positive, got {clip}")
    new, old, target = inside(value, mask), inside(old_value, mask), inside(returns, mask)
    near = old + (new - old).clamp(-clip, clip)
    return larger((new - target).square(), (near - target).square()) / 2
