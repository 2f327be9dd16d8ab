"""Loss terms that see groups, turns or the whole batch, and those that keep a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import random_episodes
from test_learner import REDUCTIONS, model, sgd, weights
from torch import Tensor

from rlx import reduce
from rlx.learner import TorchLearner
from rlx.marks import stateful, whole_batch
from rlx.models.language import LanguageModel
from rlx.optim import adamw
from rlx.tensors import inside, seq_sum
from rlx.terms import Update, reduced, step_counts
from rlx.types import Batch, Component, ConfigError, Counts

TOKEN_MEAN = REDUCTIONS["token_mean"]


def component(call: Callable[..., Tensor], *reads: str, **settings: Any) -> Component[Any]:
    return Component(call.__name__, call, reads, **settings)


def pairs(logp: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """-log sigmoid of the difference of the two sequences of each group: (P,)."""
    total = seq_sum(logp, mask)
    _, index = torch.unique(group, return_inverse=True)
    sign = torch.ones_like(total)
    sign[1::2] = -1.0
    order = torch.argsort(index, stable=True)
    return -torch.nn.functional.logsigmoid((total * sign)[order].reshape(-1, 2).sum(1))


@whole_batch
def against_median(logp: Tensor, mask: Tensor) -> Tensor:
    """The mean square distance of the sequences from their median: ()."""
    total = seq_sum(logp, mask)
    return (total - total.median()).square().mean() / 100


@whole_batch
def spread_by_token(logp: Tensor, mask: Tensor) -> Tensor:
    """The distance of each token from the batch's mean: (N,T)."""
    x = inside(logp, mask)
    return inside((x - x.sum() / mask.sum()) ** 2, mask)


def step(loss: list[Component[Any]], budget: int = 100_000, num: int = 8, **settings: Any) -> tuple[dict[str, float], Tensor]:
    """Metrics and gradient of one step, as the weights moved at lr 1."""
    made = model()
    batch = made.collate(random_episodes(num))
    before = weights(made)
    update = Update(loss, TOKEN_MEAN, token_budget=budget, **settings)
    metrics = TorchLearner(made, sgd(), lr=1.0, total=1).step(batch, update, (0,))
    return metrics, before - weights(made)


# --------------------------------------------------------------------------- groups
def test_one_number_a_group_is_averaged_over_groups() -> None:
    metrics, _ = step([component(pairs, "logp", "group", "mask")])
    made = model()
    batch = made.collate(random_episodes(8))
    by_hand = pairs(made.forward(batch, {"logp"})["logp"], batch["group"], batch["mask"])
    assert by_hand.shape == (4,)
    assert metrics["loss"] == pytest.approx(float(by_hand.mean()), rel=1e-5)


@pytest.mark.parametrize("budget", [1, 60])
def test_groups_are_never_cut(budget: int) -> None:
    whole, gradient = step([component(pairs, "logp", "group", "mask")])
    cut, again = step([component(pairs, "logp", "group", "mask")], budget)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    torch.testing.assert_close(again, gradient, atol=1e-6, rtol=1e-4)


