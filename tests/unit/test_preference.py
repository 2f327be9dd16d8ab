"""Preference losses: the hand values of the card, pairs in any order, gradients, and what is outside the mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlx.losses import watch
from rlx.losses.preference import bradley_terry, dpo
from rlx.types import ConfigError


def spread_over(totals: list[float], lengths: list[int], fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """Per-token log-probs with these sums, equal over each sequence's tokens, and the mask."""
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    each = torch.tensor([t / n for t, n in zip(totals, lengths, strict=True)])
    return torch.where(mask, each[:, None], fill), mask


# The two pairs of the card: a = 2, b = -1, D = 3 and a = -1, b = 2, D = -3; rows in mixed order.
LOGP, MASK = spread_over([-14.0, -20.0, -10.0, -16.0], [4, 8, 5, 6])
REF, _ = spread_over([-13.0, -19.0, -12.0, -18.0], [4, 8, 5, 6])
GROUP, LABEL = torch.tensor([3, 9, 3, 9]), torch.tensor([-1.0, 1.0, 1.0, -1.0])


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, [0.554355, 0.854355]), (0.1, [0.584355, 0.824355])])
def test_dpo_values(smoothing: float, expected: list[float]) -> None:
    loss = dpo(LOGP, REF, MASK, GROUP, LABEL, beta=0.1, label_smoothing=smoothing)
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-5, rtol=0)


def test_dpo_is_log_two_at_the_reference() -> None:
    torch.testing.assert_close(dpo(REF, REF, MASK, GROUP, LABEL), torch.full((2,), math.log(2)))


def test_the_gradient_of_dpo_is_minus_beta_sigmoid_of_minus_h() -> None:
    logp = LOGP.clone().requires_grad_()
    dpo(logp, REF, MASK, GROUP, LABEL, beta=0.1)[0].backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad[2][:5], torch.full((5,), -0.042556), atol=1e-6, rtol=0)  # the better one rises
    torch.testing.assert_close(logp.grad[0][:4], torch.full((4,), 0.042556), atol=1e-6, rtol=0)
    assert (logp.grad[[1, 3]] == 0).all()


def test_smoothed_dpo_is_least_where_the_label_is_as_likely_as_it_is_right() -> None:
    """sigmoid(h) = 1 - e, so that the margin stays finite; without smoothing there the loss still falls."""

    def slope(smoothing: float) -> float:
        logp = torch.tensor([[math.log(0.8 / 0.2)], [0.0]], requires_grad=True)
        args = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2), torch.tensor([1.0, -1.0])
        dpo(logp, *args, beta=1.0, label_smoothing=smoothing).sum().backward()  # type: ignore[no-untyped-call]
        assert logp.grad is not None
        return float(logp.grad[0])

    assert slope(0.2) == pytest.approx(0.0, abs=1e-6)
    assert slope(0.0) == pytest.approx(-0.2, abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_expected_dpo_is_stationary_at_the_optimum_of_rlhf(beta: float) -> None:
    """pi* = ref exp(r / beta) / Z has no gradient where pairs are drawn from ref and labelled by Bradley-Terry on r."""
    ref, r = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.0, 0.4, -0.3])
    every = [(i, j) for i in range(3) for j in range(3) if i != j]
    rows = torch.tensor([i for pair in every for i in pair])
    group, label = torch.arange(len(every)).repeat_interleave(2), torch.tensor([1.0, -1.0] * len(every))
    weight = torch.stack([(ref[i] + ref[j]).exp() * torch.sigmoid(r[i] - r[j]) for i, j in every])

    def gradient(logits: Tensor) -> Tensor:
        z = logits.clone().requires_grad_()
        mask = torch.ones(len(rows), 1, dtype=torch.bool)
        loss = dpo(z.log_softmax(-1)[rows, None], ref[rows, None], mask, group, label, beta=beta)
        (weight * loss).sum().backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        return z.grad

    torch.testing.assert_close(gradient(ref + r / beta), torch.zeros(3), atol=1e-6, rtol=0)
    assert float(gradient(ref).abs().max()) > 1e-3 * beta


def test_positions_outside_the_mask_change_neither_loss_nor_gradient() -> None:
    found = []
    for garbage in (0.0, float("nan"), float("-inf")):
        logp = torch.where(MASK, LOGP, garbage).requires_grad_()
        loss = dpo(logp, torch.where(MASK, REF, garbage), MASK, GROUP, LABEL)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert logp.grad is not None
        found.append((loss.detach(), logp.grad))
    for loss_, grad in found[1:]:
        torch.testing.assert_close(loss_, found[0][0])
        torch.testing.assert_close(grad, found[0][1])


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 0.437488), ({"margin": 1 / 3}, 0.568677), ({"center": 0.01}, 0.457088)]
)
def test_bradley_terry_values(settings: dict[str, float], expected: float) -> None:
    loss = bradley_terry(torch.tensor([0.4, 1.0]), torch.zeros(2), torch.tensor([-1.0, 1.0]), **settings)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_a_list_is_the_mean_over_its_pairs() -> None:
    score, rank = torch.tensor([0.3, 1.0, -0.5]), torch.tensor([2.0, 3.0, 1.0])
    every = [(1, 0), (1, 2), (0, 2)]
    by_hand = sum(math.log1p(math.exp(-float(score[w] - score[v]))) for w, v in every) / 3
    assert float(bradley_terry(score, torch.zeros(3), rank)) == pytest.approx(by_hand, abs=1e-6)


def test_a_common_shift_of_the_scores_changes_nothing_but_the_centre() -> None:
    score = torch.tensor([0.4, 1.0])
    args = torch.zeros(2), torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(bradley_terry(score + 7, *args), bradley_terry(score, *args))
    assert float(bradley_terry(score + 7, *args, center=0.01)) > float(bradley_terry(score, *args, center=0.01))


def test_bradley_terry_raises_the_better_score() -> None:
    score = torch.tensor([0.4, 1.0], requires_grad=True)
    bradley_terry(score, torch.zeros(2), torch.tensor([-1.0, 1.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert score.grad is not None
    slope = 1 / (1 + math.exp(0.6))
    torch.testing.assert_close(score.grad, torch.tensor([slope, -slope]))


def test_a_group_without_a_pair_has_no_loss() -> None:
    loss = bradley_terry(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), torch.tensor([1.0, 1.0, 1.0]))
    assert loss.tolist() == [0.0, 0.0]


def test_accuracies_and_margins() -> None:
    assert watch.dpo_accuracy(LOGP, REF, MASK, GROUP, LABEL).tolist() == [1.0, 0.0]
    torch.testing.assert_close(watch.dpo_margin(LOGP, REF, MASK, GROUP, LABEL), torch.tensor([3.0, -3.0]))
    score, group, label = torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert watch.pair_accuracy(score, group, label).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"label_smoothing": 0.6}, {"label_smoothing": -0.1}])
def test_dpo_refuses_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="dpo"):
        dpo(LOGP, REF, MASK, GROUP, LABEL, **settings)


def test_bradley_terry_refuses_a_negative_center() -> None:
    with pytest.raises(ConfigError, match="center"):
        bradley_terry(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -1.0]), center=-1.0)
