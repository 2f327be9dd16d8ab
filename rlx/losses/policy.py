"""Policy-gradient loss terms. `adv`, `old_logp` and `ref_logp` come without gradient: only `logp` is trained."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlx.marks import vanishes_with
from rlx.tensors import inside, kl_estimate, log_ratio, ratio
from rlx.types import ConfigError


@vanishes_with("adv")
def policy_gradient(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    """-A log pi: (N,T). Its gradient is the policy gradient where pi drew the tokens (REINFORCE, Williams 1992)."""
    return -inside(adv, mask) * inside(logp, mask)


def advantage_weighted(logp: Tensor, adv: Tensor, mask: Tensor, *, inverse_temperature: float = 1.0) -> Tensor:
    """-exp(lambda A) log pi, lambda the inverse temperature: (N,T). With 0 it is `nll`, behaviour cloning.

    Imitates what was done, the better it was the more, on tokens that any policy drew (advantage-weighted regression, Peng
    et al. 2019, arXiv 1910.00177). The weight is limited to exp(20), as ratios are.

    Raises ConfigError if inverse_temperature is negative.
    """
    if inverse_temperature < 0:
        raise ConfigError(f"advantage_weighted: inverse_temperature must not be negative, got {inverse_temperature}")
    return -ratio(inverse_temperature * inside(adv, mask)) * inside(logp, mask)


@vanishes_with("adv")
def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(q A, clip(q, 1 - clip_low, 1 + clip_high) A), q = pi / old: (N,T).

    A token has no gradient once its ratio has moved past the bound in the direction that its advantage asks for (PPO,
    Schulman et al. 2017, arXiv 1707.06347, eq. 7). A clip_high above clip_low lets rare tokens gain more (DAPO, Yu et
    al. 2025, arXiv 2503.14476, section 3.1). Where A < 0, q A has no bound of its own: `dual_clip`, a ratio above 1,
    limits the loss there to dual_clip |A| (Ye et al. 2020, arXiv 1912.09729; 3 in the paper).

    Raises ConfigError if a clip is negative or dual_clip is not above 1.
    """
    if clip_low < 0 or clip_high < 0:
        raise ConfigError(f"clipped_surrogate: clips must not be negative, got clip_low {clip_low}, clip_high {clip_high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ConfigError(f"clipped_surrogate: dual_clip is a ratio and must be above 1, got {dual_clip}")
    adv = inside(adv, mask)
    q = ratio(log_ratio(logp, old_logp, mask))
    loss = -torch.minimum(q * adv, q.clamp(1 - clip_low, 1 + clip_high) * adv)
    if dual_clip is None:
        return loss
    return torch.where(adv < 0, torch.minimum(loss, -dual_clip * adv), loss)


def kl(logp: Tensor, ref_logp: Tensor, mask: Tensor, *, estimator: Literal["k1", "k2", "k3", "k3_plus"] = "k3") -> Tensor:
    """Estimate of KL(pi || ref) at each token, d = log pi - log ref: (N,T) nats.

    | estimator | value            | expected gradient, tokens drawn from pi |
    |-----------|------------------|-----------------------------------------|
    | k1        | d                | 0: it holds nothing back (use it in the reward, as the derive `kl_penalty`) |
    | k2        | d^2 / 2          | that of KL(pi || ref) |
    | k3        | exp(-d) - 1 + d  | that of KL(ref || pi) (GRPO, Shao et al. 2024, arXiv 2402.03300, eq. 4) |
    | k3_plus   | as k3            | as k2 |

    See `kl_estimate` in rlx/tensors.py for the values and the limit on d.
    """
    logs = log_ratio(logp, ref_logp, mask)
    if estimator != "k3_plus":
        return kl_estimate(logs, estimator)
    k2, k3 = kl_estimate(logs, "k2"), kl_estimate(logs, "k3")
    return k3.detach() + (k2 - k2.detach())
