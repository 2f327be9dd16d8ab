"""Derived fields: the KL penalty in the reward, and scaled log-ratios."""

from __future__ import annotations

import pytest
import torch

from rlx.advantages import returns, rloo
from rlx.derive import kl_penalty, log_ratio
from rlx.tensors import last_position, seq_sum

GARBAGE = [float("nan"), float("inf"), float("-inf"), 1e30]


@pytest.mark.parametrize(("estimator", "expected"), [("k1", -0.05), ("k2", -0.0125), ("k3", -0.0106531)])
def test_kl_penalty_values_at_half_a_nat(estimator: str, expected: float) -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    penalty = kl_penalty(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), mask, estimator=estimator, coef=0.1)  # type: ignore[arg-type]
    assert float(penalty) == pytest.approx(expected, abs=1e-6)


def test_log_ratio_values_and_scale() -> None:
    mask = torch.tensor([[True, True, False]])
    of, over = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    assert log_ratio(of, over, mask).tolist() == [[0.5, -1.0, 0.0]]
    assert log_ratio(of, over, mask, scale=-2.0).tolist() == [[-1.0, 2.0, 0.0]]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_positions_stay_zero(garbage: float) -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    of, over = torch.where(mask, -1.0, garbage), torch.where(mask, -1.5, garbage)
    for estimator in ("k1", "k2", "k3"):
        penalty = kl_penalty(of, over, mask, estimator=estimator, coef=1.0)
        assert (penalty[~mask] == 0).all()
        assert (penalty[mask] < 0).all()
    assert log_ratio(of, over, mask).tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_a_penalty_in_the_reward_lowers_the_return_from_where_it_is_paid() -> None:
    """Two episodes of a group with reward 1 on the last position; the first drifts .5 nats on each of two tokens."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    old = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, -1.5, 0.0], [-1.0, -1.0, -1.0]])
    reward = torch.where(last_position(mask), 1.0, 0.0) + kl_penalty(old, ref, mask, coef=0.1)
    expected = torch.tensor([[0.9, 0.95, 0.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(returns(reward, mask), expected, atol=1e-6, rtol=0)
    adv = rloo(seq_sum(reward, mask), torch.tensor([0, 0]), mask)
    torch.testing.assert_close(adv, torch.tensor([[-0.1, -0.1, 0.0], [0.1, 0.1, 0.1]]), atol=1e-6, rtol=0)
