"""Reductions: hand values, and the same loss however a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlx.losses.policy import clipped_surrogate, kl
from rlx.reduce import constant, seq_mean, seq_sum, token_mean
from rlx.types import ConfigError, Counts

REDUCTIONS: dict[str, Callable[[Tensor, Tensor, Counts], Tensor]] = {
    "token_mean": token_mean,
    "seq_mean": seq_mean,
    "seq_sum": seq_sum,
    "constant": partial(constant, length=8),
}


@pytest.mark.parametrize(
    ("name", "expected"), [("token_mean", 1.6667), ("seq_mean", 1.5), ("seq_sum", 5.0), ("constant", 0.625)]
)
def test_ones_in_a_short_and_twos_in_a_long_sequence(name: str, expected: float) -> None:
    nan = float("nan")
    x = torch.tensor([[1.0, 1.0, nan, nan], [2.0, 2.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert float(REDUCTIONS[name](x, mask, Counts(tokens=6, sequences=2))) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [1, 4, 3], [1] * 8])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_split_of_a_batch_changes_neither_loss_nor_gradient(name: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([5, 1, 9, 0, 3, 9, 2, 7])
    mask = torch.arange(9) < lengths.unsqueeze(-1)
    old, ref, adv, theta = torch.randn(8, 9), torch.randn(8, 9), torch.randn(8, 9), torch.randn(3, dtype=torch.float64)
    features = torch.randn(8, 9, 3, dtype=torch.float64)
    counts = Counts(tokens=float(mask.sum()), sequences=7.0)

    def run(parts: list[int]) -> tuple[Tensor, Tensor]:
        weights = theta.clone().requires_grad_()
        total = torch.zeros(())
        for part in torch.split(torch.arange(8), parts):
            logp = old[part] + 0.2 * (features[part] @ weights)
            x = clipped_surrogate(logp, old[part], adv[part], mask[part]) + 0.1 * kl(logp, ref[part], mask[part])
            loss = REDUCTIONS[name](x, mask[part], counts)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        assert weights.grad is not None
        return total, weights.grad

    torch.testing.assert_close(run(sizes), run([8]), atol=1e-6, rtol=1e-6)


def test_constant_is_the_mean_of_means_where_every_sequence_has_that_length() -> None:
    torch.manual_seed(0)
    x, mask, counts = torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool), Counts(tokens=32, sequences=4)
    expected = seq_mean(x, mask, counts)
    torch.testing.assert_close(constant(x, mask, counts, length=8), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(token_mean(x, mask, counts), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(seq_sum(x, mask, counts), 8 * expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_masked_positions_do_not_count(name: str, garbage: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    counts = Counts(tokens=3, sequences=2)
    results = []
    for filler in (0.0, garbage):
        x = torch.where(mask, 2.0, filler).requires_grad_()
        value = REDUCTIONS[name](x, mask, counts)
        (grad,) = torch.autograd.grad(value, x)
        assert (grad[~mask] == 0).all()
        results.append((value.detach(), grad))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


def test_what_cannot_be_reduced_is_refused() -> None:
    counts, mask = Counts(tokens=2, sequences=1), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="constant: length must be positive, got 0"):
        constant(torch.ones(2, 2), mask, counts, length=0)
    with pytest.raises(ValueError, match=r"expected the shape of the mask, \(2, 2\), got \(2,\)"):
        token_mean(torch.ones(2), mask, counts)
