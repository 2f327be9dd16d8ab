"""Advantages and the tensor arithmetic below them, by hand values and identities; and what a baseline buys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlx import tensors
from rlx.advantages import group_mean, group_zscore, returns, rloo
from rlx.losses.policy import policy_gradient

NAN = float("nan")
GROUPED: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [group_mean, group_zscore, rloo]


def grouped(estimate: Callable[[Tensor, Tensor, Tensor], Tensor], rewards: list[float], group: list[int]) -> Tensor:
    """The advantage of each sequence, on one trained position: (N,)."""
    return estimate(torch.tensor(rewards), torch.tensor(group), torch.ones(len(rewards), 1, dtype=torch.bool))[:, 0]


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (group_mean, [0.75, -0.25, -0.25, -0.25]),
        (group_zscore, [1.5, -0.5, -0.5, -0.5]),
        (rloo, [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_one_right_answer_of_four(estimate: Callable[..., Tensor], expected: list[float]) -> None:
    adv = grouped(estimate, [1.0, 0.0, 0.0, 0.0], [7, 7, 7, 7])
    torch.testing.assert_close(adv, torch.tensor(expected), atol=5e-6, rtol=0)


def test_eps_stands_outside_the_square_root() -> None:
    adv = group_zscore(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4), torch.ones(4, 1, dtype=torch.bool), eps=0.5)
    torch.testing.assert_close(adv[:, 0], torch.tensor([0.75, -0.25, -0.25, -0.25]), atol=1e-6, rtol=0)


def test_zscore_of_a_pair() -> None:
    torch.testing.assert_close(
        grouped(group_zscore, [1.0, 0.0], [0, 0]), torch.tensor([0.707106, -0.707106]), atol=5e-6, rtol=0
    )


def test_groups_may_be_interleaved_and_unequal() -> None:
    """Groups (1, 0, 0, 0), (1, 1, 0) and (5,), shuffled together: as one by one."""
    adv = grouped(group_mean, [1.0, 1.0, 0.0, 0.0, 1.0, 5.0, 0.0, 0.0], [3, 9, 3, 9, 9, 1, 3, 3])
    third = 1 / 3
    expected = torch.tensor([0.75, third, -0.25, -2 * third, third, 0.0, -0.25, -0.25])
    torch.testing.assert_close(adv, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimate", GROUPED)
def test_equal_rewards_and_lone_episodes_have_exactly_zero_advantage(estimate: Callable[..., Tensor]) -> None:
    """0.1 three times does not sum to 0.3 in floating point: no residue may be divided by eps."""
    adv = grouped(estimate, [0.1] * 7 + [0.7] + [1e-3] * 3, [0] * 7 + [1] + [2] * 3)
    assert adv.tolist() == [0.0] * 11


@pytest.mark.parametrize("estimate", GROUPED)
def test_nearly_equal_rewards_still_differ(estimate: Callable[..., Tensor]) -> None:
    adv = grouped(estimate, [0.5, 0.5 + 2**-20], [0, 0])
    assert adv[0] < 0 < adv[1]


@pytest.mark.parametrize("estimate", GROUPED)
def test_unscored_episodes_are_left_out(estimate: Callable[..., Tensor]) -> None:
    adv = grouped(estimate, [1.0, NAN, 0.0, 0.0, NAN, 0.0, NAN, NAN], [0, 0, 0, 0, 0, 0, 1, 1])
    alone = grouped(estimate, [1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0])
    assert adv[[0, 2, 3, 5]].tolist() == alone.tolist()
    assert adv[[1, 4, 6, 7]].tolist() == [0.0] * 4


@pytest.mark.parametrize("estimate", GROUPED)
def test_order_does_not_matter(estimate: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    rewards, group = torch.randn(64), torch.randint(0, 9, (64,))
    mask = torch.ones(64, 1, dtype=torch.bool)
    order = torch.randperm(64)
    adv = estimate(rewards, group, mask)
    torch.testing.assert_close(estimate(rewards[order], group[order], mask), adv[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(estimate(rewards, 100 - 3 * group, mask), adv, atol=1e-6, rtol=0)


def test_rloo_is_the_mean_centred_reward_times_g_over_g_minus_1() -> None:
    torch.manual_seed(0)
    rewards, group = torch.randn(24), torch.arange(24) // 6
    mask = torch.ones(24, 3, dtype=torch.bool)
    expected = 6 / 5 * group_mean(rewards, group, mask)
    torch.testing.assert_close(rloo(rewards, group, mask), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimate", GROUPED)
def test_an_episode_has_one_advantage_on_its_trained_positions_and_zero_elsewhere(
    estimate: Callable[..., Tensor],
) -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    adv = estimate(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), mask)
    assert (adv[0, 0] == adv[0, 2]).item()
    assert (adv[0] > 0).tolist() == [True, False, True]
    assert (adv[1] < 0).tolist() == [True, True, False]
    assert (adv[~mask] == 0).all()


def test_returns_skip_what_the_policy_did_not_do() -> None:
    mask = torch.tensor([[True, False, True, True, False]])
    reward = torch.tensor([[1.0, NAN, 2.0, 4.0, float("inf")]])
    assert returns(reward, mask).tolist() == [[7.0, 0.0, 6.0, 4.0, 0.0]]
    assert returns(reward, mask, gamma=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]


def test_returns_of_an_unscored_episode_are_zero() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    reward = torch.tensor([[-0.1, NAN], [-0.1, 1.0]])
    torch.testing.assert_close(returns(reward, mask), torch.tensor([[0.0, 0.0], [0.9, 1.0]]), atol=1e-6, rtol=0)


# --------------------------------------------------------------------------- tensors
def test_masked_sums_and_sequence_means() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, float("inf"), NAN], [NAN, NAN, NAN]])
    assert float(tensors.masked_sum(x, mask)) == 9.0
    assert tensors.seq_sum(x, mask).tolist() == [3.0, 6.0, 0.0]
    assert tensors.seq_mean(x, mask).tolist() == [1.5, 6.0, 0.0]


def test_last_position() -> None:
    mask = torch.tensor([[True, False, True, False], [True, False, False, False], [False] * 4, [True] * 4])
    expected = [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert tensors.last_position(mask).int().tolist() == expected


def test_group_mean_std_by_hand() -> None:
    values = torch.tensor([1.0, 4.0, 0.0, NAN, 0.0, 0.0, NAN])
    mean, std, count = tensors.group_mean_std(values, torch.tensor([5, 2, 5, 5, 5, 5, 8]))
    assert mean.tolist() == pytest.approx([0.25, 4.0, 0.25, 0.25, 0.25, 0.25, 0.0])
    assert std.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.0])
    assert count.tolist() == [4.0, 1.0, 4.0, 4.0, 4.0, 4.0, 0.0]


# --------------------------------------------------------------------------- what a baseline buys
def test_a_baseline_keeps_the_gradient_and_removes_its_variance() -> None:
    """One prompt, 8 answers with rewards N(0,1)+5, 25 000 batches of 4 samples; the exact gradient is p (r - E r)."""
    torch.manual_seed(0)
    batches, size = 25_000, 4
    rewards, logits = torch.randn(8) + 5, torch.randn(8)
    p = logits.softmax(-1)
    exact = p * (rewards - p @ rewards)
    answers = torch.multinomial(p, batches * size, replacement=True)
    ret, mask = rewards[answers], torch.ones(batches * size, 1, dtype=torch.bool)
    group = torch.arange(batches).repeat_interleave(size)

    def gradients(adv: Tensor) -> Tensor:
        """The gradient of each batch's objective to the logits: (batches, 8)."""
        z = logits.expand(batches, 8).clone().requires_grad_()
        logp = z.log_softmax(-1)[group, answers].unsqueeze(-1)
        (grad,) = torch.autograd.grad(policy_gradient(logp, adv, mask).sum() / size, z)
        return -grad

    plain = gradients(returns(ret.unsqueeze(-1), mask))
    left_out = gradients(rloo(ret, group, mask))
    centred = gradients(group_mean(ret, group, mask))
    assert float(torch.cosine_similarity(left_out.mean(0), exact, dim=0)) > 0.99
    assert float(left_out.mean(0) @ exact / (exact @ exact)) == pytest.approx(1.0, abs=0.02)
    assert float(centred.mean(0) @ exact / (exact @ exact)) == pytest.approx(0.75, abs=0.02)
    assert float(plain.var(0).sum()) > 5 * float(left_out.var(0).sum())
