"""`rlx check`: what can be known without loading a model, and with --first-batch what the real first batch says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlx.build import model_offers
from rlx.marks import marked
from rlx.plan import Plan
from rlx.stages.fields import reads
from rlx.stages.models import ModelSpec, offers
from rlx.stages.prepare import credit
from rlx.terms import count, mask_of, reduced
from rlx.types import FIELDS, HEADS, Batch, ConfigError

GROUPS, SIZE, LENGTH, TURNS = 3, 4, 6, 3


def generated_batch(shapes: Mapping[str, str]) -> Batch:
    """Three groups of four sequences of unequal length and up to three turns, every field filled with plausible numbers.

    `shapes` maps the names of the fields that are wanted besides those of every batch to their shapes.
    """
    draw = torch.Generator().manual_seed(0)
    n = GROUPS * SIZE
    lengths = torch.randint(1, LENGTH + 1, (n,), generator=draw)
    at = torch.arange(LENGTH)[None]
    mask = at < lengths[:, None]
    turn = torch.where(mask, at * TURNS // lengths[:, None], -1)
    ret = torch.randint(0, 2, (n,), generator=draw).float()
    ret[:2] = torch.tensor([0.0, 1.0])  # at least one group has signal
    last = torch.nn.functional.one_hot(lengths - 1, LENGTH).bool()
    turn_mask = torch.stack([(turn == k).any(1) for k in range(TURNS)], 1)
    final = torch.nn.functional.one_hot(turn.amax(1), TURNS).float()
    fields = {
        "mask": mask,
        "ret": ret,
        "reward": torch.where(last, ret[:, None], 0.0),
        "label": torch.tensor([1.0, -1.0] * (n // 2)),
        "group": torch.arange(GROUPS).repeat_interleave(SIZE),
        "agent": torch.arange(n) % 2,
        "fresh": torch.arange(n) % 4 == 3,
        "bootstrap": torch.zeros(n),
        "turn": turn,
        "turn_mask": turn_mask,
        "turn_reward": final * ret[:, None],
        "turn_done": final,
    }
    sizes = {"N,T": (n, LENGTH), "N,K": (n, TURNS), "N": (n,)}
    for name in sorted(set(shapes) - set(fields)):
        if name.endswith("mask") and shapes[name] == "N,T":
            fields[name] = mask
            continue
        value = torch.randn(sizes[shapes[name]], generator=draw) * 0.3
        fields[name] = value - 2.0 if "logp" in name else value.abs() if name == "entropy" else value
    return Batch(fields, [])


def shapes_of(names: set[str], stage: Any) -> dict[str, str]:
    """The shape of each field: as FIELDS or the stage's heads say of it, or of what it is a model's; else (N,T)."""
    heads = {name: HEADS[at] for spec in stage.specs().values() for name, at in spec.heads.items()}
    known = {name: field.shape for name, field in FIELDS.items()} | heads | dict.fromkeys(stage.columns, "N")
    found = {}
    for name in names:
        tail = next((known[k] for k in sorted(known, key=len, reverse=True) if name == k or name.endswith("_" + k)), "N,T")
        found[name] = tail
    return found


def parts_of(stage: Any) -> list[tuple[str, Any]]:
    """(dotted part, what holds loss, derive, ...) for each update of a stage; one without a loss has none."""
    if hasattr(stage, "all_updates"):
        return [(f".updates.{name}" if name else "", update) for name, update in stage.all_updates().items()]
    return [("", stage)] if hasattr(stage, "loss") else []


def components(plan: Plan) -> list[str]:
    """Call every bound loss, advantage, derive, reduction and watch of a plan on a generated batch; a line for each mistake."""
    found: list[str] = []
    for name, stage in plan.stages.items():
        for part, update in parts_of(stage):
            loss, watch = update.loss, update.watch
            derive, advantage = update.derive or [], getattr(update, "advantage", None) or []
            batch = generated_batch(shapes_of(reads(loss, watch, derive, advantage) | {"logp"}, stage))
            before, at = len(found), f"stages.{name}{part}"
            for d in derive:
                found += attempt(f"{at}.derive: {d.name!r}", partial(derived, batch, d))
            for a in advantage:
                found += attempt(f"{at}.advantage: {a.name!r}", partial(value, batch, a))
            if len(found) > before:  # the losses would read what these did not write
                continue
            credit(batch, [], advantage)
            specs: dict[str, ModelSpec] = getattr(stage, "specs", dict)()
            trained = offers(getattr(update, "train", "policy"), specs, model_offers(plan.model))
            for term in loss:
                found += attempt(f"{at}.loss: {term.name!r}", partial(gradient, batch, term, update, trained))
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
    return finite(component.call(*(batch[r] for r in component.reads)), batch, what, by_group="group" in component.reads)


def finite(x: Tensor, batch: Batch, what: str, *, by_group: bool = False) -> list[str]:
    """(N,T), (N,K) or (N,), finite where the mask is True; `by_group`: one number for each group instead of (N,)."""
    masks = [batch["mask"], batch["turn_mask"]]
    row = torch.Size([GROUPS]) if by_group else masks[0].shape[:1]
    if x.shape not in [*(m.shape for m in masks), row, torch.Size([])]:
        return [f"{what} has shape {tuple(x.shape)}; {tuple(masks[0].shape)} or {tuple(row)} is expected"]
    inside = next((x[m] for m in masks if m.shape == x.shape), x)
    return [] if torch.isfinite(inside).all() else [f"{what} is not finite on a batch of plausible numbers"]


def gradient(batch: Batch, term: Any, update: Any, trained: set[str], what: str) -> list[str]:
    """One loss term: right shape, finite, and a gradient by what the model in training computes that is not zero."""
    leaves = {r: batch[r].clone().requires_grad_() for r in trained if r in term.reads}
    stated = marked(term.call, "state")
    state = {stated[0]: torch.tensor(stated[1])} if stated else {}
    fields = {**batch, **leaves, **state}
    found = finite(term.call(*(fields[r] for r in term.reads)).detach(), batch, what, by_group="group" in term.reads)
    if found or not leaves:
        return found or [f"{what} reads nothing that the model in training computes, so it trains nothing"]
    mask = mask_of(term)
    total = reduced(term, fields, update.reduce, count(batch[mask], batch["group"]))
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
