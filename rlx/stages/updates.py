"""What is trained in a step of `online`: updates in their order, on the episodes that were kept or on a buffer's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rlx.learner import Learner, MakeLearner
from rlx.stages.buffers import Buffer
from rlx.stages.context import Context
from rlx.stages.fields import reads
from rlx.stages.models import ModelSpec, follow
from rlx.stages.prepare import columns, corrections, credit, fill
from rlx.terms import Update
from rlx.types import (
    Advantage,
    Batch,
    Component,
    Derive,
    Episode,
    Failed,
    LossTerm,
    Optim,
    Policy,
    Reduce,
    Watch,
)


@dataclass(kw_only=True)
class UpdateSpec:
    """Train one model on one stream of episodes; what is not given is the stage's.

    `on`: `kept`, or a buffer, of which each of `steps` draws takes `rows` episodes. It runs from step `start` (from 1) on,
    every `every` steps, once there are `when` episodes. `derive` and `advantage` are its own where given.
    """

    loss: list[Component[LossTerm]]
    train: str = "policy"
    on: str = "kept"
    rows: int = 32
    steps: int = 1
    epochs: int = 1
    minibatches: int = 1
    reduce: Component[Reduce] | None = None
    lr: float | None = None
    optim: Component[Optim] | None = None
    advantage: list[Component[Advantage]] | None = None
    derive: list[Component[Derive]] | None = None
    watch: list[Component[Watch]] = field(default_factory=list)
    start: int = 1
    every: int = 1
    when: int = 1

    @property
    def reads(self) -> set[str]:
        """Every field that it reads."""
        return reads(self.loss, self.watch, self.advantage or [], self.derive or [])

    def due(self, step: int, size: int) -> bool:
        """Whether to train in this step, with `size` episodes there."""
        return step >= self.start and (step - self.start) % self.every == 0 and size >= self.when

    def total(self, steps: int) -> int:
        """The most optimiser steps that it takes in a stage of so many steps."""
        return len(range(self.start, steps + 1, self.every)) * self.steps * self.epochs * self.minibatches


@dataclass
class Trained:
    """One update of a stage, ready to run."""

    name: str
    spec: UpdateSpec
    learner: Learner
    update: Update
    reads: set[str]

    @property
    def credited(self) -> str:
        """The derives and advantages of its batch: updates on `kept` that share them share the batch."""
        return repr((self.spec.derive, self.spec.advantage))


class Shared(Protocol):
    """The settings of a stage that all its updates share."""

    steps: int
    reduce: Component[Reduce]
    optim: Component[Optim]
    token_budget: int
    temperature: float
    grad_variance: bool


def learners(stage: Shared, updates: Mapping[str, UpdateSpec], loaded: Mapping[str, Any], make: MakeLearner) -> list[Trained]:
    """An optimiser for each update. The first to train the policy on what was kept compares its log-probs."""
    made: list[Trained] = []
    for name, spec in updates.items():
        update = Update(
            spec.loss,
            spec.reduce or stage.reduce,
            spec.watch,
            epochs=spec.epochs,
            minibatches=spec.minibatches,
            token_budget=stage.token_budget,
            temperature=stage.temperature,
            sampled=spec.on == "kept" and spec.train == "policy" and all(t.spec.train != "policy" for t in made),
            grad_variance=stage.grad_variance,
        )
        optim, total = spec.optim or stage.optim, spec.total(stage.steps)
        learner = make(loaded[spec.train], optim, lr=spec.lr or 0.0, total=total)
        made.append(Trained(name, spec, learner, update, spec.reads))
    return made


def train(
    updates: Sequence[Trained],
    kept: Sequence[Episode],
    buffers: Mapping[str, Buffer],
    models: Mapping[str, Policy],
    specs: Mapping[str, ModelSpec],
    ctx: Context,
    step: int,
    names: Sequence[str] = (),
) -> tuple[dict[str, float], Batch | None]:
    """Run the updates that are due, in order; their metrics, and the batch of the kept episodes.

    The batches of `kept` are made first: what their fields say is of the time before the step's first update. A batch of a
    buffer is of the time before its draw's update. `names` are columns of the data that become fields. Raises Failed where
    updates are due and none of them finds a token to train on; one alone may find none (the critic of a role not played).
    """
    owners = {name: models[u.spec.train] for u in updates for name in models[u.spec.train].offers}

    def batch_of(u: Trained, episodes: list[Episode], wanted: set[str]) -> Batch:
        batch = models[u.spec.train].collate(episodes)
        columns(batch, names, episodes)
        fill(batch, wanted, models, owners, u.update.token_budget, u.update.temperature, u.learner.share)
        credit(batch, u.spec.derive or [], u.spec.advantage or [])
        return batch

    sizes = {"kept": len(kept), **{name: len(buffer.episodes) for name, buffer in buffers.items()}}
    due = [u for u in updates if sizes[u.spec.on] and u.spec.due(step, sizes[u.spec.on])]
    whole: dict[str, Batch] = {}
    alike = {u.credited: [v for v in due if v.spec.on == "kept" and v.credited == u.credited] for u in due}
    for credited, together in alike.items():
        if together:
            whole[credited] = batch_of(together[0], list(kept), {name for v in together for name in v.reads})
    metrics = {name: value for batch in whole.values() for name, value in corrections(batch).items()}
    idle = bool(due)
    for u in due:
        found: list[dict[str, float]] = []
        for draw in range(u.spec.steps):
            seed = ctx.seeds(step, draw)
            if u.spec.on == "kept":
                batch = whole[u.credited]
            else:
                batch = batch_of(u, buffers[u.spec.on].draw(u.spec.rows, (*seed, 2)), u.reads)
            found.append(u.learner.step(batch, u.update, seed))
            follow(models, specs, u.spec.train)
        idle = idle and not any(found)
        label = f"{u.name}/" if u.name else ""
        metrics |= {
            f"{label}{k}": float(np.mean([m[k] for m in found if k in m])) for k in dict.fromkeys(k for m in found for k in m)
        }
    if idle:
        raise Failed("no token of this step is trained on: every mask is empty")
    return metrics, next(iter(whole.values()), None)
