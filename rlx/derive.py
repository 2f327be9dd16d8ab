"""Derives: fields -> a new field (N,T), computed before the advantage, without gradient, 0 outside the mask."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlx import tensors
from rlx.types import ConfigError


def kl_penalty(
    old_logp: Tensor, ref_logp: Tensor, mask: Tensor, *, estimator: Literal["k1", "k2", "k3"] = "k1", coef: float
) -> Tensor:
    """-coef * KL(old || ref) at each token: (N,T), in units of reward; added to `reward`, it is RLHF's KL penalty.

    Estimators as in `kl_estimate` of rlx/tensors.py, in nats. It reads `old_logp`, the policy that drew the tokens: a
    reward is a number, and stays the same while the policy is updated (Ziegler et al. 2019, arXiv 1909.08593).
    """
    return -coef * tensors.kl_estimate(tensors.log_ratio(old_logp, ref_logp, mask), estimator)


def log_ratio(of: Tensor, over: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
    """scale * (of - over): (N,T), `of` and `over` being log-probabilities in nats that the recipe's `read` names."""
    return scale * tensors.log_ratio(of, over, mask)


def lambda_returns(
    reward: Tensor, old_value: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """R_t = V_t + A_t, A as in the advantage `gae`: (N,T), in units of reward; the critic's target `returns`.

    R_t = r_t + gamma ((1 - lam) V_u + lam R_u), u the next trained position (TD(lambda), Sutton 1988). lam=1 is the
    discounted return. Where the advantage has another lam than the target, the two are decoupled (VAPO, Yue et al. 2025,
    arXiv 2504.05118).
    """
    advantage = tensors.td_sums(reward, old_value, bootstrap, mask, gamma, lam)
    return advantage + tensors.inside(old_value, mask)


def paid_at_end(ret: Tensor, mask: Tensor) -> Tensor:
    """The total reward on the last position of the mask: (N,T), in units of reward.

    For a mask that holds more than what the policy chose: where another model wrote the end of an answer, `reward` stands
    on the last trained position, and this on the last of all.
    """
    return torch.where(tensors.last_position(mask), ret[:, None], 0.0)


def rollout_correction(
    old_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"] = "token",
    how: Literal["truncate", "mask"] = "truncate",
    cap: float = 2.0,
    floor: float = 0.0,
) -> Tensor:
    """w = old / rollout, the importance weight of tokens that an engine drew with other numbers than the trainer's: (N,T).

    rollout_logp is the engine's, old_logp the trainer's own for the same weights, in nats. `level: sequence` gives each token
    the product over its sequence. `truncate` limits w to [floor, cap] (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"), `mask` makes it 0 outside (IcePop, Ling team 2025). Written `into:
    correction`, it multiplies the advantage. It is 1 where the two agree.

    Raises ConfigError unless 0 <= floor <= 1 <= cap.
    """
    if not 0 <= floor <= 1 <= cap:
        raise ConfigError(f"rollout_correction: expected 0 <= floor <= 1 <= cap, got floor {floor}, cap {cap}")
    logs = tensors.log_ratio(old_logp, rollout_logp, mask)
    if level == "sequence":
        logs = logs.sum(-1, keepdim=True).expand_as(logs)
    weight = tensors.ratio(logs)
    limited = weight.clamp(floor, cap)
    return torch.where(mask, limited if how == "truncate" else torch.where(limited == weight, weight, 0.0), 0.0)
