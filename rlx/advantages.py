"""Advantage estimators: fields -> `adv` (N,T), 0 outside the mask.

The estimators over groups read `ret` (N,), the total reward of each episode, and give every trained position of an
episode the same value. An episode that could not be scored (ret nan) is left out of its group's statistics and gets 0,
as does an episode that is alone in its group: it has nothing to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlx.tensors import group_mean_std, inside, seq_sum, spread, sum_to_go, td_sums


def group_mean(ret: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """A = R - mean of the group: (N,T), in units of reward (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).

    R counts in its own baseline, so the expected gradient is (G - 1) / G of the true one; `rloo` has no such factor.
    """
    mean, _, _ = group_mean_std(ret, group)
    return spread(_scored(ret - mean), mask)


def group_zscore(ret: Tensor, group: Tensor, mask: Tensor, *, eps: float = 1e-6) -> Tensor:
    """A = (R - mean) / (std + eps) of the group: (N,T), without unit.

    std is the sample standard deviation (n - 1). Where all rewards of a group are equal, A is exactly 0 (GRPO, Shao et
    al. 2024, arXiv 2402.03300, section 4.1.2).
    """
    mean, std, _ = group_mean_std(ret, group)
    return spread(_scored(ret - mean) / (std + eps), mask)


def rloo(ret: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """A = R - mean of the others in the group = G / (G - 1) (R - mean): (N,T), in units of reward.

    R does not count in its own baseline, so the gradient is unbiased (RLOO, Ahmadian et al. 2024, arXiv 2402.14740). G
    is the number of scored episodes of the group.
    """
    mean, _, count = group_mean_std(ret, group)
    return spread(_scored(ret - mean) * count / (count - 1).clamp(min=1), mask)


def returns(reward: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """A_t = r_t + gamma A_u, u the next trained position: (N,T), in units of reward.

    The reward-to-go of REINFORCE (Williams 1992), without a baseline. It reads the dense `reward`: what a derive has
    added there (a KL penalty) counts where it is paid.
    """
    scored = ~seq_sum(reward, mask).isnan()
    return sum_to_go(reward, mask & scored.unsqueeze(-1), gamma)


def gae(
    reward: Tensor,
    old_value: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = False,
) -> Tensor:
    """A_t = d_t + gamma lam A_u, d_t = r_t + gamma V_u - V_t, u the next trained position: (N,T), in units of reward.

    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16). lam=1 is return minus value, lam=0 the
    TD error. V is the critic's before the update; after the last position of an episode that was cut stands `bootstrap`.
    `whiten` brings all advantages of the batch to mean 0 and standard deviation (n - 1) 1, so that they have no unit.
    An episode that could not be scored gets 0 and does not count.
    """
    scored = mask & ~seq_sum(reward, mask).isnan().unsqueeze(-1)
    adv = td_sums(reward, old_value, bootstrap, scored, gamma, lam)
    if not whiten:
        return adv
    count = scored.sum()
    mean = adv.sum() / count.clamp(min=1)
    centred = inside(adv - mean, scored)
    return centred / ((centred.square().sum() / (count - 1).clamp(min=1)).sqrt() + 1e-8)


def role_whitened(reward: Tensor, agent: Tensor, mask: Tensor, *, gamma: float = 1.0, eps: float = 1e-8) -> Tensor:
    """A_t = (G_t - mean) / (std + eps), G the reward-to-go, over all tokens of the role's episodes: (N,T), without unit.

    REINFORCE++ (Hu 2025, arXiv 2501.03262) for each role by itself (Multi-Agent Evolve, arXiv 2510.23595): a role that is
    paid more than another is not praised for that. `agent` (N,) is the role; with one role it is REINFORCE++. std is the
    sample standard deviation (n - 1); where all tokens of a role earn the same, A is exactly 0. Episodes that could not be
    scored count nowhere.
    """
    counted = mask & ~seq_sum(reward, mask).isnan().unsqueeze(-1)
    earned = sum_to_go(reward, counted, gamma)[counted]
    mean, std, _ = group_mean_std(earned, agent.unsqueeze(-1).expand_as(mask)[counted])
    return torch.zeros_like(reward).masked_scatter(counted, (earned - mean) / (std + eps))


def _scored(x: Tensor) -> Tensor:
    """`x`, with 0 for the episodes that could not be scored."""
    return torch.where(x.isnan(), 0.0, x)
