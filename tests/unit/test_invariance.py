"""The same batch gives the same loss, gradient and metrics, however it is split, padded, packed and ordered.

For every loss of the catalogue under every reduction (catalogued.py). Two ranks: tests/distributed/test_losses_in_ranks.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from catalogued import WHOLE, Case, Result, batch_of, cases, check, policy
from torch import Tensor

from rlx.catalogue import CATALOGUE
from rlx.learner import TorchLearner, gradient
from rlx.models.language import LanguageModel
from rlx.optim import adamw
from rlx.tensors import inside
from rlx.terms import count
from rlx.types import Batch, Component, Counts, Reduce
from rlx.units import units


class Seen(TorchLearner):
    """Keeps the gradient of its last step."""

    def _descend(self, lr: float, *, allowed: bool) -> Tensor:
        self.gradient = torch.cat([gradient(p).flatten() for p in self.parameters])
        return super()._descend(lr, allowed=allowed)


class Right(LanguageModel):
    """Sequences padded on the right and read by the plain model: what rlx packs and pads is compared with this."""

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        longest, width = max(x.length for x in batch.inputs), batch["mask"].shape[1]
        ids, attend = (torch.zeros(len(batch.inputs), longest, dtype=torch.long) for _ in range(2))
        acted = torch.zeros(len(batch.inputs), width, dtype=torch.bool)
        around = torch.zeros(len(batch.inputs), width + 1, dtype=torch.long)
        for i, x in enumerate(batch.inputs):
            ids[i, : x.length], attend[i, : x.length] = torch.from_numpy(x.ids), 1
            acted[i, : len(x.acted)] = torch.from_numpy(x.acted)
            around[i] = i * longest + (x.prompt - 1 + torch.arange(width + 1)).clamp(max=longest - 1)
        out = self.module(input_ids=ids, attention_mask=attend, output_hidden_states=True)
        scores = torch.log_softmax(out.logits.flatten(0, 1)[around[:, :-1]] / temperature, -1)
        logp = scores.gather(-1, ids.flatten()[around[:, 1:]][..., None])[..., 0]
        spoken = {"logp": logp, "entropy": -(scores.exp() * scores).sum(-1)}
        length = torch.tensor([x.length - x.prompt for x in batch.inputs])
        assert self.heads is not None
        heads = self.heads(out.hidden_states[-1].flatten(0, 1), around, batch, length, want)
        return {name: torch.where(acted, x, 0.0) for name, x in spoken.items() if name in want} | heads


def learner(kind: type[LanguageModel], *, packs: bool) -> Seen:
    """One that learns nothing, of the same weights as any other."""
    made = copy.copy(policy())
    made.__class__, made.packs = kind, packs
    return Seen(made, Component("adamw", adamw, settings={"clip": 0.0}), lr=0.0, total=1)


PLAIN, PADDED, PACKED = learner(Right, packs=False), learner(LanguageModel, packs=False), learner(LanguageModel, packs=True)


def result(by: Seen, batch: Batch, case: Case, token_budget: int) -> Result:
    metrics = by.step(batch.take(range(len(batch.inputs))), case.update(token_budget), (0,))
    return metrics, by.gradient


def shuffled(batch: Batch, rng: np.random.Generator) -> Batch:
    """The sequences in another order, each (N,T) and (N,K) field with columns more, which no sequence reaches."""
    out = batch.take(rng.permutation(len(batch.inputs)).tolist())
    for name, x in out.items():
        if x.dim() == 2:
            out[name] = torch.nn.functional.pad(x, (0, 2), value=-1 if name == "turn" else 0)
    return out


def ways(case: Case, batch: Batch) -> Iterator[tuple[str, Result]]:
    """One step in many ways. Budgets are drawn for each case."""
    rng = np.random.default_rng(case.seed)
    for by, name in ((PADDED, "padded on the left"), (PACKED, "packed")):
        for budget in (WHOLE, 1, *rng.integers(20, 150, 2).tolist()):
            yield f"{name}, a token budget of {budget}", result(by, batch, case, budget)
    yield "in another order", result(PACKED, shuffled(batch, rng), case, int(rng.integers(20, 150)))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_step_is_the_same_in_every_way(case: Case) -> None:
    batch = batch_of(case)
    expected = result(PLAIN, batch, case, WHOLE)
    for what, found in ways(case, batch):
        check(what, found, expected)


# --------------------------------------------------------------------------- what is not the same is found
def of_its_unit(x: Tensor, mask: Tensor, counts: Counts, *, by: Reduce, parts: int) -> Tensor:
    """The mean over units of a reduction by the counts of each unit."""
    return by(x, mask, count(mask, torch.zeros(len(mask)))) / parts


@pytest.mark.parametrize("case", [case for case in cases() if case.loss.name == "policy_gradient"], ids=str)
def test_a_mean_of_the_means_of_units_is_found(case: Case) -> None:
    batch = batch_of(case)
    expected = result(PLAIN, batch, case, WHOLE)

    def naive(token_budget: int) -> Result:
        parts = len(list(units(policy(), batch, token_budget)))
        reduce = Component("naive", partial(of_its_unit, by=case.reduce.call, parts=parts))
        return result(PACKED, batch, dataclasses.replace(case, reduce=reduce), token_budget)

    check("one unit", naive(WHOLE), expected)
    with pytest.raises(AssertionError, match="60 tokens: loss/policy_gradient is "):
        check("60 tokens", naive(60), expected)


def centered(logp: Tensor, mask: Tensor) -> Tensor:
    """Takes off the mean of what it is given, and is not marked as what sees the whole batch."""
    x = inside(logp, mask)
    return inside(x - x.sum() / mask.sum(), mask).square()


def of_height(logp: Tensor, height: Tensor, mask: Tensor) -> Tensor:
    return inside(height, mask) * inside(logp, mask)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases of what is added to the catalogue."""
    monkeypatch.setitem(CATALOGUE["loss"], "centered", f"{__name__}:centered")
    monkeypatch.setitem(CATALOGUE["loss"], "of_height", f"{__name__}:of_height")
    return cases()


def test_a_loss_that_depends_on_its_unit_is_found(others: list[Case]) -> None:
    cases = [case for case in others if case.loss.name == "centered"]
    assert len(cases) == len(CATALOGUE["reduce"])
    for case in cases:
        expected = result(PLAIN, batch_of(case), case, WHOLE)
        found = result(PACKED, batch_of(case), case, 60)
        with pytest.raises(AssertionError, match=" tokens: loss/centered is "):
            check("60 tokens", found, expected)


def test_a_field_without_a_rule_is_named(others: list[Case]) -> None:
    case = next(case for case in others if case.loss.name == "of_height")
    with pytest.raises(LookupError, match="loss 'of_height' reads the field 'height', which the tests"):
        batch_of(case)
