"""One optimiser step: named tensors in, loss terms by name, reductions by global counts, clipped gradient, metrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlx import world
from rlx.marks import marked
from rlx.models.parts import blocks, by_length
from rlx.optim import factor
from rlx.reduce import token_mean
from rlx.types import Batch, Component, ConfigError, Counts, LossTerm, Policy, Reduce, Watch


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


class NonFinite(RuntimeError):
    """A loss or gradient that is not a number: the run stops with the last good weights kept."""


class Learner(Protocol):
    """What trains one model. `steps` optimiser steps and `tokens` trained tokens have been taken so far.

    `share` of what the token budget allows is a unit: less than 1 where memory did not suffice.
    """

    steps: int
    tokens: int
    share: float

    def step(self, batch: Batch, update: Update, seed: tuple[int, ...]) -> dict[str, float]:
        """Train on a batch; the metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up, of whatever learner it is."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there. The policy has the weights of that moment."""
        ...


class MakeLearner(Protocol):
    """TorchLearner, or another learner that is made of the same."""

    def __call__(self, policy: Policy, optim: Component[Any], *, lr: float, total: int) -> Learner:
        """(policy, optimiser of the catalogue, peak learning rate, optimiser steps of the schedule) -> a learner of it."""
        ...


class TorchLearner:
    """One process. `optim` binds an optimiser of the catalogue; `total` is the number of optimiser steps of the schedule.

    `trained` is what computes the gradient, where that is another copy of the weights than `policy`.
    """

    repeats = True  # an optimiser step that memory did not suffice for can be taken again

    def __init__(self, policy: Policy, optim: Component[Any], *, lr: float, total: int, trained: Policy | None = None) -> None:
        self.policy = policy
        self.lr = lr
        self.total = total
        self.settings = {"clip": 1.0, "schedule": "constant", "warmup": 0, **optim.settings}
        self.trained = trained or policy
        self.parameters = self.trained.parameters()
        self.optimizer = optim.call(self.parameters, lr)
        self.steps = 0
        self.tokens = 0
        self.share = 1.0  # of a unit: halved where memory did not suffice
        self.state: dict[str, Tensor] = {}

    def step(self, batch: Batch, update: Update, seed: tuple[int, ...]) -> dict[str, float]:
        """Go `epochs` times through the batch in `minibatches` optimiser steps each; the metrics are means over them.

        `gap/max` and `gap/mean` (nats) compare the sampled log-probs with the first training forward, before any update:
        they are the same policy's, so what is left is numerical. They are of the sequences that this forward reads (see
        `with_signal`). `grad_variance` is |g1 - g2|^2, where g1 and g2 are the shares of two halves of the prompts in the
        gradient g1 + g2: the halves are independent, so its expectation is the trace of the gradient's covariance.

        A minibatch in which the masks of all terms are empty is no optimiser step; where there is no other, no metrics.
        """
        with world.phase("an update"):
            return self._step(batch, update, seed)

    def _step(self, batch: Batch, update: Update, seed: tuple[int, ...]) -> dict[str, float]:
        shown: list[dict[str, Tensor]] = []
        rng = np.random.default_rng(seed)
        together = blocks(batch, whole_groups=update.whole_groups)
        for _ in range(update.epochs):
            order = rng.permutation(len(together)) if update.minibatches > 1 else np.arange(len(together))
            for part in np.array_split(order, min(update.minibatches, len(order))):
                first = not any(shown)
                chosen = [i for block in part.tolist() for i in together[block]]
                shown.append(self._optimise(batch.take(chosen), update, check_gap=first and update.sampled))
        means = {
            name: torch.stack([m[name] for m in shown if name in m]) for name in dict.fromkeys(k for m in shown for k in m)
        }
        found = [x.max() if name.endswith("/max") else x.mean() for name, x in means.items()]
        copied = torch.stack([x.to(self.policy.device) for x in found]).tolist() if found else []  # one copy for all
        return dict(zip(means, copied, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up: the optimiser's moments, the place in the schedule, the states of terms."""
        return {"optimizer": self.optimizer.state_dict(), **self.counters()}

    def counters(self) -> dict[str, Any]:
        """What is known of the steps besides the optimiser's state."""
        return {"steps": self.steps, "tokens": self.tokens, "share": self.share, "state": self.state}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there. `weights`: those of an optimiser that had its own, more exact than the policy's."""
        self.optimizer.load_state_dict(saved["optimizer"])
        self.load_counters(saved)
        if "weights" in saved:
            for weight, exact in zip(self.parameters, saved["weights"], strict=True):
                weight.copy_(exact)

    def load_counters(self, saved: Mapping[str, Any]) -> None:
        """Set what `counters` gave. Units stay as small as they have had to be, there or here."""
        self.steps, self.tokens, self.share = saved["steps"], saved["tokens"], min(self.share, saved["share"])
        self.state = {name: x.to(self.policy.device) for name, x in saved["state"].items()}

    def _optimise(self, batch: Batch, update: Update, *, check_gap: bool) -> dict[str, Tensor]:
        """One optimiser step; where memory does not suffice, once more with half the token budget, which stays halved."""
        try:
            return self._attempt(batch, update, check_gap=check_gap)
        except torch.OutOfMemoryError:
            if self.share < 1.0 or not self.repeats:
                raise
        self.share = 0.5
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"! out of memory: token_budget {update.token_budget} is halved, and the step repeated", flush=True)
        return self._attempt(batch, update, check_gap=check_gap)

    def _attempt(self, batch: Batch, update: Update, *, check_gap: bool) -> dict[str, Tensor]:
        counts = step_counts(batch, [*update.loss, *update.watch])
        if not any(batch[mask_of(term)].any() for term in update.loss):
            return {}  # nothing for this update: the momentum of earlier steps is no reason to move
        self._begin_state(update)
        batch["index"] = torch.arange(len(batch.inputs), device=self.policy.device)
        wants = (update.reads | ({"logp"} if check_gap else set())) & self.policy.offers
        metrics: dict[str, Tensor] = {}
        half: list[Tensor] = []
        seen: dict[str, Tensor] = {}
        parts = [with_signal(part, update) for part in (halves(batch) if update.grad_variance else [batch])]
        gap_tokens = max(1.0, float(sum(part["mask"].sum() for part in parts))) if check_gap else 0.0
        budget, whole, less = update.token_budget, update.whole_groups, self.share
        cut = [
            (i, *own) for i, part in enumerate(parts) for own in own_units(self.policy, part, budget, less, whole_groups=whole)
        ]
        coupled = update.whole_batch and (len(cut) > 1 or world.size() > 1)
        slopes = self._slopes(batch, update, counts, metrics, wants) if coupled else None
        with self.policy.autocast():  # around all units, so that weights are cast once for each version of them
            for n, (i, unit, share) in enumerate(cut):
                if i == 1 and not half:
                    half = [gradient(p).clone() for p in self.parameters]
                found: dict[str, Tensor] = {}
                out = self._forward(unit, wants, update.temperature, last=n == len(cut) - 1)
                if not share:
                    stop_gradient(out)
                with torch.autocast(self.policy.device.type, enabled=False):
                    if slopes is None:
                        loss = total(update, {**self.state, **unit, **out}, counts, found)
                    else:
                        loss = torch.stack([(out[name] * slope[unit["index"]]).sum() for name, slope in slopes.items()]).sum()
                    self._backward(loss)
                    with torch.no_grad():
                        diagnose(update, {**self.state, **unit, **out}, counts, found, gap_tokens)
                        for name, x in found.items():
                            add(metrics, name, counted(x, share))
                        for name in {name for *_, change in states(update) for name in arguments(change)} & out.keys():
                            filled = seen.setdefault(name, out[name].new_zeros((len(batch.inputs), *out[name].shape[1:])))
                            filled[unit["index"]] += counted(out[name], share)
        self._look(batch, {i for part in parts for i in part["index"].tolist()}, update, counts, metrics)
        metrics = over_ranks(metrics)
        if half:
            differences = ((2 * h - gradient(p)).square().sum() for h, p in zip(half, self.parameters, strict=True))
            metrics["grad_variance"] = torch.stack(list(differences)).sum()
        scale = factor(self.steps, total=self.total, schedule=self.settings["schedule"], warmup=self.settings["warmup"])
        norm = self._descend(self.lr * scale, allowed=bool(torch.isfinite(metrics["loss"])))
        if not torch.isfinite(norm) or not torch.isfinite(metrics["loss"]):
            terms = ", ".join(f"{name} {float(x):.4g}" for name, x in metrics.items() if name.startswith("loss"))
            raise NonFinite(
                f"the loss or its gradient is not finite ({terms}, gradient norm {float(norm):.4g}) on the groups "
                f"{sorted(set(batch['group'].tolist()))[:8]}; the weights are those before this step"
            )
        self._next_state(update, {**batch, **{name: world.summed(seen[name]) for name in sorted(seen)}})
        self.steps += 1
        self.tokens += int(batch["mask"].sum())
        recorded = {"token_budget": torch.tensor(float(int(budget * self.share)))} if self.share < 1.0 else {}
        return metrics | {"grad_norm": norm.detach(), "lr": torch.tensor(self.lr * scale)} | recorded

    def _forward(self, unit: Batch, wants: set[str], temperature: float, *, last: bool) -> dict[str, Tensor]:
        """The fields of a unit, with gradient; `last`: no unit of this optimiser step comes after it."""
        return self.trained.forward(unit, wants, temperature)

    def _backward(self, loss: Tensor) -> None:
        """Add this unit's part to the gradient."""
        loss.backward()  # type: ignore[no-untyped-call]

    def _descend(self, lr: float, *, allowed: bool) -> Tensor:
        """Clip the gradient and take the step, if it is finite and `allowed`; the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings["clip"] or float("inf"))
        if allowed and torch.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _look(
        self, batch: Batch, read: set[int], update: Update, counts: Mapping[str, Counts], metrics: dict[str, Tensor]
    ) -> None:
        """Add the diagnostics of the sequences that are not among the units `read`: a forward, where one needs it."""
        rest = batch.take([i for i in range(len(batch.inputs)) if i not in read])
        seeing = replace(update, watch=[w for w in update.watch if signal(w, rest).any()], loss=())
        if not seeing.watch:
            return
        wants = seeing.reads & self.policy.offers
        out = computed(self.policy, rest, wants, update.token_budget, update.temperature, self.share) if wants else {}
        found: dict[str, Tensor] = {}
        diagnose(seeing, {**self.state, **rest, **out}, counts, found)
        for name, x in found.items():  # every rank has those of all sequences
            add(metrics, name, x / world.size())

    def _slopes(
        self, batch: Batch, update: Update, counts: Mapping[str, Counts], metrics: dict[str, Tensor], wants: set[str]
    ) -> dict[str, Tensor]:
        """d loss / d field for each field that the policy computes, from all sequences of the step at once.

        The first of two passes: a forward of every unit without gradient, and the loss on what they gave as leaves.
        """
        found = computed(self.policy, batch, wants, update.token_budget, update.temperature, self.share)
        leaves = {name: x.requires_grad_() for name, x in found.items()}
        loss = total(update, {**self.state, **batch, **leaves}, counts, metrics)
        for name in metrics:  # every rank has those of all sequences
            metrics[name] = metrics[name] / world.size()
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {name: x for name, x in zip(leaves, slopes, strict=True) if x is not None}

    def _begin_state(self, update: Update) -> None:
        """The first value of each state that a term has."""
        for name, start, _ in states(update):
            self.state.setdefault(name, torch.tensor(start, device=self.policy.device))

    @torch.no_grad()
    def _next_state(self, update: Update, fields: Mapping[str, Tensor]) -> None:
        """The next value of each state, from the fields of the whole step as they were before it."""
        known = {**self.state, **fields}
        for name, _, change in states(update):
            self.state[name] = change(*(known[read] for read in arguments(change)))


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


def halves(batch: Batch) -> list[Batch]:
    """Two parts of whole groups, every second group in the second."""
    groups = {g: i for i, g in enumerate(dict.fromkeys(batch["group"].tolist()))}
    side = [groups[g] % 2 for g in batch["group"].tolist()]
    return [batch.take([i for i, s in enumerate(side) if s == part]) for part in range(min(2, len(groups)))]


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter's gradient, zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def units(policy: Policy, batch: Batch, token_budget: int, *, whole_groups: bool = False) -> Iterator[Batch]:
    """Parts of which one forward reads at most `token_budget` tokens, padding counted.

    A part has at least one sequence, or with `whole_groups` one group, however long that is.
    """
    return map(batch.take, policy.split(batch, token_budget, whole_groups=whole_groups))


def own_units(
    policy: Policy, batch: Batch, token_budget: int, less: float = 1.0, *, whole_groups: bool = False
) -> list[tuple[Batch, float]]:
    """The units of this rank, each with the share 1. In several ranks they are so small that each rank gets some.

    `less` makes them smaller than the budget and the batch make them, where memory did not suffice.

    Every rank has as many, because each is a collective where weights are divided: a rank that has fewer goes through the
    shortest unit once more, with the share 0.
    """
    size = [x.length for x in batch.inputs]
    most, parts = token_budget, policy.split(batch, token_budget, whole_groups=whole_groups)
    wanted = math.ceil(max(world.size(), len(parts)) / less)
    while len(parts) < wanted and most > 1:  # what a prompt that answers share counts, only the policy knows
        most = min(most, sum(size)) // 2
        parts = policy.split(batch, most, whole_groups=whole_groups)
    every = dealt([sum(size[i] for i in part) for part in parts], world.size())
    own = [(batch.take(parts[i]), 1.0) for i in every[world.rank()]]
    shortest = min(parts, key=lambda part: sum(size[i] for i in part))
    return own + [(batch.take(shortest), 0.0) for _ in range(max(map(len, every)) - len(own))]


def counted(x: Tensor, share: float) -> Tensor:
    """What a unit adds: x, or exactly 0 where it is gone through once more (0 times infinity is nan)."""
    return x if share else torch.zeros_like(x)


def stop_gradient(fields: Mapping[str, Tensor]) -> None:
    """Have a backward go through all that made these fields, as other ranks' do, with a gradient of exactly 0 from here on."""
    for x in fields.values():
        if x.requires_grad:
            x.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]


