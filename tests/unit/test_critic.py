"""GAE, lambda returns and the critic's losses: hand values, identities, and positions that the policy did not produce."""

from __future__ import annotations

import pytest
import torch
from architectures import random_episodes
from torch import Tensor

from rlx.advantages import gae, returns
from rlx.derive import lambda_returns
from rlx.losses.value import clipped_value, expectile_value, value_mse
from rlx.models.load import tiny
from rlx.stages.prepare import fill
from rlx.types import ConfigError

REWARD, VALUE = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
ALL, ENDED = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1)


def random_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(5, 9, generator=draw) < 0.7
    reward, value = (torch.randn(5, 9, generator=draw) for _ in range(2))
    return torch.where(mask, reward, 0.0), value, torch.zeros(5), mask


def test_gae_and_lambda_returns_values() -> None:
    torch.testing.assert_close(gae(REWARD, VALUE, ENDED, ALL, lam=0.95), torch.tensor([[0.46575, 0.385, 0.3]]))
    torch.testing.assert_close(lambda_returns(REWARD, VALUE, ENDED, ALL, lam=0.95), torch.tensor([[0.96575, 0.985, 1.0]]))


def test_a_cut_episode_goes_on_with_its_bootstrap() -> None:
    adv = gae(REWARD, VALUE, torch.tensor([2.0]), ALL, gamma=0.5, lam=0.0)
    torch.testing.assert_close(adv, torch.tensor([[0.5 * 0.6 - 0.5, 0.5 * 0.7 - 0.6, 1.0 + 0.5 * 2.0 - 0.7]]))


def test_lambda_one_is_return_minus_value_and_lambda_zero_the_td_error() -> None:
    reward, value, bootstrap, mask = random_batch()
    total, inside = returns(reward, mask, gamma=0.9), torch.where(mask, value, 0.0)
    torch.testing.assert_close(gae(reward, value, bootstrap, mask, gamma=0.9, lam=1.0), total - inside)
    torch.testing.assert_close(lambda_returns(reward, value, bootstrap, mask, gamma=0.9, lam=1.0), total)
    errors = gae(reward, value, bootstrap, mask, gamma=0.9, lam=0.0)
    for i in range(len(mask)):
        at = mask[i].nonzero()[:, 0].tolist()
        for t, u in zip(at, [*at[1:], None], strict=True):
            after = 0.0 if u is None else float(value[i, u])
            assert float(errors[i, t]) == pytest.approx(float(reward[i, t]) + 0.9 * after - float(value[i, t]), abs=1e-6)


def test_the_recursion_of_lambda_returns() -> None:
    reward, value, bootstrap, _ = random_batch()
    mask = torch.ones_like(value, dtype=torch.bool)
    found = lambda_returns(reward, value, bootstrap, mask, gamma=0.9, lam=0.7)
    right = reward[:, :-1] + 0.9 * (0.3 * value[:, 1:] + 0.7 * found[:, 1:])
    torch.testing.assert_close(found[:, :-1], right)


def test_positions_outside_the_mask_are_stepped_over() -> None:
    mask = torch.tensor([[False, True, False, True, False, True, False]])
    for garbage in (0.0, 5.0, float("nan"), float("inf")):
        reward, value = (torch.full((1, 7), garbage).masked_scatter(mask, x) for x in (REWARD, VALUE))
        adv = gae(reward, value, ENDED, mask, lam=0.95)
        torch.testing.assert_close(adv, torch.tensor([[0, 0.46575, 0, 0.385, 0, 0.3, 0]]))
        assert lambda_returns(reward, value, ENDED, mask)[~mask].abs().sum() == 0


def test_whitened_advantages_have_mean_zero_and_deviation_one() -> None:
    reward, value, bootstrap, mask = random_batch()
    inside = gae(reward, value, bootstrap, mask, whiten=True)[mask]
    assert float(inside.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(inside.std()) == pytest.approx(1.0, abs=1e-5)


def test_an_unscored_episode_gets_no_advantage_and_does_not_count() -> None:
    reward = torch.cat([REWARD, torch.tensor([[0.0, 0.0, float("nan")]])])
    adv = gae(reward, VALUE.expand(2, 3), torch.zeros(2), ALL.expand(2, 3), whiten=True)
    assert (adv[1] == 0).all()
    torch.testing.assert_close(adv[:1], gae(REWARD, VALUE, ENDED, ALL, whiten=True))


def test_value_losses() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)

    def clipped(value: float, old: float, target: float) -> float:
        return float(clipped_value(*(torch.tensor([[x]]) for x in (value, old, target)), one, clip=0.2))

    assert float(value_mse(torch.tensor([[0.5]]), torch.tensor([[1.5]]), one)) == pytest.approx(0.5)
    assert clipped(1.0, 0.0, 2.0) == pytest.approx(0.5 * 1.8**2)  # moved too far towards the target: the clipped value's
    assert clipped(-1.0, 0.0, 2.0) == pytest.approx(0.5 * 3.0**2)  # moved away: its own
    assert clipped(0.1, 0.0, 2.0) == pytest.approx(0.5 * 1.9**2)


