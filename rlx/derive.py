"""Derives: fields -> a new field (N,T), computed before the advantage, without gradient, 0 outside the mask."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlx import tensors


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
