"""Loss terms that read the policy's own distribution only."""

from __future__ import annotations

from torch import Tensor

from rlx.tensors import inside


def nll(logp: Tensor, mask: Tensor) -> Tensor:
    """-log pi: (N,T) nats. Maximum likelihood of the tokens that are trained on."""
    return -inside(logp, mask)


def entropy(entropy: Tensor, mask: Tensor) -> Tensor:
    """-H: (N,T) nats. A bonus: with a positive weight, a policy that is less sure of itself has a lower loss."""
    return -inside(entropy, mask)
