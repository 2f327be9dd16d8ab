"""What is trained in a step of `online`: updates in their order, on the episodes that were kept or on a buffer's."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rlx.filters import chain
from rlx.learner import TorchLearner, Update
from rlx.rollout.samplers import resampled
from rlx.stages.context import Context
from rlx.stages.models import ModelSpec, follow
from rlx.stages.prepare import columns, credit, fill
from rlx.types import (
    Advantage,
    Batch,
    Component,
    Derive,
    Episode,
    Floats,
    Keep,
    LossTerm,
    Optim,
    Policy,
    Reduce,
    Sampling,
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

    def due(self, step: int, size: int) -> bool:
        """Whether to train in this step, with `size` episodes there."""
        return step >= self.start and (step - self.start) % self.every == 0 and size >= self.when

    def total(self, steps: int) -> int:
        """The most optimiser steps that it takes in a stage of so many steps."""
        return len(range(self.start, steps + 1, self.every)) * self.steps * self.epochs * self.minibatches


@dataclass(kw_only=True)
class BufferSpec:
    """Episodes that outlive their step: the last `capacity` that pass `keep`, of all that are played.

    `as: demonstration` stores them as rows to imitate. With `resample`, a model of the stage draws a fresh last turn at each
    turn of the `states` episodes that a step's draws come from, and both are in the batch (see the field `fresh`).
    """

    capacity: int = 1024
    keep: list[Component[Keep]] = field(default_factory=list)
    as_: Literal["episode", "demonstration"] = "episode"
    order: Literal["uniform", "newest"] = "uniform"
    resample: str = ""
    states: int = 32


class Buffer:
    """The episodes of one BufferSpec."""

    def __init__(self, spec: BufferSpec) -> None:
        self.spec = spec
        self.episodes: deque[Episode] = deque(maxlen=spec.capacity)
        self._fresh: dict[int, list[Episode]] = {}
        self._pool: list[Episode] = []

    def add(self, seen: Sequence[Episode]) -> None:
        """Take in what a step has played."""
        chosen = chain([e for e in seen if e.num_tokens and not np.isnan(e.reward)], self.spec.keep)
        self.episodes += [demonstration(e) for e in chosen] if self.spec.as_ == "demonstration" else chosen

    def open(self, models: Mapping[str, Any], sampling: Sampling, seed: tuple[int, ...]) -> None:
        """Begin a step: where `resample` is set, choose the episodes of its draws and draw fresh turns at their states."""
        if not self.spec.resample or not self.episodes:
            return
        self._pool = self.some(self.spec.states, np.random.default_rng((*seed, 0)))
        made = resampled(models[self.spec.resample], self._pool, sampling, (*seed, 1))
        for episode in self._pool:
            self._fresh[id(episode)], made = made[: len(episode.turns)], made[len(episode.turns) :]

    def draw(self, rows: int, seed: tuple[int, ...]) -> list[Episode]:
        """Some episodes, with their fresh ones."""
        rng = np.random.default_rng(seed)
        if not self.spec.resample:
            return self.some(rows, rng)
        chosen = rng.permutation(len(self._pool))[:rows].tolist()
        return [x for i in chosen for x in (self._pool[i], *self._fresh[id(self._pool[i])])]

    def some(self, rows: int, rng: np.random.Generator) -> list[Episode]:
        """Episodes by chance, or the newest."""
        size = min(rows, len(self.episodes))
        if self.spec.order == "newest":
            return list(self.episodes)[-size:]
        return [self.episodes[i] for i in rng.choice(len(self.episodes), size, replace=False).tolist()]


def demonstration(episode: Episode) -> Episode:
    """An episode as a row to imitate."""
    nothing: Floats = np.zeros(0, np.float32)
    return replace(episode, label=1.0, turns=[replace(turn, logp=nothing) for turn in episode.turns])


@dataclass
class Trained:
    """One update of a stage, ready to run."""

    name: str
    spec: UpdateSpec
    learner: TorchLearner
    update: Update
    reads: set[str]


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

    The batch of `kept` is made once: what its fields say is of the time before the step's first update. `names` are columns
    of the data that become fields.
    """
    owners = {name: models[u.spec.train] for u in updates for name in models[u.spec.train].offers}
    metrics: dict[str, float] = {}
    whole: dict[str, Batch] = {}

    def batch_of(u: Trained, episodes: list[Episode], reads: set[str]) -> Batch:
        batch = models[u.spec.train].collate(episodes)
        columns(batch, names, episodes)
        fill(batch, reads, models, owners, u.update.token_budget, u.update.temperature)
        credit(batch, u.spec.derive or [], u.spec.advantage or [])
        return batch

    for u in updates:
        size = len(kept) if u.spec.on == "kept" else len(buffers[u.spec.on].episodes)
        if not size or not u.spec.due(step, size):
            continue
        found: list[dict[str, float]] = []
        for draw in range(u.spec.steps):
            seed = ctx.seeds(step, draw)
            if u.spec.on != "kept":
                batch = batch_of(u, buffers[u.spec.on].draw(u.spec.rows, (*seed, 2)), u.reads)
            else:
                key = repr((u.spec.derive, u.spec.advantage))
                if key not in whole:
                    alike = [v for v in updates if v.spec.on == "kept" and repr((v.spec.derive, v.spec.advantage)) == key]
                    whole[key] = batch_of(u, list(kept), {name for v in alike for name in v.reads})
                batch = whole[key]
            found.append(u.learner.step(batch, u.update, seed))
            follow(models, specs, u.spec.train)
        label = f"{u.name}/" if u.name else ""
        metrics |= {f"{label}{k}": float(np.mean([m[k] for m in found])) for k in found[0]}
    return metrics, next(iter(whole.values()), None)
