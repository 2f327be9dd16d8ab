"""One optimiser step: named tensors in, loss terms by name, reductions by global counts, clipped gradient, metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.optim import factor
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
    def wants(self) -> set[str]:
        """The fields that the policy's forward has to compute."""
        return {"logp"} | self._reads

    @property
    def whole_groups(self) -> bool:
        """Whether a term compares the sequences of a group: then no group is cut by minibatches or the token budget."""
        return "group" in self._reads

    @property
    def _reads(self) -> set[str]:
        return {name for c in [*self.loss, *self.watch] for name in c.reads}


class NonFinite(RuntimeError):
    """A loss or gradient that is not a number: the run stops with the last good weights kept."""


class TorchLearner:
    """One process. `optim` binds an optimiser of the catalogue; `total` is the number of optimiser steps of the schedule."""

    def __init__(self, policy: Policy, optim: Component[Any], *, lr: float, total: int) -> None:
        self.policy = policy
        self.lr = lr
        self.total = total
        self.settings = {"clip": 1.0, "schedule": "constant", "warmup": 0, **optim.settings}
        self.parameters = [p for p in policy.module.parameters() if p.requires_grad]
        self.optimizer = optim.call(self.parameters, lr)
        self.steps = 0
        self.tokens = 0

    def step(self, batch: Batch, update: Update, seed: tuple[int, ...]) -> dict[str, float]:
        """Go `epochs` times through the batch in `minibatches` optimiser steps each; the metrics are means over them.

        `gap/max` and `gap/mean` (nats) compare the sampled log-probs with the first training forward, before any update:
        they are the same policy's, so what is left is numerical. `grad_variance` is |g1 - g2|^2, where g1 and g2 are the
        shares of two halves of the prompts in the gradient g1 + g2: the halves are independent, so its expectation is the
        trace of the gradient's covariance.
        """
        shown: list[dict[str, Tensor]] = []
        rng = np.random.default_rng(seed)
        together = blocks(batch, whole_groups=update.whole_groups)
        for _ in range(update.epochs):
            order = rng.permutation(len(together)) if update.minibatches > 1 else np.arange(len(together))
            for part in np.array_split(order, min(update.minibatches, len(order))):
                first = not shown
                chosen = [i for block in part.tolist() for i in together[block]]
                shown.append(self._optimise(batch.take(chosen), update, check_gap=first and update.sampled))
        means = {
            name: torch.stack([m[name] for m in shown if name in m]) for name in dict.fromkeys(k for m in shown for k in m)
        }
        return {name: float(x.max() if name.endswith("/max") else x.mean()) for name, x in means.items()}

    def _optimise(self, batch: Batch, update: Update, *, check_gap: bool) -> dict[str, Tensor]:
        counts = Counts(tokens=float(batch["mask"].sum()), sequences=float(batch["mask"].any(1).sum()))
        if counts.tokens == 0:
            raise NonFinite("no token of this batch is trained on: every mask is empty")
        metrics: dict[str, Tensor] = {}
        half: list[Tensor] = []
        parts = halves(batch) if update.grad_variance else [batch]
        cut = [(i, u) for i, p in enumerate(parts) for u in units(p, update.token_budget, whole_groups=update.whole_groups)]
        for i, unit in cut:
            if i == 1 and not half:
                half = [gradient(p).clone() for p in self.parameters]
            out = self.policy.forward(unit, update.wants, update.temperature)
            fields = {**unit, **out}
            loss = torch.zeros((), device=self.policy.device)
            for term in update.loss:
                value = reduced(term, fields, update.reduce, counts)
                loss = loss + term.weight * value
                add(metrics, f"loss/{term.name}", value.detach())
            loss.backward()  # type: ignore[no-untyped-call]
            add(metrics, "loss", loss.detach())
            with torch.no_grad():
                for watch in update.watch:
                    x = watch.call(*(fields[name] for name in watch.reads))
                    add(metrics, watch.name, torch.where(unit["mask"], x, 0.0).sum() / counts.tokens)
                if check_gap:
                    gap = torch.where(unit["mask"], (out["logp"] - unit["rollout_logp"]).abs(), 0.0)
                    metrics["gap/max"] = torch.maximum(metrics.get("gap/max", gap.max()), gap.max())
                    add(metrics, "gap/mean", gap.sum() / counts.tokens)
        if half:
            differences = ((2 * h - gradient(p)).square().sum() for h, p in zip(half, self.parameters, strict=True))
            metrics["grad_variance"] = torch.stack(list(differences)).sum()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings["clip"] or float("inf"))
        if not torch.isfinite(norm) or not torch.isfinite(metrics["loss"]):
            self.optimizer.zero_grad(set_to_none=True)
            terms = ", ".join(f"{name} {float(x):.4g}" for name, x in metrics.items() if name.startswith("loss"))
            raise NonFinite(
                f"the loss or its gradient is not finite ({terms}, gradient norm {float(norm):.4g}) on the groups "
                f"{sorted(set(batch['group'].tolist()))[:8]}; the weights are those before this step"
            )
        scale = factor(self.steps, total=self.total, schedule=self.settings["schedule"], warmup=self.settings["warmup"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += int(counts.tokens)
        return metrics | {"grad_norm": norm.detach(), "lr": torch.tensor(self.lr * scale)}


def reduced(term: Component[LossTerm], fields: dict[str, Tensor], reduce: Component[Reduce], counts: Counts) -> Tensor:
    """This part's share of one term: (N,T) by the stage's reduction (or the term's own), (N,) by the mean over sequences.

    Raises ConfigError where a term of (N,) has a reduction of its own: there are no tokens to reduce over.
    """
    x = term.call(*(fields[name] for name in term.reads))
    if x.dim() == 1:
        if term.reduce is not None:
            raise ConfigError(
                f"loss {term.name!r} is one number for each sequence, averaged over sequences; "
                f"`reduce: {term.reduce.name}` is for terms of one number for each token: leave it out"
            )
        return torch.where(fields["mask"].any(1), x, 0.0).sum() / counts.sequences
    return (term.reduce or reduce).call(x, fields["mask"], counts)


def halves(batch: Batch) -> list[Batch]:
    """Two parts of whole groups, every second group in the second."""
    groups = {g: i for i, g in enumerate(dict.fromkeys(batch["group"].tolist()))}
    side = [groups[g] % 2 for g in batch["group"].tolist()]
    return [batch.take([i for i, s in enumerate(side) if s == part]) for part in range(min(2, len(groups)))]


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter's gradient, zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def blocks(batch: Batch, *, whole_groups: bool) -> list[list[int]]:
    """The sequences that stay together, as indices: those of a group, or each by itself."""
    if not whole_groups:
        return [[i] for i in range(len(batch.rows))]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(batch["group"].tolist()):
        members.setdefault(group, []).append(i)
    return list(members.values())


def units(batch: Batch, token_budget: int, *, whole_groups: bool = False) -> Iterator[Batch]:
    """Parts of at most `token_budget` padded tokens, of similar length, so that little is padding.

    A part has at least one sequence, or with `whole_groups` one group, however long that is.
    """
    lengths = [len(row) for row in batch.rows]
    part: list[int] = []
    prompt = answer = 0
    for block in sorted(blocks(batch, whole_groups=whole_groups), key=lambda b: (max(lengths[i] for i in b), b[0])):
        wide, long = max(batch.starts[i] for i in block), max(lengths[i] - batch.starts[i] for i in block)
        if part and (max(prompt, wide) + max(answer, long)) * (len(part) + len(block)) > token_budget:
            yield batch.take(part)
            part, prompt, answer = [], 0, 0
        part += block
        prompt, answer = max(prompt, wide), max(answer, long)
    if part:
        yield batch.take(part)


def add(metrics: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Sum a metric over units."""
    metrics[name] = metrics[name] + value if name in metrics else value


@torch.no_grad()
def score(policy: Policy, batch: Batch, token_budget: int, temperature: float) -> Tensor:
    """log-prob (N,T) of the batch's tokens under a policy that is not in training."""
    out = torch.zeros_like(batch["rollout_logp"])
    numbered = Batch({**batch, "index": torch.arange(len(batch.rows), device=policy.device)}, batch.rows, batch.starts)
    for unit in units(numbered, token_budget):
        out[unit["index"]] = policy.forward(unit, {"logp"}, temperature)["logp"]
    return out
