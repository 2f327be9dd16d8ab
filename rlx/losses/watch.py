"""Diagnostics: named tensors -> (N,T), 0 outside the mask, (N,) or (P,); averaged and logged, never trained on."""

from __future__ import annotations

from torch import Tensor

from rlx.marks import vanishes_with
from rlx.tensors import inside, kl_estimate, log_ratio, pair_mean, pairs, ratio, seq_sum


@vanishes_with("adv")
def clip_fraction(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """1 where the clip of `clipped_surrogate` is active and the token has no gradient, else 0: (N,T).

    That is q > 1 + clip_high with A > 0, or q < 1 - clip_low with A < 0. It is 0 before an update's first step.
    """
    adv = inside(adv, mask)
    q = ratio(log_ratio(logp, old_logp, mask))
    return (((q > 1 + clip_high) & (adv > 0)) | ((q < 1 - clip_low) & (adv < 0))).float()


def approx_kl(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """KL(old || pi) at each token by k3, the tokens being drawn from old: (N,T) nats. How far the update has moved."""
    return kl_estimate(log_ratio(old_logp, logp, mask), "k3")


def ref_kl(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """KL(pi || ref) at each token by k3: (N,T) nats. How far training has moved from the reference."""
    return kl_estimate(log_ratio(logp, ref_logp, mask), "k3")


def entropy_value(entropy: Tensor, mask: Tensor) -> Tensor:
    """H, the entropy of the policy's distribution at each position: (N,T) nats."""
    return inside(entropy, mask)


def pair_accuracy(score: Tensor, group: Tensor, label: Tensor) -> Tensor:
    """Share of a group's pairs in which the better sequence has the higher score, a tie counting half: (P,)."""
    win, lose = pairs(group, label)
    return pair_mean(((score[win] - score[lose]).sign() + 1) / 2, win, group)


def dpo_accuracy(logp: Tensor, ref_logp: Tensor, mask: Tensor, group: Tensor, label: Tensor) -> Tensor:
    """`pair_accuracy` by DPO's implicit reward log pi/ref (Rafailov et al. 2023, arXiv 2305.18290): (P,)."""
    return pair_accuracy(seq_sum(log_ratio(logp, ref_logp, mask), mask), group, label)


def dpo_margin(logp: Tensor, ref_logp: Tensor, mask: Tensor, group: Tensor, label: Tensor) -> Tensor:
    """Log pi/ref of the better sequence minus that of the worse, mean over a group's pairs: (P,) nats."""
    implicit = seq_sum(log_ratio(logp, ref_logp, mask), mask)
    win, lose = pairs(group, label)
    return pair_mean(implicit[win] - implicit[lose], win, group)
