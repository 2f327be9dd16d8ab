"""`fit`: train on given rows (demonstrations, pairs, lists): shuffle, tokenize, collate, step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rlx import optim, reduce
from rlx.build import LANGUAGE
from rlx.stages import fields, progress
from rlx.stages.context import Context
from rlx.stages.evaluation import Eval
from rlx.stages.frozen import frozen
from rlx.stages.models import ModelSpec, as_spec, follow, refresh, spec_problems
from rlx.stages.prepare import columns, credit, fill
from rlx.stages.rows import Shuffled, tokenized, with_columns
from rlx.stages.state import changing
from rlx.stages.summary import spent
from rlx.terms import Update
from rlx.types import (
    Component,
    DataRef,
    Derive,
    Failed,
    LossTerm,
    ModelRef,
    Optim,
    Reduce,
    Watch,
)

ABSENT = ("adv", "returns", "fresh", *fields.DRAWN, *fields.PLAYED)


@dataclass(kw_only=True)
class Fit:
    """Steps of `rows_per_step` rows, each epoch in an order that depends on the seed alone; `limit` takes the first rows.

    The rows of a group (a pair, a list) stay together and count as one. `columns` names numeric columns of the data that
    become fields. `policy` and `reference` are short for two of the `models`.

    What frozen models say of a row that is met more than once is kept in the stage's folder (see rlx/stages/frozen.py), or in
    the folder `cache`, for other runs as well: what these add meanwhile may change the last bits of a run that is killed and
    goes on.
    """

    data: DataRef
    loss: list[Component[LossTerm]]
    steps: int
    lr: float
    policy: ModelRef | None = None
    reference: ModelRef | None = None
    models: dict[str, ModelRef | ModelSpec] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    rows_per_step: int = 32
    derive: list[Component[Derive]] = field(default_factory=list)
    reduce: Component[Reduce] = Component("token_mean", reduce.token_mean)
    optim: Component[Optim] = Component("adamw", optim.adamw)
    token_budget: int = 16384
    max_length: int | None = None
    limit: int | None = None
    cache: str | None = None
    watch: list[Component[Watch]] = field(default_factory=list)
    eval: Eval | None = None
    log_every: int = 10
    checkpoint_every: int = 0
    checkpoints: list[str] = field(default_factory=list)

    def specs(self) -> dict[str, ModelSpec]:
        """The models by name, the short forms among them."""
        short = {"policy": as_spec(self.policy)}
        if self.reference is not None:
            short["reference"] = as_spec(self.reference)
        return short | {name: as_spec(given) for name, given in self.models.items()}

    def problems(self, base: frozenset[str] = LANGUAGE) -> list[str]:
        """What is wrong with the settings taken together; `base` are the fields that the recipe's model computes."""
        specs = self.specs()
        found = spec_problems(specs) + fields.taken(self.columns)
        for key in ("policy", "reference"):
            if getattr(self, key) is not None and key in self.models:
                found.append(f"{key}: given twice, here and in models")
        found += fields.problems(
            specs=specs,
            base=base,
            train="policy",
            trained=["policy"],
            loss=self.loss,
            derive=self.derive,
            watch=self.watch,
            absent=ABSENT,
            extra=self.columns,
        )
        return found + [f"eval.{line}" for line in (self.eval.problems() if self.eval is not None else ())]

    def describe(self) -> str:
        """The batch arithmetic in words."""
        return f"{self.steps} optimiser steps of {self.rows_per_step} rows"

    def run(self, ctx: Context) -> dict[str, float]:
        """Train; the last metrics."""
        reads = fields.reads(self.loss, self.watch, self.derive)
        specs = fields.needed(self.specs(), reads, ["policy"], [])
        loaded = ctx.models(specs, ["policy"])
        policy = loaded["policy"]
        update = Update(self.loss, self.reduce, self.watch, token_budget=self.token_budget)
        learner = ctx.learner(policy, self.optim, lr=self.lr, total=self.steps)
        given = with_columns(ctx.data(self.data, self.limit), self.columns, f"stages.{ctx.name}.columns: {self.data}")
        rows = tokenized(given, policy, self.max_length, f"stages.{ctx.name}.data")
        batches = Shuffled(rows, self.rows_per_step, ctx.seeds(), f"stages.{ctx.name}.rows_per_step")
        again = self.cache is not None or self.steps * self.rows_per_step > len(batches.groups)
        folder = Path(self.cache).expanduser() if self.cache is not None else ctx.folder / "cache"
        kept = frozen(specs, loaded, reads, folder, ctx.log.note) if again else []
        ctx.in_training = {"policy": policy}
        ctx.resume({**changing(loaded, specs, ["policy"]), "learner": learner, "rows": batches})
        metrics = progress.before(self, policy, ctx, spent([learner], 0))
        for step in ctx.steps(self.steps, self.checkpoints):
            chosen = next(batches)
            batch = policy.collate(chosen)
            columns(batch, self.columns, chosen)
            for model in kept:
                model.fill(batch, self.token_budget, learner.share)
            fill(batch, reads, loaded, dict.fromkeys(policy.offers, policy), self.token_budget, 1.0, learner.share)
            credit(batch, self.derive, [])
            metrics = learner.step(batch, update, ctx.seeds(step))
            if not metrics:
                raise Failed("no token of this step is trained on: every mask is empty")
            follow(loaded, specs, "policy")
            refresh(loaded, specs, step)
            metrics["tokens"] = float(sum(x.length for x in batch.inputs))
            metrics = progress.after(self, policy, ctx, step, metrics | spent([learner], 0))
        ctx.save(ctx.folder / "out")
        return metrics