def dealt(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of some things of these sizes each rank gets: the largest first, to the rank that has least; in order."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(found, key=lambda own: sum(sizes[j] for j in own)).append(i)
    return [sorted(own) for own in found]


def add(metrics: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add up a metric over units; of those called `/max`, keep the largest."""
    put = torch.maximum if name.endswith("/max") else torch.add
    metrics[name] = put(metrics[name], value) if name in metrics else value


def over_ranks(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of the whole step, where each rank has those of its units: two reductions, whatever there is."""
    if world.size() == 1:
        return metrics
    made = dict(metrics)
    for whole, combine in ((False, world.summed), (True, world.largest)):
        names = [name for name in sorted(metrics) if name.endswith("/max") == whole]
        if names:
            made |= zip(names, combine(torch.stack([metrics[name].float() for name in names])), strict=True)
    return made


@torch.no_grad()
def computed(
    policy: Policy, batch: Batch, wants: set[str], token_budget: int, temperature: float = 1.0, less: float = 1.0
) -> dict[str, Tensor]:
    """The fields of `wants` that a policy offers, for a whole batch and without gradient; `less` as in `own_units`."""
    numbered = Batch({**batch, "index": torch.arange(len(batch.inputs), device=policy.device)}, batch.inputs)
    out: dict[str, Tensor] = {}
    with policy.autocast():
        for unit, share in own_units(policy, numbered, token_budget, less):
            for name, x in policy.forward(unit, wants, temperature).items():
                out.setdefault(name, x.new_zeros((len(batch.inputs), *x.shape[1:])))[unit["index"]] += counted(x, share)
    return {name: world.summed(out[name]) for name in sorted(out)}
