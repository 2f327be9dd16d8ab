"""Loss terms and watches: hand values, gradients, identities, and what is outside the mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlx.losses import likelihood, policy, watch
from rlx.tensors import seq_sum
from rlx.types import ConfigError

HERE = torch.tensor([[True]])


def one(x: float, grad: bool = False) -> Tensor:
    return torch.tensor([[x]], requires_grad=grad)


def clip(q: float, adv: float, dual: float | None = None) -> float:
    loss = policy.clipped_surrogate(one(q).log(), one(0.0), one(adv), HERE, clip_low=0.2, clip_high=0.28, dual_clip=dual)
    return float(loss)


# --------------------------------------------------------------------------- values
def test_nll_entropy_and_policy_gradient_values() -> None:
    mask = torch.tensor([[True, True]])
    x = torch.tensor([[-0.5, -2.0]])
    adv = torch.tensor([[2.0, -1.0]])
    torch.testing.assert_close(likelihood.nll(x, mask), torch.tensor([[0.5, 2.0]]))
    torch.testing.assert_close(likelihood.entropy(-x, mask), torch.tensor([[-0.5, -2.0]]))
    torch.testing.assert_close(policy.policy_gradient(x, adv, mask), torch.tensor([[1.0, -2.0]]))
    torch.testing.assert_close(watch.entropy_value(-x, mask), torch.tensor([[0.5, 2.0]]))


@pytest.mark.parametrize(
    ("q", "adv", "dual", "expected"),
    [
        (1.5, 1, None, -1.28),
        (1.5, -1, None, 1.5),
        (0.5, 1, None, -0.5),
        (0.5, -1, None, 0.8),
        (5, -1, None, 5.0),
        (5, -1, 3.0, 3.0),
        (1.5, -1, 3.0, 1.5),
        (0.5, -1, 3.0, 0.8),
        (5, 1, 3.0, -1.28),
    ],
)
def test_clipped_surrogate_values(q: float, adv: float, dual: float | None, expected: float) -> None:
    assert clip(q, adv, dual) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531), ("k3_plus", 0.106531)])
def test_kl_values_at_half_a_nat(estimator: str, expected: float) -> None:
    value = policy.kl(one(-1.0), one(-1.5), HERE, estimator=estimator)  # type: ignore[arg-type]
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", 0.082283, 0.0),
        ("k2", 0.078766, 0.177932),
        ("k3", 0.082283, 0.2),
        ("k3_plus", 0.082283, 0.177932),
    ],
)
def test_kl_in_the_loss_has_the_documented_expected_gradient(estimator: str, value: float, gradient: float) -> None:
    """p = (.7, .3), ref = (.5, .5), gradient to the first logit; grad KL(p||ref) = .177932, grad KL(ref||p) = .2."""
    z = torch.tensor([0.7, 0.3]).log().requires_grad_()
    p = torch.tensor([0.7, 0.3])
    logp = z.log_softmax(-1).unsqueeze(0)
    ref = torch.full((1, 2), 0.5).log()
    expected = (p * policy.kl(logp, ref, torch.ones(1, 2, dtype=torch.bool), estimator=estimator)).sum()  # type: ignore[arg-type]
    expected.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert float(expected.detach()) == pytest.approx(value, abs=1e-6)
    assert float(z.grad[0]) == pytest.approx(gradient, abs=1e-6)


def test_watch_values() -> None:
    mask = torch.tensor([[True, True, True, True, True]])
    q = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    adv = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    old = torch.full((1, 5), -3.0)
    clipped = watch.clip_fraction(old + q.log(), old, adv, mask, clip_low=0.2, clip_high=0.28)
    assert clipped.tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0]]
    # tokens come from old: k3 = q - 1 - log q
    assert float(watch.approx_kl(one(1.5).log(), one(0.0), HERE)) == pytest.approx(0.094535, abs=1e-6)
    # tokens come from pi: k3 = exp(-.5) - 1 + .5
    assert float(watch.ref_kl(one(-1.0), one(-1.5), HERE)) == pytest.approx(0.106531, abs=1e-6)


def test_clip_fraction_marks_the_tokens_without_gradient() -> None:
    torch.manual_seed(0)
    old, adv = torch.randn(8, 16), torch.randn(8, 16)
    logp = (old + 0.4 * torch.randn(8, 16)).requires_grad_()
    mask = torch.ones(8, 16, dtype=torch.bool)
    policy.clipped_surrogate(logp, old, adv, mask, clip_high=0.3).sum().backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    clipped = watch.clip_fraction(logp, old, adv, mask, clip_low=0.2, clip_high=0.3)
    assert 0 < float(clipped.mean()) < 1
    torch.testing.assert_close(clipped.bool(), logp.grad == 0)


# --------------------------------------------------------------------------- gradients and identities
def slope(loss: Callable[[Tensor], Tensor]) -> float:
    logp = one(-1.0, grad=True)
    loss(logp).sum().backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    return float(logp.grad)


def test_signs_of_gradients() -> None:
    """A positive slope means that descending the loss lowers the log-probability (or the entropy)."""
    assert slope(lambda x: likelihood.nll(x, HERE)) == -1.0
    assert slope(lambda x: likelihood.entropy(x, HERE)) == -1.0
    assert slope(lambda x: policy.policy_gradient(x, one(2.0), HERE)) == -2.0
    assert slope(lambda x: policy.policy_gradient(x, one(-2.0), HERE)) == 2.0
    assert slope(lambda x: policy.clipped_surrogate(x, one(-1.0), one(2.0), HERE)) == -2.0
    assert slope(lambda x: policy.clipped_surrogate(x, one(-1.0), one(-2.0), HERE)) == 2.0
    for estimator in ("k1", "k2", "k3", "k3_plus"):
        assert slope(lambda x, e=estimator: policy.kl(x, one(-1.5), HERE, estimator=e)) > 0  # type: ignore[misc]


def test_the_clip_stops_only_the_direction_that_the_advantage_asks_for() -> None:
    assert slope(lambda x: policy.clipped_surrogate(x, one(-1.5), one(1.0), HERE)) == 0.0
    assert slope(lambda x: policy.clipped_surrogate(x, one(-0.5), one(-1.0), HERE)) == 0.0
    assert slope(lambda x: policy.clipped_surrogate(x, one(-1.5), one(-1.0), HERE)) > 0
    assert slope(lambda x: policy.clipped_surrogate(x, one(-0.5), one(1.0), HERE)) < 0
    assert slope(lambda x: policy.clipped_surrogate(x, one(-4.0), one(-1.0), HERE, dual_clip=3.0)) == 0.0


def test_at_the_old_policy_the_clipped_gradient_is_the_policy_gradient() -> None:
    torch.manual_seed(0)
    old, adv = torch.randn(4, 6), torch.randn(4, 6)
    adv[0, 0] = 0.0
    mask = torch.ones(4, 6, dtype=torch.bool)
    logp = old.clone().requires_grad_()
    (expected,) = torch.autograd.grad(policy.policy_gradient(logp, adv, mask).sum(), logp)
    for dual_clip in (None, 3.0):
        loss = policy.clipped_surrogate(logp, old, adv, mask, dual_clip=dual_clip)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


def test_losses_and_gradients_stay_finite_at_extreme_ratios() -> None:
    """A log-ratio of 1000: exp of it is inf. Beyond the limit k3 still pulls back a policy that left the reference."""
    for x in (-1000.0, 1000.0):
        logp = one(x, grad=True)
        for value in (
            policy.clipped_surrogate(logp, one(-1.0), one(-1.0), HERE),
            policy.kl(logp, one(-1.0), HERE),
            policy.kl(logp, one(-1.0), HERE, estimator="k3_plus"),
        ):
            (grad,) = torch.autograd.grad(value.sum(), logp)
            assert torch.isfinite(value).all()
            assert torch.isfinite(grad).all()
    logp = one(-1.0, grad=True)
    (grad,) = torch.autograd.grad(policy.kl(logp, one(-1000.0), HERE).sum(), logp)
    assert float(grad) == 1.0


def test_at_inverse_temperature_0_advantage_weighted_is_plain_imitation() -> None:
    torch.manual_seed(0)
    x, adv = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.rand(4, 6) < 0.7
    logp = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.nll(logp, mask).sum(), logp)
    loss = policy.advantage_weighted(logp, adv, mask, inverse_temperature=0.0)
    torch.testing.assert_close(loss, likelihood.nll(x, mask), atol=0, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(gradient, expected, atol=0, rtol=0)


def test_advantage_weighted_by_hand() -> None:
    """exp(2 x 0.5) = e; the gradient is minus the weight, whatever its sign; and a weight has an end."""
    assert float(policy.advantage_weighted(one(-3.0), one(0.5), HERE, inverse_temperature=2.0)) == pytest.approx(3 * math.e)
    assert slope(lambda x: policy.advantage_weighted(x, one(-1.0), HERE)) == pytest.approx(-math.exp(-1))
    assert slope(lambda x: policy.advantage_weighted(x, one(1000.0), HERE)) == pytest.approx(-math.exp(20))
    with pytest.raises(ConfigError, match=r"inverse_temperature must not be negative, got -1\.0"):
        policy.advantage_weighted(one(0), one(0), HERE, inverse_temperature=-1.0)


def test_half_precision_comes_out_as_float32() -> None:
    half = one(-1.5).bfloat16()
    for x in (
        likelihood.nll(half, HERE),
        policy.policy_gradient(half, half, HERE),
        policy.clipped_surrogate(half, half, half, HERE),
        policy.kl(half, half, HERE),
        watch.clip_fraction(half, half, half, HERE, clip_low=0.2, clip_high=0.2),
    ):
        assert x.dtype == torch.float32


# --------------------------------------------------------------------------- outside the mask
TERMS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "nll": (1, likelihood.nll),
    "entropy": (1, likelihood.entropy),
    "policy_gradient": (2, policy.policy_gradient),
    "advantage_weighted": (2, policy.advantage_weighted),
    "clipped_surrogate": (3, policy.clipped_surrogate),
    "dual_clip": (3, lambda *x: policy.clipped_surrogate(*x, dual_clip=3.0)),
    "k1": (2, lambda *x: policy.kl(*x, estimator="k1")),
    "k2": (2, lambda *x: policy.kl(*x, estimator="k2")),
    "k3": (2, lambda *x: policy.kl(*x, estimator="k3")),
    "k3_plus": (2, lambda *x: policy.kl(*x, estimator="k3_plus")),
    "clip_fraction": (3, lambda *x: watch.clip_fraction(*x, clip_low=0.2, clip_high=0.2)),
    "approx_kl": (2, watch.approx_kl),
    "ref_kl": (2, watch.ref_kl),
    "entropy_value": (1, watch.entropy_value),
}


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e30, -1e4])
@pytest.mark.parametrize("term", TERMS)
def test_masked_positions_change_neither_value_nor_gradient(term: str, garbage: float) -> None:
    number, call = TERMS[term]
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    clean = [torch.where(mask, torch.randn(3, 3), 0.0) for _ in range(number)]
    results = []
    for filler in (0.0, garbage):
        fields = [torch.where(mask, x, filler).requires_grad_(i == 0) for i, x in enumerate(clean)]
        out = call(*fields, mask)
        assert (out[~mask] == 0).all()
        if out.requires_grad:
            seq_sum(out, mask).sum().backward()  # type: ignore[no-untyped-call]
            assert fields[0].grad is not None
            assert (fields[0].grad[~mask] == 0).all()
        results.append((out.detach(), fields[0].grad))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


# --------------------------------------------------------------------------- mistakes
def test_a_field_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected the shape of the mask, \(2, 2\), got \(2,\)"):
        policy.policy_gradient(torch.zeros(2, 2), torch.zeros(2), torch.ones(2, 2, dtype=torch.bool))


def test_impossible_clips_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"clips must not be negative, got clip_low -0\.1, clip_high 0\.2"):
        policy.clipped_surrogate(one(0), one(0), one(0), HERE, clip_low=-0.1)
    with pytest.raises(ConfigError, match=r"dual_clip is a ratio and must be above 1, got 1\.0"):
        policy.clipped_surrogate(one(0), one(0), one(0), HERE, dual_clip=1.0)
