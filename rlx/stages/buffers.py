"""Episodes that outlive the step in which they were played."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rlx.filters import chain
from rlx.offload import present
from rlx.rollout.samplers import resampled
from rlx.stages.context import Context
from rlx.stages.rows import tokenized
from rlx.stages.spread import led
from rlx.types import Component, DataRef, Episode, Floats, Keep, Sampling


@dataclass(kw_only=True)
class BufferSpec:
    """Episodes that outlive their step: the last `capacity` that pass `keep`, of all that are played.

    `as: demonstration` stores them as rows to imitate. With `resample`, a model of the stage draws a fresh turn at each of
    the `states` that a step's draws come from. A state is a turn of a stored episode, each equally likely; a row of an update
    is then two episodes, the stored one and the one that ends with the fresh turn (see the field `fresh`).

    A pool that samplers draw from is part of what training has come to: it begins with the rows of `start`, and with `save`,
    each checkpoint has it as `buffers/NAME.jsonl`, which `start: {name: jsonl, path: ...}` reads again. Updates may train on
    rows of `start` that have completions: these have tokens and labels, but no sampled log-probabilities and no rewards.
    """

    capacity: int = 1024
    keep: list[Component[Keep]] = field(default_factory=list)
    as_: Literal["episode", "demonstration"] = "episode"
    order: Literal["uniform", "newest"] = "uniform"
    resample: str = ""
    states: int = 32
    start: DataRef | None = None
    save: bool = False


class Buffer:
    """The episodes of one BufferSpec."""

    def __init__(self, spec: BufferSpec, start: Sequence[Episode] = ()) -> None:
        self.spec = spec
        self.episodes: deque[Episode] = deque(start, maxlen=spec.capacity)
        self._pairs: list[tuple[Episode, Episode]] = []

    def add(self, seen: Sequence[Episode]) -> None:
        """Take in what a step has played."""
        chosen = chain([e for e in seen if e.num_tokens and not np.isnan(e.reward)], self.spec.keep)
        self.episodes += [demonstration(e) for e in chosen] if self.spec.as_ == "demonstration" else chosen

    def open(self, models: Mapping[str, Any], sampling: Sampling, seed: tuple[int, ...]) -> None:
        """Begin a step: where `resample` is set, choose the states of its draws and draw fresh turns at them."""
        if not self.spec.resample or not self.episodes:
            return
        states = [(episode, k) for episode in self.episodes for k in range(len(episode.turns))]
        rng = np.random.default_rng((*seed, 0))
        chosen = [states[i] for i in rng.choice(len(states), min(self.spec.states, len(states)), replace=False).tolist()]
        policy, stored = models[self.spec.resample], [episode for episode, _ in chosen]
        known = [x for e in stored for x in (e.task, *(message for turn in e.turns for message in turn.replies))]
        with present(policy):
            made = led(lambda: resampled(policy, chosen, sampling, (*seed, 1)), known)
        self._pairs = [(episode, fresh) for (episode, _), fresh in zip(chosen, made, strict=True)]

    def draw(self, rows: int, seed: tuple[int, ...]) -> list[Episode]:
        """Some episodes, with their fresh ones."""
        rng = np.random.default_rng(seed)
        if not self.spec.resample:
            return self.some(rows, rng)
        return [x for i in rng.permutation(len(self._pairs))[:rows].tolist() for x in self._pairs[i]]

    def state_dict(self) -> dict[str, Any]:
        """The episodes; those that a step resamples are of that step alone."""
        return {"episodes": list(self.episodes)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with them."""
        self.episodes.clear()
        self.episodes += saved["episodes"]

    def some(self, rows: int, rng: np.random.Generator) -> list[Episode]:
        """Episodes by chance, or the newest."""
        size = min(rows, len(self.episodes))
        if self.spec.order == "newest":
            return list(self.episodes)[-size:]
        return [self.episodes[i] for i in rng.choice(len(self.episodes), size, replace=False).tolist()]


def begun(specs: Mapping[str, BufferSpec], on: Collection[str], policy: Any, ctx: Context) -> dict[str, Buffer]:
    """The buffers of a stage before its first step. Rows of `start` get tokens where updates train `on` them."""
    made = {}
    for name, spec in specs.items():
        rows = ctx.data(spec.start) if spec.start is not None else []
        trained = spec.start is not None and name in on
        made[name] = Buffer(spec, tokenized(rows, policy, None, f"stages.{ctx.name}.buffers.{name}.start") if trained else rows)
    return made


def demonstration(episode: Episode) -> Episode:
    """An episode as a row to imitate."""
    nothing: Floats = np.zeros(0, np.float32)
    return replace(episode, label=1.0, turns=[replace(turn, logp=nothing) for turn in episode.turns])
