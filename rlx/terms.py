"""What an update makes small or looks at: loss terms and diagnostics by name, reduced by the counts of a whole step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlx.marks import marked
from rlx.models.parts import blocks, by_length
from rlx.reduce import token_mean
from rlx.types import Batch, Component, ConfigError, Counts, LossTerm, Reduce, Watch


@dataclass(frozen=True)
class Update:
    """What is trained on a batch: the terms, how they are reduced, and how often the batch is gone through.

    `sampled`: the batch was sampled from the policy, so its log-probs are compared with the first forward.
    `grad_variance`: estimate the variance of the gradient from two halves of the batch (see TorchLearner.step).
    """

    loss: Sequence[Component[LossTerm]]
    reduce: Component[Reduce]
    watch: Sequence[Component[Watch]] = ()
    epochs: int = 1
    minibatches: int = 1
    token_budget: int = 16384
    temperature: float = 1.0
    sampled: bool = False
    grad_variance: bool = False

    @property
    def reads(self) -> set[str]:
        """Every field that a term or diagnostic reads."""
        return {name for c in [*self.loss, *self.watch] for name in c.reads}

    @property
    def whole_groups(self) -> bool:
        """Whether a term compares the sequences of a group: then no group is cut by minibatches or the token budget."""
        return "group" in self.reads

    @property
    def whole_batch(self) -> bool:
        """Whether a term sees all sequences of the optimiser step at once."""
        return any(marked(term.call, "whole_batch") for term in self.loss)


def arguments(call: Callable[..., Any]) -> list[str]:
    """The names of what a function is called with."""
    return list(inspect.signature(call).parameters)


def states(update: Update) -> list[tuple[str, float, Callable[..., Tensor]]]:
    """(name, first value, update) of each state that a term has."""
    return [found for term in update.loss if (found := marked(term.call, "state"))]


def step_counts(batch: Mapping[str, Tensor], terms: Sequence[Component[Any]]) -> dict[str, Counts]:
    """The counts of an optimiser step by each mask that a term or diagnostic is reduced over."""
    return {name: count(batch[name], batch["group"]) for name in dict.fromkeys(["mask", *map(mask_of, terms)])}


def count(mask: Tensor, group: Tensor) -> Counts:
    """How many positions, sequences and groups a mask has; 1 where it has none, so that their share is 0 and not nan."""
    some = mask.any(1)
    found = float(mask.sum()), float(some.sum()), float(len(set(group[some].tolist())))
    return Counts(*(max(1.0, x) for x in found))


def mask_of(component: Component[Any]) -> str:
    """The field that a term is reduced over: the first that it reads whose name ends in `mask`."""
    return next((name for name in component.reads if name.endswith("mask")), "mask")


def total(update: Update, fields: Mapping[str, Tensor], counts: Mapping[str, Counts], metrics: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the loss terms over one part of a step; each is added to the metrics."""
    parts = []
    for term in update.loss:
        value = reduced(term, fields, update.reduce, counts[mask_of(term)])
        parts.append(term.weight * value)
        add(metrics, f"loss/{term.name}", value.detach())
    loss = torch.stack(parts).sum()
    add(metrics, "loss", loss.detach())
    return loss


def signal(component: Component[Any], batch: Batch) -> Tensor:
    """Where a term or diagnostic may have a value or a gradient other than 0: (N,) bool, of each sequence."""
    by, mask = marked(component.call, "vanishes"), batch[mask_of(component)]
    name = component.reads[arguments(component.call).index(by)] if by else ""
    if name not in batch or marked(component.call, "state"):
        return torch.ones_like(mask[:, 0])
    return (mask & (batch[name] != 0)).any(1)


def with_signal(batch: Batch, update: Update) -> Batch:
    """The sequences that some loss term may learn from, with those that have to stay together with them.

    The others add exactly 0 to the loss and its gradient. Where there are only others, the shortest stays: a gradient of 0
    is a step as well (momentum, weight decay), and every rank has to have something to read.
    """
    some = torch.stack([signal(term, batch) for term in update.loss]).any(0).tolist()
    together = blocks(batch, whole_groups=update.whole_groups)
    kept = [block for block in together if any(some[i] for i in block)] or by_length(batch, together)[:1]
    return batch if len(kept) == len(together) else batch.take(sorted(i for block in kept for i in block))


def diagnose(
    update: Update,
    fields: Mapping[str, Tensor],
    counts: Mapping[str, Counts],
    metrics: dict[str, Tensor],
    gap_tokens: float = 0.0,
) -> None:
    """What is only looked at: the diagnostics of `watch`, and how far the sampled log-probs are from the forward's.

    `gap_tokens`: how many tokens the mean of the latter is over; 0 for leaving it out.
    """
    for watch in update.watch:
        x, by = watch.call(*(fields[name] for name in watch.reads)), mask_of(watch)
        add(metrics, watch.name, averaged(watch, x, fields, token_mean, counts[by]))
    if gap_tokens:
        mask = fields["mask"]
        gap = torch.where(mask, (fields["logp"] - fields["rollout_logp"]).abs(), 0.0)
        metrics["gap/max"] = gap.max()
        add(metrics, "gap/mean", gap.sum() / gap_tokens)


def reduced(term: Component[LossTerm], fields: Mapping[str, Tensor], reduce: Component[Reduce], counts: Counts) -> Tensor:
    """This part's share of one term.

    (N,T) and (N,K) by the stage's reduction, or the term's own; (N,) and (P,) by the mean over the sequences or groups that
    are trained on; () as it is. Raises ConfigError where a term of one number a sequence or group has its own reduction, or
    another number of them.
    """
    x = term.call(*(fields[name] for name in term.reads))
    if x.dim() == 0 and not marked(term.call, "whole_batch"):
        raise ConfigError(f"loss {term.name!r} is one number for the whole batch: mark it @whole_batch (rlx/marks.py)")
    if term.reduce is not None and x.dim() < 2:
        what = "group" if "group" in term.reads else "sequence"
        raise ConfigError(
            f"loss {term.name!r} is one number for each {what}, averaged over {what}s; "
            f"`reduce: {term.reduce.name}` is for terms of one number for each token: leave it out"
        )
    return averaged(term, x, fields, (term.reduce or reduce).call, counts)


def averaged(component: Component[Any], x: Tensor, fields: Mapping[str, Tensor], reduce: Reduce, counts: Counts) -> Tensor:
    """What a component said: (N,T) and (N,K) by the reduction, (N,) and (P,) by their mean, () as it is.

    One number a group is what a component says that reads `group`, one number a sequence what another says: a part of a
    batch may have as many groups as sequences, so that the shape does not tell. Raises ConfigError where it is of neither.
    """
    mask, by_group = fields[mask_of(component)], "group" in component.reads
    if x.dim() == 2:
        return reduce(x, mask, counts)
    if x.dim() == 0:
        return x
    expected = len(set(fields["group"].tolist())) if by_group else len(mask)
    if len(x) != expected:
        what = "group, because it reads `group`" if by_group else "sequence, because it does not read `group`"
        raise ConfigError(f"{component.name!r} is {len(x)} numbers where {expected} are expected: one for each {what}")
    return x.sum() / counts.groups if by_group else torch.where(mask.any(1), x, 0.0).sum() / counts.sequences


def add(metrics: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add up a metric over units; of those called `/max`, keep the largest."""
    put = torch.maximum if name.endswith("/max") else torch.add
    metrics[name] = put(metrics[name], value) if name in metrics else value
