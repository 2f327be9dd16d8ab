"""`rlx check`: what can be known without loading a model, and with --first-batch what the real first batch says."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlx.learner import reduced
from rlx.plan import Plan
from rlx.stages.online import credit
from rlx.types import FIELDS, Batch, ConfigError, Counts

GROUPS, SIZE, LENGTH = 3, 4, 6


def generated_batch(names: set[str]) -> Batch:
    """Three groups of four sequences of unequal length, every field of `names` filled with plausible numbers."""
    draw = torch.Generator().manual_seed(0)
    n = GROUPS * SIZE
    lengths = torch.randint(1, LENGTH + 1, (n,), generator=draw)
    mask = torch.arange(LENGTH)[None] < lengths[:, None]
    ret = torch.randint(0, 2, (n,), generator=draw).float()
    ret[:2] = torch.tensor([0.0, 1.0])  # at least one group has signal
    last = torch.nn.functional.one_hot(lengths - 1, LENGTH).bool()
    fields = {
        "mask": mask,
        "ret": ret,
        "reward": torch.where(last, ret[:, None], 0.0),
        "label": torch.tensor([1.0, -1.0] * (n // 2)),
        "group": torch.arange(GROUPS).repeat_interleave(SIZE),
    }
    for name in sorted(names - set(fields)):
        shape = (n, LENGTH) if FIELDS[name].shape == "N,T" else (n,)
        value = torch.randn(shape, generator=draw) * 0.3
        fields[name] = value - 2.0 if "logp" in name else value.abs() if name == "entropy" else value
    return Batch(fields, [], [])


def components(plan: Plan) -> list[str]:
    """Call every bound loss, advantage, derive, reduction and watch of a plan on a generated batch; a line for each mistake."""
    found: list[str] = []
    for name, stage in plan.stages.items():
        loss, watch = getattr(stage, "loss", []), getattr(stage, "watch", [])
        derive, advantage = getattr(stage, "derive", []), getattr(stage, "advantage", [])
        names = {r for c in [*loss, *watch, *derive, *advantage] for r in c.reads} | {"logp"}
        batch = generated_batch(names & set(FIELDS))
        before, at = len(found), f"stages.{name}"
        for d in derive:
            found += attempt(f"{at}.derive: {d.name!r}", partial(derived, batch, d))
        for a in advantage:
            found += attempt(f"{at}.advantage: {a.name!r}", partial(value, batch, a))
        if len(found) > before:  # the losses would read what these did not write
            continue
        credit(batch, [], advantage)
        for term in loss:
            found += attempt(f"{at}.loss: {term.name!r}", partial(gradient, batch, term, stage))
        for w in watch:
            found += attempt(f"{at}.watch: {w.name!r}", partial(value, batch, w))
    return found


def attempt(what: str, look: Callable[[str], list[str]]) -> list[str]:
    """What `look` finds; a line where the component raises, whatever it is: it may be the user's own code."""
    try:
        return look(what)
    except Exception as error:
        said = str(error) if isinstance(error, ConfigError) else f"raised {type(error).__name__}: {error}"
        return [f"{what} {said}"]


def derived(batch: Batch, derive: Any, what: str) -> list[str]:
    """One derive: the field that it writes is finite and has the right shape."""
    credit(batch, [derive], [])
    return finite(batch[derive.into], batch, f"{what}: field {derive.into!r}")


def value(batch: Batch, component: Any, what: str) -> list[str]:
    """One advantage or diagnostic: right shape, finite."""
    return finite(component.call(*(batch[r] for r in component.reads)), batch, what)


def finite(x: Tensor, batch: Batch, what: str) -> list[str]:
    """(N,T) or (N,), finite where the mask is True."""
    mask = batch["mask"]
    if x.shape not in (mask.shape, mask.shape[:1]):
        return [f"{what} has shape {tuple(x.shape)}; {tuple(mask.shape)} or {tuple(mask.shape[:1])} is expected"]
    inside = x[mask] if x.dim() == 2 else x
    return [] if torch.isfinite(inside).all() else [f"{what} is not finite on a batch of plausible numbers"]


def gradient(batch: Batch, term: Any, stage: Any, what: str) -> list[str]:
    """One loss term: right shape, finite, and a gradient that is not zero."""
    leaves = {r: batch[r].clone().requires_grad_() for r in ("logp", "entropy") if r in term.reads}
    fields = {**batch, **leaves}
    found = finite(term.call(*(fields[r] for r in term.reads)).detach(), batch, what)
    if found or not leaves:
        return found or [f"{what} reads nothing that the policy computes, so it trains nothing"]
    counts = Counts(float(batch["mask"].sum()), float(len(batch["mask"])))
    total = reduced(term, fields, stage.reduce, counts)
    size = sum(
        float(g.abs().sum()) for g in torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if g is not None
    )
    if not math.isfinite(size) or size == 0.0:
        found.append(f"{what} has gradient {size} on a batch of plausible numbers")
    return found


def order(plan: Plan) -> list[str]:
    """The stages in the order in which they run, what each starts from, and how much a step is made of."""
    lines = []
    for name, stage in plan.stages.items():
        after = f", after {', '.join(plan.inputs[name])}" if plan.inputs[name] else ""
        lines.append(f"{name} ({plan.config['stages'][name]['kind']}{after}): {stage.describe()}")
    return lines
