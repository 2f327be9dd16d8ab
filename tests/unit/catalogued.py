"""Every loss of the catalogue under every reduction, each on a batch of its own, for the tests of invariance.

A loss or reduction that is added to the catalogue is picked up. A field that it reads needs an entry here only where no rule
of `filled` makes it, a required setting where `SETTING` has none of its type: both are errors that say so.
"""

from __future__ import annotations

import itertools
import typing
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from architectures import ids, model
from torch import Tensor

from rlx.build import Binder, signature
from rlx.catalogue import CATALOGUE
from rlx.marks import marked
from rlx.models.language import LanguageModel
from rlx.terms import Update
from rlx.types import FIELDS, Batch, Component, Episode, Message, Status, Task, Turn

# The heads that losses read, and what each of them looks at (HEADS in rlx/types.py).
READS = {"value": "token", "score": "last", "v": "before_turn", "q": "after_turn"}
# A value for a required setting of each type.
SETTING: dict[Any, Any] = {int: 7, float: 0.2}
# Members of each group, and how many ids their prompt has; what the long one's members share is read once.
GROUPS = [(4, 24), (2, 5), (3, 11), (1, 2), (2, 1)]
WHOLE = 100_000  # a token budget that makes one unit of any batch here


@dataclass(frozen=True)
class Case:
    """A loss under a reduction, with the diagnostics that can be taken beside it."""

    loss: Component[Any]
    reduce: Component[Any]
    watch: tuple[Component[Any], ...]

    def __str__(self) -> str:
        chosen = [str(value) for value in self.loss.settings.values()]
        return "-".join([self.loss.name, *chosen, self.reduce.name])

    @property
    def seed(self) -> int:
        """Of its batch: no other case has the same."""
        return zlib.crc32(str(self).encode())

    def update(self, token_budget: int) -> Update:
        """What the learner is asked for."""
        return Update([self.loss], self.reduce, self.watch, token_budget=token_budget, sampled=True, temperature=0.8)


def cases() -> list[Case]:
    """All of them. A diagnostic that reads `group`, which keeps groups whole, stands beside losses that do so, too."""
    losses, reductions, watches = ([c for name in CATALOGUE[g] for c in variants(g, name)] for g in ("loss", "reduce", "watch"))
    of = {grouped: tuple(w for w in watches if grouped or "group" not in w.reads) for grouped in (True, False)}
    return [Case(loss, reduce, of["group" in loss.reads]) for loss in losses for reduce in reductions]


def variants(group: str, name: str) -> list[Component[Any]]:
    """A component of the catalogue for each choice that its settings offer; else with their defaults."""
    binder = Binder()
    params = signature(binder.locate(group, name, name))[1]  # type: ignore[arg-type]
    options: dict[str, Iterable[Any]] = {}
    for key, param in params.items():
        if typing.get_origin(param.hint) is Literal:
            options[key] = typing.get_args(param.hint)
        elif param.required and param.hint not in SETTING:
            raise LookupError(f"{group} {name!r} requires {key!r}: give SETTING in {__file__} a value of type {param.hint}")
        elif param.required:
            options[key] = [SETTING[param.hint]]
    made = [
        binder.component(group, {"name": name, **dict(zip(options, chosen, strict=True))}, name)
        for chosen in itertools.product(*options.values())
    ]
    assert binder.errors == []
    return made


@cache
def policy() -> LanguageModel:
    """A small model with every head."""
    made = model("qwen2").with_heads(READS, seed=3)
    assert made.packs
    return made


# --------------------------------------------------------------------------- batches
def batch_of(case: Case) -> Batch:
    """Groups of unequal size and length with both labels, one or two turns each, and one sequence that is fully masked."""
    rng = np.random.default_rng(case.seed)
    batch = policy().collate([e for g, (size, prompt) in enumerate(GROUPS) for e in group(rng, g, size, prompt)])
    names = {name for c in (case.loss, *case.watch) for name in c.reads}
    filled(batch, names, rng, f"loss {case.loss.name!r}", state=(marked(case.loss.call, "state") or [""])[0])
    assert int((~batch["mask"].any(1)).sum()) == 1
    return batch


