"""One optimiser step: named tensors in, loss terms by name, reductions by global counts, clipped gradient, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlx import world
from rlx.models.parts import blocks
from rlx.optim import factor
from rlx.terms import Update, add, arguments, diagnose, mask_of, signal, states, step_counts, total, with_signal
from rlx.types import Batch, Component, Counts, Policy
from rlx.units import computed, counted, halves, own_units, stop_gradient


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
        for name, start, _ in states(update):
            self.state.setdefault(name, torch.tensor(start, device=self.policy.device))
        batch["index"] = torch.arange(len(batch.inputs), device=self.policy.device)
        metrics, seen = self._accumulate(batch, update, counts, check_gap=check_gap)
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
        recorded = {"token_budget": torch.tensor(float(int(update.token_budget * self.share)))} if self.share < 1.0 else {}
        return metrics | {"grad_norm": norm.detach(), "lr": torch.tensor(self.lr * scale)} | recorded

    def _accumulate(
        self, batch: Batch, update: Update, counts: Mapping[str, Counts], *, check_gap: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradient of the step, unit by unit. The step's metrics, and this rank's share of the fields that states read."""
        parts = [with_signal(part, update) for part in (halves(batch) if update.grad_variance else [batch])]
        wants = (update.reads | ({"logp"} if check_gap else set())) & self.policy.offers
        gap_tokens = max(1.0, float(sum(part["mask"].sum() for part in parts))) if check_gap else 0.0
        kept = {name for *_, change in states(update) for name in arguments(change)} & self.policy.offers
        metrics: dict[str, Tensor] = {}
        seen: dict[str, Tensor] = {}
        half: list[Tensor] = []
        cut = [(i, *own) for i, part in enumerate(parts) for own in self._units(part, update)]
        coupled = update.whole_batch and (len(cut) > 1 or world.size() > 1)
        slopes = self._slopes(batch, update, counts, metrics, wants) if coupled else None
        with self.policy.autocast():  # around all units, so that weights are cast once for each version of them
            for n, (i, unit, repeated) in enumerate(cut):
                if i == 1 and not half:
                    half = [gradient(p).clone() for p in self.parameters]
                out = self._forward(unit, wants, update.temperature, last=n == len(cut) - 1)
                if repeated:
                    stop_gradient(out)
                fields = {**self.state, **unit, **out}
                found: dict[str, Tensor] = {}
                with torch.autocast(self.policy.device.type, enabled=False):
                    self._backward(total(update, fields, counts, found) if slopes is None else along(slopes, fields))
                    with torch.no_grad():
                        diagnose(update, fields, counts, found, gap_tokens)
                        for name, x in found.items():
                            add(metrics, name, counted(x, repeated))
                        for name in kept & out.keys():
                            filled = seen.setdefault(name, out[name].new_zeros((len(batch.inputs), *out[name].shape[1:])))
                            filled[unit["index"]] += counted(out[name], repeated)
        self._look(batch, {i for part in parts for i in part["index"].tolist()}, update, counts, metrics)
        metrics = over_ranks(metrics)
        if half:
            differences = ((2 * h - gradient(p)).square().sum() for h, p in zip(half, self.parameters, strict=True))
            metrics["grad_variance"] = torch.stack(list(differences)).sum()
        return metrics, seen

    def _units(self, part: Batch, update: Update) -> list[tuple[Batch, bool]]:
        """This rank's units of a part of the step."""
        return own_units(self.policy, part, update.token_budget, self.share, whole_groups=update.whole_groups)

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

    @torch.no_grad()
    def _next_state(self, update: Update, fields: Mapping[str, Tensor]) -> None:
        """The next value of each state, from the fields of the whole step as they were before it."""
        known = {**self.state, **fields}
        for name, _, change in states(update):
            self.state[name] = change(*(known[read] for read in arguments(change)))


def along(slopes: Mapping[str, Tensor], fields: Mapping[str, Tensor]) -> Tensor:
    """What has the gradient of the whole step's loss in a unit's fields: each times its slope there."""
    return torch.stack([(fields[name] * slope[fields["index"]]).sum() for name, slope in slopes.items()]).sum()


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter's gradient, zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


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
