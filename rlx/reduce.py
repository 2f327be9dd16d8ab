"""Reductions: a loss term (N,T) -> (), what is differentiated.

`counts` are those of the whole optimiser step, over all ranks and parts, so that the results of the parts *add up* to
the result of the whole: how a batch is split changes neither the loss nor its gradient. A mean over the means of the
parts would weight a token by the part that it happens to be in.
"""

from __future__ import annotations

from torch import Tensor

from rlx import tensors
from rlx.types import ConfigError, Counts


def token_mean(x: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """sum_i sum_t x_it / tokens: every token weighs the same (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.3)."""
    return tensors.masked_sum(x, mask) / counts.tokens


def seq_mean(x: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """sum_i mean_t(x_it) / sequences: every sequence weighs the same (GRPO, Shao et al. 2024, arXiv 2402.03300, eq. 3).

    A token of a long sequence weighs less than one of a short sequence.
    """
    return tensors.seq_mean(x, mask).sum() / counts.sequences


def seq_sum(x: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """sum_i sum_t x_it / sequences: the log-probability of a sequence is the sum of its tokens' (REINFORCE, RLOO)."""
    return tensors.masked_sum(x, mask) / counts.sequences


def constant(x: Tensor, mask: Tensor, counts: Counts, *, length: int) -> Tensor:
    """sum_i sum_t x_it / (sequences * length): `length` tokens for every sequence, however long it is.

    `seq_sum` at the scale of a token: no sequence's length changes what a token weighs (Dr. GRPO, Liu et al. 2025,
    arXiv 2503.20783, where it is the most tokens that may be generated).

    Raises ConfigError if length is not positive.
    """
    if length <= 0:
        raise ConfigError(f"constant: length must be positive, got {length}")
    return tensors.masked_sum(x, mask) / (counts.sequences * length)
