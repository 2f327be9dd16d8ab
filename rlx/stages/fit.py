"""`fit`: train on given rows (SFT here): shuffle, tokenize, collate, step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from rlx import optim, reduce
from rlx.learner import TorchLearner, Update, score
from rlx.stages.context import Context
from rlx.stages.evaluation import Eval, evaluate
from rlx.stages.fields import problems, reads
from rlx.types import (
    Component,
    ConfigError,
    DataError,
    DataRef,
    Episode,
    LossTerm,
    ModelRef,
    Optim,
    Policy,
    Reduce,
    Watch,
)


@dataclass(kw_only=True)
class Fit:
    """Steps of `rows_per_step` rows, each epoch in an order that depends on the seed alone; `limit` takes the first rows."""

    data: DataRef
    loss: list[Component[LossTerm]]
    steps: int
    lr: float
    policy: ModelRef | None = None
    reference: ModelRef | None = None
    rows_per_step: int = 32
    reduce: Component[Reduce] = Component("token_mean", reduce.token_mean)
    optim: Component[Optim] = Component("adamw", optim.adamw)
    token_budget: int = 16384
    max_length: int | None = None
    limit: int | None = None
    watch: list[Component[Watch]] = field(default_factory=list)
    eval: Eval | None = None
    log_every: int = 10
    checkpoint_every: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the settings taken together."""
        absent = ("adv", "reward", "ret", "old_logp", "rollout_logp")
        found = problems(loss=self.loss, watch=self.watch, reference=self.reference, absent=absent)
        return found + [f"eval.{line}" for line in (self.eval.problems() if self.eval is not None else ())]

    def describe(self) -> str:
        """The batch arithmetic in words."""
        return f"{self.steps} optimiser steps of {self.rows_per_step} rows"

    def run(self, ctx: Context) -> dict[str, float]:
        """Train; the last metrics."""
        policy = ctx.policy(self.policy)
        reference = ctx.policy(self.reference) if "ref_logp" in reads(self.loss, self.watch) else None
        update = Update(self.loss, self.reduce, self.watch, token_budget=self.token_budget)
        learner = TorchLearner(policy, self.optim, lr=self.lr, total=self.steps)
        rows = tokenized(ctx.data(self.data, self.limit), policy, self.max_length, f"stages.{ctx.name}.data")
        batches = shuffled(rows, self.rows_per_step, ctx.seeds(), f"stages.{ctx.name}.rows_per_step")
        metrics: dict[str, float] = {}
        if self.eval is not None:
            metrics, episodes = evaluated(policy, self.eval, ctx)
            ctx.log.step(0, metrics | spent(learner, 0), episodes)
            ctx.judge(metrics, policy, self.eval.patience)
        for step in ctx.steps(self.steps, policy):
            batch = policy.collate(next(batches))
            if reference is not None:
                batch["ref_logp"] = score(reference, batch, self.token_budget, 1.0)
            metrics = learner.step(batch, update, ctx.seeds(step))
            metrics["tokens"] = float(sum(len(row) for row in batch.rows))
            metrics |= spent(learner, 0)
            episodes = []
            if self.eval is not None and self.eval.due(step, self.steps):
                measured, episodes = evaluated(policy, self.eval, ctx)
                metrics |= measured
                ctx.judge(metrics, policy, self.eval.patience)
            if step % self.log_every == 0 or step == self.steps or episodes:
                ctx.log.step(step, metrics, episodes)
            if self.checkpoint_every and step % self.checkpoint_every == 0:
                ctx.checkpoint(f"step-{step:06d}", policy)
        policy.save(ctx.folder / "out")
        return metrics


def tokenized(rows: list[Episode], policy: Policy, max_length: int | None, where: str) -> list[Episode]:
    """Rows with tokens; those with nothing to train on, or longer than `max_length`, are left out and counted.

    Raises DataError where no row is left: a data set whose mask is empty would train on a loss of 0.
    """
    if not any(row.turns for row in rows):
        raise DataError(f"{where}: its rows are prompts alone; to fit it needs completions, messages or pairs")
    made = [policy.tokenize(row) for row in rows]
    trained = [row for row in made if row.num_tokens]
    if not trained:
        raise DataError(
            f"{where}: no token of its {len(rows)} rows is trained on: the chat template marks no assistant text "
            "(see `rlx data show`)"
        )
    fits = [r for r in trained if not max_length or sum(len(t.seen) + len(t.did) for t in r.turns) <= max_length]
    if not fits:
        raise DataError(f"{where}: every row is longer than max_length={max_length} tokens")
    if len(fits) < len(rows):
        print(
            f"{where}: {len(rows) - len(trained)} rows without a trained token and {len(trained) - len(fits)} longer "
            f"than max_length are left out of {len(rows)}"
        )
    return fits


def shuffled(rows: list[Episode], size: int, seed: tuple[int, ...], where: str) -> Iterator[list[Episode]]:
    """Endless batches of `size` rows: epoch after epoch, each a new permutation; no row stands twice in a batch.

    Raises ConfigError where there are fewer rows than a batch takes; `where` is the key that says how many.
    """
    if size > len(rows):
        raise ConfigError(f"{where}: {size} asked for, but the data has {len(rows)} rows")
    waiting: list[int] = []
    for epoch in itertools.count():
        order = np.random.default_rng((*seed, epoch)).permutation(len(rows)).tolist()
        left = set(waiting)  # of the last epoch: its repetitions go to the end of this one
        waiting += [i for i in order if i not in left] + [i for i in order if i in left]
        while len(waiting) >= size:
            yield [rows[i] for i in waiting[:size]]
            waiting = waiting[size:]


def evaluated(policy: Policy, settings: Eval, ctx: Context) -> tuple[dict[str, float], list[Episode]]:
    """The metrics under their logged names, and a few episodes to look at."""
    values, groups = evaluate(policy, settings, ctx)
    return {f"eval/{name}": value for name, value in values.items()}, [group[0] for group in groups[:4]]


def spent(learner: TorchLearner, rollouts: int) -> dict[str, float]:
    """What the stage has used so far: optimiser steps, sampled episodes, and tokens trained on (each epoch counts)."""
    return {
        "spent/updates": float(learner.steps),
        "spent/rollouts": float(rollouts),
        "spent/tokens": float(learner.tokens),
    }