def group(rng: np.random.Generator, number: int, size: int, prompt: int) -> list[Episode]:
    """Answers to one prompt; of those with a second turn, every second one has drawn it anew."""

    def some(least: int, most: int) -> Any:
        return ids(*rng.integers(2, 262, rng.integers(least, most + 1)).tolist())

    shared, made = some(prompt, prompt), []
    for member in range(size):
        heard = [shared, some(1, 5)][: 1 + (member + number) % 2]
        turns = [Turn(seen, did, rng.normal(-5, 1, len(did)).astype(np.float32)) for seen in heard for did in [some(1, 12)]]
        for turn in turns:
            chosen = rng.random(len(turn.did)) < 0.8
            chosen[0] = True
            turn.token["trained"] = chosen & ((number, member) != (2, 1))
        status = Status.TRUNCATED if member == 2 else Status.FINISHED
        asked = Task((Message("user", "?"),))
        made.append(Episode(asked, number, turns, status, reward=float(rng.normal()), label=1.0 - 2 * (member % 2)))
        made[-1].info["fresh"] = member % 4 >= 2 or number == 4
    return made


@torch.no_grad()
def filled(batch: Batch, names: Iterable[str], rng: np.random.Generator, reader: str, state: str = "") -> None:
    """Add the fields of these names that neither collate nor the policy makes.

    What another model (or the policy at another time) says of x, a name that ends in `_x`, is what the policy says, and
    noise. What a stage computes from other fields is noise. Raises LookupError where there is no rule.
    """
    said = policy().forward(batch, policy().offers)
    for name in sorted(set(names) - set(batch) - set(said) - {state}):
        of = next((x for x in said if name.endswith(f"_{x}")), None)
        if of is None and (name not in FIELDS or FIELDS[name].made_by not in ("advantage", "derive")):
            raise LookupError(
                f"{reader} reads the field {name!r}, which the tests of invariance cannot make: give `filled` in {__file__} a "
                "rule for it, or READS what it looks at if it is a head"
            )
        shape = batch["mask"].shape if of is None else said[of].shape
        noise = torch.from_numpy(rng.normal(size=tuple(shape))).float()
        batch[name] = noise if of is None else said[of] + 0.3 * noise


def alone(case: Case, batch: Batch) -> Batch:
    """What one rank gets by itself: the sequence on which the loss is largest, or a group if it compares sequences."""
    if "group" in case.loss.reads:
        return batch.take([i for i, g in enumerate(batch["group"].tolist()) if g == 1])
    with torch.no_grad():
        fields = {**batch, **policy().forward(batch, policy().offers)}
        x = case.loss.call(*(fields[name] for name in case.loss.reads))
    return batch.take([int(x.abs().flatten(1).sum(1).argmax() if x.dim() > 1 else x.abs().argmax())])


# --------------------------------------------------------------------------- the same
Result = tuple[dict[str, float], Tensor]


def check(what: str, found: Result, expected: Result) -> None:
    """Metrics to a relative 1e-5 (or 1e-6 of what is next to 0), the gradient to 1e-5 of its largest number; neither is 0."""
    metrics, gradient = found
    assert metrics.keys() == expected[0].keys(), what
    for name, x in expected[0].items():
        assert abs(metrics[name] - x) <= 1e-6 + 1e-5 * abs(x), f"{what}: {name} is {metrics[name]}, expected {x}"
    size = float(expected[1].abs().max())
    assert abs(expected[0]["loss"]) > 1e-4, f"{what}: the loss is 0"
    assert size > 1e-5, f"{what}: the gradient is 0"
    worst = float((gradient - expected[1]).abs().max())
    assert worst <= 1e-5 * size, f"{what}: the gradient is off by {worst}, its largest number is {size}"