def by_group(logp: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """The square of each group's mean log-probability: (P,)."""
    found = [inside(logp, mask)[group == g].sum() / mask[group == g].sum() for g in group.unique()]
    return torch.stack(found).square()


@pytest.mark.parametrize("budget", [1, 60])
def test_a_group_of_one_sequence_counts_as_a_group_in_a_unit_of_its_own(budget: int) -> None:
    term = component(by_group, "logp", "group", "mask")
    whole, gradient = step([term], num=5)  # groups of two, two and one
    cut, again = step([term], budget, num=5)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    torch.testing.assert_close(again, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("reads", "expected"), [(("logp", "mask"), "5"), (("logp", "mask", "group"), "3")], ids=str)
@pytest.mark.parametrize("length", [3, 5])
def test_what_a_term_reads_says_what_its_numbers_are_of(reads: tuple[str, ...], expected: str, length: int) -> None:
    """In a batch of five sequences in three groups, and so in each part of it."""
    term = Component("numbers", lambda logp, *_: logp.sum().expand(length), reads)
    if str(length) == expected:
        step([term], num=5)
        return
    with pytest.raises(ConfigError, match=f"'numbers' is {length} numbers where {expected} are expected: one for each"):
        step([term], num=5)


def test_a_reduction_of_its_own_is_refused_where_there_are_no_tokens() -> None:
    term = component(pairs, "logp", "group", "mask", reduce=TOKEN_MEAN)
    with pytest.raises(ConfigError, match="one number for each group, averaged over groups"):
        step([term])


# --------------------------------------------------------------------------- the whole batch
@pytest.mark.parametrize("term", [against_median, spread_by_token])
@pytest.mark.parametrize("budget", [1, 60])
def test_two_passes_equal_one(term: Callable[..., Tensor], budget: int) -> None:
    whole, gradient = step([component(term, "logp", "mask")])
    cut, again = step([component(term, "logp", "mask")], budget)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(again, gradient, atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------- masks of its own
def half_mask(made: LanguageModel, batch: Batch) -> Batch:
    batch["value_mask"] = batch["mask"].clone()
    batch["value_mask"][::2] = False
    return batch


def test_a_term_is_reduced_over_the_mask_that_it_reads() -> None:
    made = model()
    batch = half_mask(made, made.collate(random_episodes(6)))
    logp = made.forward(batch, {"logp"})["logp"].detach()

    def nll(logp: Tensor, mask: Tensor) -> Tensor:
        return -inside(logp, mask)

    term = component(nll, "logp", "value_mask")
    counts = step_counts(batch, [term])
    assert counts["value_mask"].tokens == float(batch["value_mask"].sum()) < counts["mask"].tokens
    found = reduced(term, {**batch, "logp": logp}, TOKEN_MEAN, counts["value_mask"])
    assert float(found) == pytest.approx(float(-logp[batch["value_mask"]].mean()), rel=1e-5)


def test_a_mask_without_a_token_gives_nothing_and_not_nan() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.ones(2, 3)
    batch = {"mask": mask, "group": torch.tensor([0, 1])}
    counts = step_counts(batch, [])["mask"]
    assert counts == Counts(1.0, 1.0, 1.0)
    for each in (reduce.token_mean, reduce.seq_mean, reduce.seq_sum):
        assert float(each(x, mask, counts)) == 0.0


def test_a_turn_level_term_is_reduced_over_turns() -> None:
    made = model().with_heads({"q": "after_turn"}, 0)
    batch = made.collate(random_episodes(4))

    def square(q: Tensor, turn_mask: Tensor) -> Tensor:
        return inside(q**2, turn_mask)

    term = component(square, "q", "turn_mask")
    q = made.forward(batch, {"q"})["q"].detach()
    metrics = TorchLearner(made, sgd(), lr=0.0, total=1).step(batch, Update([term], TOKEN_MEAN), (0,))
    assert metrics["loss"] == pytest.approx(float(q[batch["turn_mask"]].square().mean()), rel=1e-5)


def test_an_empty_batch_is_no_step_whatever_the_mask() -> None:
    made = model()
    batch = half_mask(made, made.collate(random_episodes(2)))
    batch["mask"], batch["value_mask"] = torch.zeros_like(batch["mask"]), torch.zeros_like(batch["mask"])
    update = Update([component(pairs, "logp", "group", "mask")], TOKEN_MEAN)
    assert TorchLearner(made, sgd(), lr=1.0, total=1).step(batch, update, (0,)) == {}


# --------------------------------------------------------------------------- state
def half_way(centre: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * centre + 0.5 * seq_sum(logp, mask).mean()


@stateful("centre", 0.0, half_way)
def from_centre(centre: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """Each sequence's log-prob less the running centre: (N,)."""
    return seq_sum(logp, mask) - centre


@pytest.mark.parametrize("budget", [1, 100_000])
def test_a_state_moves_after_each_step(budget: int) -> None:
    made = model()
    batch = made.collate(random_episodes(6))
    mean = float(seq_sum(made.forward(batch, {"logp"})["logp"], batch["mask"]).mean())
    learner = TorchLearner(made, sgd(), lr=0.0, total=3)
    update = Update([component(from_centre, "centre", "logp", "mask")], TOKEN_MEAN, token_budget=budget)
    said = [learner.step(batch, update, (i,))["loss"] for i in range(3)]
    assert said == pytest.approx([mean, mean / 2, mean / 4], rel=1e-5)
    assert float(learner.state["centre"]) == pytest.approx(mean * 7 / 8, rel=1e-5)


def test_one_number_without_the_mark_is_refused() -> None:
    def unmarked(logp: Tensor, mask: Tensor) -> Tensor:
        return inside(logp, mask).sum()

    with pytest.raises(ConfigError, match="mark it @whole_batch"):
        step([component(unmarked, "logp", "mask")])


def test_an_update_whose_own_mask_is_empty_moves_nothing() -> None:
    made = model()
    batch = half_mask(made, made.collate(random_episodes(6)))
    batch["value_mask"] = torch.zeros_like(batch["mask"])

    def nll(logp: Tensor, mask: Tensor) -> Tensor:
        return -inside(logp, mask)

    learner = TorchLearner(made, Component("adamw", adamw), lr=0.1, total=2)
    learner.step(batch, Update([component(nll, "logp", "mask")], TOKEN_MEAN), (0,))
    before = weights(made)
    assert learner.step(batch, Update([component(nll, "logp", "value_mask")], TOKEN_MEAN), (1,)) == {}
    assert torch.equal(weights(made), before)
    assert learner.steps == 1
