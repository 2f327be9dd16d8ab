"""Arithmetic that several modules share: masked sums, statistics of groups, log-ratios. Shapes are those of FIELDS.

Values outside the mask may be anything, nan and inf included. `inside` puts zeros there before anything is computed,
because 0 * nan is nan, in the value and in the gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# exp(20) = 5e8 is far above any ratio that a healthy run meets, and far below where a float32 overflows, exp(88.7).
MAX_LOG_RATIO = 20.0


def inside(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (N,T) as float32, exactly 0 outside the mask, where it has no gradient either.

    Raises ValueError if the shapes differ: (N,) against (N,T) would broadcast without a word where N equals T.
    """
    if x.shape != mask.shape:
        raise ValueError(f"expected the shape of the mask, {tuple(mask.shape)}, got {tuple(x.shape)}")
    return torch.where(mask, x.float(), 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` (N,T) inside the mask: ()."""
    return inside(x, mask).sum()


def seq_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` (N,T) over each sequence's trained positions: (N,)."""
    return inside(x, mask).sum(-1)


def by_turn(x: Tensor, turn: Tensor, turns: int) -> Tensor:
    """Sum of `x` (N,T) over the trained positions of each turn: (N,K)."""
    total = x.new_zeros(x.shape[0], turns + 1)
    return total.scatter_add(1, torch.where(turn < 0, turns, turn), inside(x, turn >= 0))[:, :turns]


def seq_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` (N,T) over each sequence's trained positions: (N,); 0 for a sequence that has none."""
    return seq_sum(x, mask) / mask.sum(-1).clamp(min=1)


def last_position(mask: Tensor) -> Tensor:
    """True on the last trained position of each sequence: (N,T) bool, all False in a row without one."""
    left = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (left == 1)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """One value for each sequence (N,), written on all its trained positions: (N,T), 0 elsewhere."""
    return torch.where(mask, values.float().unsqueeze(-1), 0.0)


def sum_to_go(x: Tensor, mask: Tensor, discount: float) -> Tensor:
    """y_t = x_t + discount * y_u, with u the next trained position after t: (N,T), 0 outside the mask.

    Positions that the policy did not produce (a tool's reply) are stepped over: they neither add nor discount.
    """
    x = inside(x, mask)
    total = torch.zeros_like(x[:, 0])
    columns = []
    for t in reversed(range(x.shape[-1])):
        total = torch.where(mask[:, t], x[:, t] + discount * total, total)
        columns.append(total)
    return inside(torch.stack(columns[::-1], dim=-1), mask)


def td_sums(reward: Tensor, value: Tensor, bootstrap: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = d_t + gamma lam A_u with d_t = r_t + gamma V_u - V_t, u the next trained position after t: (N,T), 0 outside.

    After the last trained position stands `bootstrap` (N,): the value of the state in which an episode was cut, 0 where it
    ended. Positions that the policy did not produce are stepped over: their values are never read.
    """
    reward, value = inside(reward, mask), inside(value, mask)
    after, total = bootstrap.float(), torch.zeros_like(reward[:, 0])
    columns = []
    for t in reversed(range(reward.shape[-1])):
        found = reward[:, t] + gamma * after - value[:, t] + gamma * lam * total
        total = torch.where(mask[:, t], found, total)
        after = torch.where(mask[:, t], value[:, t], after)
        columns.append(total)
    return inside(torch.stack(columns[::-1], dim=-1), mask)


def pairs(group: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The better and the worse sequence of every pair of one group whose labels (N,) differ, as indices: (M,) each."""
    better = (group[:, None] == group[None]) & (label[:, None] > label[None])
    win, lose = better.nonzero(as_tuple=True)
    return win, lose


def pair_mean(x: Tensor, of: Tensor, group: Tensor) -> Tensor:
    """Mean of the values x (M,) that belong to the sequences `of` (M,), for each group of `group` (N,): (P,), 0 of none.

    The groups are in the order of their labels.
    """
    labels, index = torch.unique(group, return_inverse=True)
    zeros = x.new_zeros(len(labels))
    count = zeros.index_add(0, index[of], torch.ones_like(x))
    return zeros.index_add(0, index[of], x) / count.clamp(min=1)


def group_mean_std(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (n - 1) and number of the scored values of each sequence's group: (N,) each.

    `values` (N,) are nan where an episode could not be scored; those do not count. `group` (N,) holds any labels, in
    any order. A group whose values are all equal has a standard deviation of exactly 0, as has a group of one; the mean
    of a group without any score is 0.

    The sums run in float64: there the sum of equal float32 values is exact, so that "all equal" needs no tolerance, and
    the order of the episodes does not show.
    """
    _, index = torch.unique(group, return_inverse=True)
    scored = ~values.isnan()

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, index, x)[index]

    count = total(scored.double())
    mean = total(torch.where(scored, values.double(), 0.0)) / count.clamp(min=1)
    squares = total(torch.where(scored, values.double() - mean, 0.0) ** 2)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return mean.float(), std.float(), count.float()


def log_ratio(of: Tensor, over: Tensor, mask: Tensor) -> Tensor:
    """of - over, in nats: (N,T), 0 outside the mask."""
    return inside(of, mask) - inside(over, mask)


def ratio(logs: Tensor) -> Tensor:
    """exp(logs), with `logs` limited to +-20: one overflowing token would make the loss of a whole batch infinite."""
    return logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_estimate(logs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(p || q) in nats from samples of p, with logs = log p - log q: same shape.

    k1 = d (unbiased), k2 = d^2 / 2 (biased, small variance), k3 = exp(-d) - 1 + d (unbiased and never negative).
    Schulman, "Approximating KL Divergence", 2020.

    In k3, d is kept above -20 (see `ratio`). Above +20 it needs no limit, and the gradient 1 that it has there still
    pulls the policy back to the reference.
    """
    if estimator == "k1":
        return logs
    if estimator == "k2":
        return logs.square() / 2
    logs = logs.clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-logs) + logs
