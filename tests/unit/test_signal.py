"""Sequences from which no loss term learns cost no backward, and neither loss, gradient nor diagnostics change by that."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from architectures import random_episodes
from catalogued import Case, batch_of, cases, policy
from test_learner import ENTROPY, NLL, PG, REDUCTIONS, model, sgd, weights
from torch import Tensor

from rlx.learner import TorchLearner
from rlx.losses import policy as losses
from rlx.losses import watch
from rlx.marks import marked, stateful, vanishes_with
from rlx.models.language import LanguageModel
from rlx.optim import adamw
from rlx.terms import Update, mask_of
from rlx.types import Batch, Component

CLIPPED = Component("clipped", losses.clipped_surrogate, ("logp", "old_logp", "adv", "mask"))
CLIPS = Component("clips", partial(watch.clip_fraction, clip_low=0.01, clip_high=0.01), CLIPPED.reads)
SIZE = Component("size", lambda group, mask: mask * (group[:, None] == group).sum(1, keepdim=True), ("group", "mask"))
ADAMW = Component[Any]("adamw", adamw, settings={"clip": 0.0})
MEAN = REDUCTIONS["token_mean"]


class Counting(LanguageModel):
    """Counts the tokens that it reads with gradient and without."""

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        self.read[torch.is_grad_enabled()] += sum(x.length for x in batch.inputs)
        return super().forward(batch, want, temperature)


def counting() -> Any:
    made: Any = model()
    made.__class__, made.read = Counting, {True: 0, False: 0}
    return made


def silent_batch(made: LanguageModel, silent: tuple[int, ...]) -> Batch:
    """Eight sequences in groups of two; the advantages of `silent` are 0 on the mask, and anything outside it."""
    batch = made.collate(random_episodes(8))
    torch.manual_seed(1)
    batch["adv"] = torch.randn(batch["mask"].shape)
    batch["old_logp"] = batch["rollout_logp"] + 0.1 * torch.randn(batch["mask"].shape)
    for i in silent:
        batch["adv"][i] = torch.where(batch["mask"][i], 0.0, torch.nan)
    return batch


def unmarked(component: Component[Any]) -> Component[Any]:
    """The same of which nothing is known."""
    return dataclasses.replace(component, call=lambda *fields: component.call(*fields))


def stepped(
    update: Update, silent: tuple[int, ...], optim: Component[Any] | None = None
) -> tuple[dict[str, float], Tensor, dict[bool, int]]:
    """Metrics, how the weights moved in two steps, and the tokens that were read."""
    made = counting()
    before = weights(made)
    learner = TorchLearner(made, optim or sgd(), lr=0.1, total=2)
    for step, gone in enumerate(((), silent)):
        metrics = learner.step(silent_batch(made, gone), update, (step,))
    return metrics, before - weights(made), made.read


def same(
    update: Update, silent: tuple[int, ...], optim: Component[Any] | None = None
) -> tuple[dict[bool, int], dict[bool, int]]:
    """The tokens read by an update, and by the same of which nothing is known; all else is equal."""
    metrics, found, read = stepped(update, silent, optim)
    plain = dataclasses.replace(update, loss=[unmarked(term) for term in update.loss])
    expected, there, all_read = stepped(plain, silent, optim)
    assert metrics == {name: pytest.approx(x, rel=1e-5, abs=1e-7) for name, x in expected.items()}
    assert float(there.abs().max()) > 1e-4
    torch.testing.assert_close(found, there, atol=1e-6 * float(there.abs().max()), rtol=1e-5)
    return read, all_read


def length(*chosen: int) -> int:
    inputs = silent_batch(model(), ()).inputs
    return sum(inputs[i].length for i in chosen)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("term", [PG, CLIPPED], ids=["policy_gradient", "clipped_surrogate"])
def test_sequences_without_signal_are_not_read(name: str, budget: int, term: Component[Any]) -> None:
    read, plain = same(Update([term], REDUCTIONS[name], token_budget=budget), (1, 4, 5))
    assert plain[True] - read[True] == length(1, 4, 5)
    assert read[False] == 0


@pytest.mark.parametrize("settings", [{"epochs": 2, "minibatches": 3}, {"grad_variance": True}], ids=str)
def test_however_often_the_batch_is_gone_through(settings: dict[str, Any]) -> None:
    read, plain = same(Update([CLIPPED], MEAN, **settings), (1, 4, 5))
    assert 0 < plain[True] - read[True] <= 2 * length(1, 4, 5)


def test_diagnostics_are_of_all_sequences() -> None:
    """A forward without gradient for what reads the policy's fields, none for what is 0 there itself."""
    read, plain = same(Update([CLIPPED], MEAN, [CLIPS]), (1, 4, 5))
    assert plain[True] - read[True] == length(1, 4, 5)
    assert read[False] == 0
    read, plain = same(Update([CLIPPED], MEAN, [CLIPS, ENTROPY], token_budget=40, temperature=0.5), (1, 4, 5))
    assert plain[True] - read[True] == length(1, 4, 5)
    assert read[False] == length(1, 4, 5)


