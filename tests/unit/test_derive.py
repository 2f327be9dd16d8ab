"""Derived fields: the KL penalty in the reward, and scaled log-ratios."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from rlx.advantages import returns, rloo
from rlx.derive import kl_penalty, log_ratio, rollout_correction
from rlx.losses.policy import clipped_surrogate, policy_gradient
from rlx.stages.prepare import corrections, credit
from rlx.tensors import last_position, seq_sum
from rlx.types import Batch, Component, ConfigError

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


# --------------------------------------------------------------------------- the rollout engine's gap
OLD = torch.tensor([[-1.0, -1.0, -1.0, -9.0], [-2.0, -1.0, -1.0, -1.0]])
ENGINE = torch.tensor([[-1.0, -2.0, -0.5, -1.0], [-2.0, -1.0, -1.0, -3.0]])  # log-ratios 0, 1, -0.5 and 0, 0, 0, 2
TRAINED = torch.tensor([[True, True, True, False], [True, True, True, True]])
E = math.e


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[1, 2, E**-0.5, 0], [1, 1, 1, 2]]),
        ({"cap": 3.0}, [[1, E, E**-0.5, 0], [1, 1, 1, 3]]),
        ({"floor": 0.7}, [[1, 2, 0.7, 0], [1, 1, 1, 2]]),
        ({"how": "mask"}, [[1, 0, E**-0.5, 0], [1, 1, 1, 0]]),
        ({"how": "mask", "cap": 5.0, "floor": 0.7}, [[1, E, 0, 0], [1, 1, 1, 0]]),
        ({"level": "sequence"}, [[E**0.5] * 3 + [0], [2] * 4]),
        ({"level": "sequence", "how": "mask"}, [[E**0.5] * 3 + [0], [0] * 4]),
    ],
)
def test_the_engine_s_gap_is_corrected_by_hand_values(settings: dict[str, Any], expected: list[list[float]]) -> None:
    found = rollout_correction(OLD, ENGINE, TRAINED, **settings)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_stands_outside_the_mask_weighs_nothing(garbage: float, level: Any) -> None:
    old, engine = torch.where(TRAINED, OLD, garbage), torch.where(TRAINED, ENGINE, garbage)
    assert torch.equal(
        rollout_correction(old, engine, TRAINED, level=level), rollout_correction(OLD, ENGINE, TRAINED, level=level)
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_without_a_gap_loss_and_gradient_are_those_without_a_correction(level: Any, how: Any) -> None:
    torch.manual_seed(0)
    mask = torch.rand(6, 9) < 0.7
    old, ret = -torch.rand(6, 9), torch.randn(6)
    engine = torch.where(mask, old, float("nan"))
    correct = partial(rollout_correction, level=level, how=how, cap=1.0, floor=1.0)
    derive = Component("rollout_correction", correct, ("old_logp", "rollout_logp", "mask"), into="correction")
    advantage = Component("given", lambda ret, mask: torch.where(mask, ret[:, None], 0.0), ("ret", "mask"))
    found = []
    for derives in ([], [derive]):
        batch = Batch({"old_logp": old, "rollout_logp": engine, "mask": mask, "ret": ret}, [None] * 6)
        credit(batch, derives, [advantage])
        logp = (old + 0.3 * torch.sin(10 * old)).requires_grad_()
        loss = clipped_surrogate(logp, old, batch["adv"], mask) + policy_gradient(logp, batch["adv"], mask)
        loss.sum().backward()
        found.append((loss.detach(), logp.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().sum() > 0
    assert corrections(batch) == {"correction/mean": 1, "correction/min": 1, "correction/max": 1, "correction/zero": 0}


def test_a_correction_multiplies_the_gradient_of_each_token() -> None:
    adv = torch.ones(2, 4)
    derive = Component("c", rollout_correction, ("old_logp", "rollout_logp", "mask"), into="correction")
    batch = Batch({"old_logp": OLD, "rollout_logp": ENGINE, "mask": TRAINED}, [None] * 2)
    credit(batch, [derive], [Component("one", lambda mask: adv, ("mask",))])
    logp = OLD.clone().requires_grad_()
    clipped_surrogate(logp, OLD, batch["adv"], TRAINED).sum().backward()
    assert torch.allclose(logp.grad, -torch.tensor([[1, 2, E**-0.5, 0], [1, 1, 1, 2]], dtype=torch.float32))
    assert corrections(batch)["correction/max"] == 2


@pytest.mark.parametrize("wrong", [{"cap": 0.9}, {"floor": 1.1}, {"floor": -0.1}])
def test_bounds_of_a_correction_hold_1(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected 0 <= floor <= 1 <= cap"):
        rollout_correction(OLD, ENGINE, TRAINED, **wrong)