def test_a_value_past_the_clip_has_no_gradient_and_a_wide_clip_none_of_it() -> None:
    value = torch.tensor([[1.0, 0.1]], requires_grad=True)
    old, target, mask = torch.zeros(1, 2), torch.full((1, 2), 2.0), torch.ones(1, 2, dtype=torch.bool)
    clipped_value(value, old, target, mask).sum().backward()  # type: ignore[no-untyped-call]
    assert value.grad is not None
    torch.testing.assert_close(value.grad, torch.tensor([[0.0, -1.9]]))
    torch.testing.assert_close(clipped_value(value, old, target, mask, clip=100.0), value_mse(value, target, mask))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_the_losses_are_zero_outside_the_mask(garbage: float) -> None:
    mask = torch.tensor([[True, False]])
    value = torch.tensor([[0.5, garbage]], requires_grad=True)
    target = torch.tensor([[1.0, garbage]])
    losses = value_mse(value, target, mask), clipped_value(value, value.detach(), target, mask)
    for loss in (*losses, expectile_value(value, target, mask)):
        assert float(loss.detach()[0, 1]) == 0
        (grad,) = torch.autograd.grad(loss.sum(), value)
        assert grad.isfinite().all()
        assert float(grad[0, 1]) == 0


def test_clipped_value_refuses_a_clip_that_is_not_positive() -> None:
    with pytest.raises(ConfigError, match="clip"):
        clipped_value(VALUE, VALUE, VALUE, ALL, clip=0.0)


# --------------------------------------------------------------------------- expectiles
def test_an_expectile_by_hand_and_the_middle_one_is_half_the_squared_error() -> None:
    value, target, mask = torch.zeros(1, 3), torch.tensor([[2.0, -2.0, 9.0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(expectile_value(value, target, mask, expectile=0.9), torch.tensor([[3.6, 0.4, 0.0]]))
    _, value, _, mask = random_batch()
    target = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(expectile_value(value, target, mask, expectile=0.5), value_mse(value, target, mask))


@pytest.mark.parametrize("expectile", [0.5, 0.9, 0.99])
def test_the_minimum_is_the_expectile_of_the_targets(expectile: float) -> None:
    """Of 0 and 1, equally often, the expectile e is e itself: (1 - e) e = e (1 - e)."""
    value = torch.full((1, 2), expectile, requires_grad=True)
    loss = expectile_value(value, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), expectile=expectile)
    (slope,) = torch.autograd.grad(loss.sum(), value)
    assert float(slope.sum()) == pytest.approx(0.0, abs=1e-6)
    assert float(slope.abs().sum()) > 0.01


@pytest.mark.parametrize("expectile", [0.0, 1.0, 1.5])
def test_an_expectile_that_is_none_is_refused(expectile: float) -> None:
    with pytest.raises(ConfigError, match=f"expectile must be between 0 and 1, got {expectile}"):
        expectile_value(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), expectile=expectile)


def test_old_fields_of_one_model_are_of_one_forward_whatever_their_order() -> None:
    made = tiny(layers=1, hidden=16, heads=2, kv_heads=1, ffn=32).with_heads({"value": "token"}, 0)
    batch = made.collate(random_episodes(3))
    own = made.forward(batch, {"value", "entropy"})
    forwards = []
    plain = made.forward
    made.forward = lambda *given: forwards.append(given) or plain(*given)
    for names in (("value", "entropy"), ("entropy", "value")):
        filled = made.collate(random_episodes(3))
        fill(filled, {"old_value", "old_entropy"}, {}, dict.fromkeys(names, made), 10**6, 1.0)
        torch.testing.assert_close(filled["old_value"], own["value"])
        torch.testing.assert_close(filled["old_entropy"], own["entropy"])
    assert len(forwards) == 2