def test_groups_that_stay_together_are_left_out_together() -> None:
    read, plain = same(Update([PG], MEAN, [SIZE], token_budget=1), (1, 4, 5))
    assert plain[True] - read[True] == length(4, 5)


def test_a_step_without_signal_is_a_step_all_the_same() -> None:
    """Momentum and weight decay move the weights; the shortest sequence is read."""
    read, plain = same(Update([PG], MEAN, [ENTROPY]), tuple(range(8)), ADAMW)
    assert plain[True] - read[True] == length(*range(8)) - min(length(i) for i in range(8))


@vanishes_with("adv")
@stateful("level", 0.0, lambda level, logp, mask: level + logp[mask].sum())
def follows(logp: Tensor, adv: Tensor, mask: Tensor) -> Tensor:
    return losses.policy_gradient(logp, adv, mask)


@pytest.mark.parametrize("other", [NLL, Component("follows", follows, PG.reads)], ids=["another term", "a term with a state"])
def test_what_another_term_may_learn_from_is_read(other: Component[Any]) -> None:
    read, plain = same(Update([PG, other], MEAN), (1, 4, 5))
    assert read == plain


def test_the_gap_is_that_of_what_is_read() -> None:
    made = counting()
    batch = silent_batch(made, (1, 4, 5))
    gap = (made.forward(batch, {"logp"})["logp"] - batch["rollout_logp"]).abs().detach()
    metrics = TorchLearner(made, sgd(), lr=0.0, total=1).step(batch, Update([PG], MEAN, sampled=True, token_budget=30), (0,))
    inside = gap[[0, 2, 3, 6, 7]][batch["mask"][[0, 2, 3, 6, 7]]]
    assert metrics["gap/mean"] == pytest.approx(float(inside.mean()), rel=1e-5)
    assert metrics["gap/max"] == pytest.approx(float(inside.max()), rel=1e-5)


# --------------------------------------------------------------------------- what the catalogue says of its own
MARKED = [
    pytest.param(case, component, id=f"{component.name}-{case}")
    for case in cases()
    if case.reduce.name == "token_mean"
    for component in (case.loss, *case.watch)
    if marked(component.call, "vanishes")
]


@pytest.mark.parametrize(("case", "component"), MARKED)
def test_what_is_marked_vanishes(case: Case, component: Component[Any]) -> None:
    batch = batch_of(case)
    leaves = {
        name: x.requires_grad_() for name, x in policy().forward(batch, policy().offers).items() if name in component.reads
    }
    zero = torch.rand(batch["mask"].shape) < 0.5
    field = batch[marked(component.call, "vanishes")]
    field[zero] = 0.0
    value = component.call(*({**batch, **leaves}[name] for name in component.reads))
    assert not value[zero].any()
    assert value[~zero & batch[mask_of(component)]].any()
    if value.requires_grad:
        for x in torch.autograd.grad(value.sum(), list(leaves.values())):
            assert not x[zero].any()
