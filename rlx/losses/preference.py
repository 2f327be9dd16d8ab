"""Preference losses: one number for each group, the mean over the group's pairs, (P,) nats.

A pair is two sequences of one group whose labels differ; the one with the larger label is the better. So a group may hold
two answers (labels +1 and -1) or a ranked list (labels are ranks), and its sequences may stand anywhere in the batch. A
group without a pair has a loss of 0.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlx.tensors import log_ratio, pair_mean, pairs, seq_sum
from rlx.types import ConfigError


def bradley_terry(score: Tensor, group: Tensor, label: Tensor, *, margin: float = 0.0, center: float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + center (r_w + r_l)^2: (P,) nats, r in units of its own.

    The likelihood of the labels where P(w beats l) = sigmoid(r_w - r_l) (Bradley and Terry 1952). A list of K ranked answers
    is the mean over its K (K - 1) / 2 pairs (InstructGPT, Ouyang et al. 2022, arXiv 2203.02155, eq. 1). `margin` asks for
    a larger difference (Llama 2, Touvron et al. 2023, arXiv 2307.09288, eq. 2). `center` holds scores around 0, which the
    likelihood leaves free (Eisenstein et al. 2023, arXiv 2312.09244; 0.01 there).

    Raises ConfigError if center is negative.
    """
    if center < 0:
        raise ConfigError(f"bradley_terry: center must not be negative, got {center}")
    win, lose = pairs(group, label)
    better, worse = score.float()[win], score.float()[lose]
    return pair_mean(-logsigmoid(better - worse - margin) + center * (better + worse).square(), win, group)


def dpo(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    group: Tensor,
    label: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log sigmoid(h) - e log sigmoid(-h): (P,) nats, h = beta (log pi/ref of the better - that of the worse).

    The log-ratios are sums over the trained tokens (DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7). beta is the strength
    of the KL penalty of which the optimum is sought. `label_smoothing` e is the share of labels that are held to be wrong
    (cDPO, Mitchell 2023): the loss then has its minimum at sigmoid(h) = 1 - e instead of at infinity.

    Raises ConfigError if beta is not positive, or label_smoothing not in [0, 0.5].
    """
    if beta <= 0 or not 0 <= label_smoothing <= 0.5:
        raise ConfigError(f"dpo: expected a positive beta and label_smoothing from 0 to 0.5, got {beta} and {label_smoothing}")
    reward = beta * seq_sum(log_ratio(logp, ref_logp, mask), mask)
    win, lose = pairs(group, label)
    h = reward[win] - reward[lose]
    return pair_mean(-(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h), win, group)
