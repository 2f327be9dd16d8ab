"""`online`: the policy plays, rewards are paid, what is worth it is trained on. Reinforcement learning is this loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from rlx import optim, reduce
from rlx.build import LANGUAGE
from rlx.rollout import samplers
from rlx.stages import fields, progress
from rlx.stages.buffers import BufferSpec, begun
from rlx.stages.context import Context
from rlx.stages.draw import draw, sampling
from rlx.stages.evaluation import Eval
from rlx.stages.models import ModelSpec, as_spec, refresh
from rlx.stages.problems import online_problems
from rlx.stages.rows import Shuffled, with_columns
from rlx.stages.state import changing
from rlx.stages.summary import check_gap, mark, spent, summary
from rlx.stages.updates import UpdateSpec, learners, train
from rlx.types import (
    Advantage,
    Component,
    DataRef,
    Derive,
    Keep,
    LossTerm,
    ModelRef,
    Optim,
    Reduce,
    Reward,
    Sampler,
    Watch,
)


@dataclass(kw_only=True)
class Online:
    """Each step samples `prompts_per_step` x `group_size` episodes and trains on what is kept.

    `loss` and the keys beside it are short for one update of the policy, of `epochs` x `minibatches` optimiser steps;
    `updates` says what is trained in which order where there are several. `policy`, `reference` and `value` are short for
    the models policy, reference and critic. `refill`: how many times new prompts are drawn to make up for groups that
    `keep` dropped. A turn ends with the token that completes one of the `stop` strings. Sampled log-probs are the old
    policy's: no forward is spent on them, and their gap to the training forward is logged.
    """

    gives_models_to: ClassVar[tuple[str, ...]] = ("reward", "keep", "sampler")

    data: DataRef
    reward: list[Component[Reward]]
    steps: int
    prompts_per_step: int
    group_size: int
    loss: list[Component[LossTerm]] = field(default_factory=list)
    lr: float | None = None
    advantage: list[Component[Advantage]] = field(default_factory=list)
    policy: ModelRef | None = None
    reference: ModelRef | None = None
    value: ModelRef | None = None
    models: dict[str, ModelRef | ModelSpec] = field(default_factory=dict)
    updates: dict[str, UpdateSpec] = field(default_factory=dict)
    buffers: dict[str, BufferSpec] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    sampler: Component[Sampler] = Component("plain", samplers.plain)
    keep: list[Component[Keep]] = field(default_factory=list)
    refill: int = 0
    derive: list[Component[Derive]] = field(default_factory=list)
    reduce: Component[Reduce] = Component("token_mean", reduce.token_mean)
    optim: Component[Optim] = Component("adamw", optim.adamw)
    epochs: int = 1
    minibatches: int = 1
    temperature: float = 1.0
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int | None = None
    token_budget: int = 16384
    watch: list[Component[Watch]] = field(default_factory=list)
    grad_variance: bool = False
    eval: Eval | None = None
    log_every: int = 1
    samples_every: int = 10
    checkpoint_every: int = 0
    checkpoints: list[str] = field(default_factory=list)

    # ----------------------------------------------------------------- what the settings mean
    def specs(self) -> dict[str, ModelSpec]:
        """The models by name, the short forms among them."""
        short = {"policy": as_spec(self.policy)}
        if self.reference is not None:
            short["reference"] = as_spec(self.reference)
        if self.value is not None:
            short["critic"] = ModelSpec(from_=self.value, heads={"value": "token"})
        return short | {name: as_spec(given) for name, given in self.models.items()}

    def all_updates(self) -> dict[str, UpdateSpec]:
        """The updates by name, with what they leave out taken from the stage; the stage's own has no name."""
        one = UpdateSpec(loss=self.loss, epochs=self.epochs, minibatches=self.minibatches, watch=self.watch)
        return {name: self._complete(update) for name, update in (self.updates or {"": one}).items()}

    def _complete(self, update: UpdateSpec) -> UpdateSpec:
        own = {k: getattr(self, k) for k in ("lr", "optim", "reduce", "advantage", "derive") if getattr(update, k) is None}
        return replace(update, **own)

    def problems(self, base: frozenset[str] = LANGUAGE) -> list[str]:
        """What is wrong with the settings taken together; `base` are the fields that the recipe's model computes."""
        return online_problems(self, base)

    def describe(self) -> str:
        """The batch arithmetic in words."""
        episodes = self.prompts_per_step * self.group_size
        updates = sum(u.steps * u.epochs * u.minibatches for u in self.all_updates().values())
        return (
            f"{self.steps} steps of {self.prompts_per_step} prompts x {self.group_size} = {episodes} episodes, "
            f"{updates} optimiser step{'s' if updates > 1 else ''} on each"
        )

    def needed(self) -> dict[str, ModelSpec]:
        """The models that have to be loaded."""
        updates = self.all_updates().values()
        wanted = {name for update in updates for name in update.reads}
        return fields.needed(self.specs(), wanted, [u.train for u in updates], [*self.reward, *self.keep, self.sampler])

    # ----------------------------------------------------------------- the loop
    def run(self, ctx: Context) -> dict[str, float]:
        """Train; the last metrics."""
        specs = self.needed()
        loaded = ctx.models(specs, [u.train for u in self.all_updates().values()])
        policy = loaded["policy"]
        updates = learners(self, self.all_updates(), loaded, ctx.learner)
        buffers = begun(self.buffers, [u.spec.on for u in updates], policy, ctx)
        rows = with_columns(ctx.data(self.data), self.columns, f"stages.{ctx.name}.columns: {self.data}")
        prompts = Shuffled(rows, self.prompts_per_step, ctx.seeds(), f"stages.{ctx.name}.prompts_per_step")
        ctx.in_training = {"policy": policy, **{u.spec.train: loaded[u.spec.train] for u in updates}}
        ctx.buffers = {name: buffer.episodes for name, buffer in buffers.items() if buffer.spec.save}
        taught = {f"updates/{u.name}": u.learner for u in updates}
        stored = {f"buffers/{name}": buffer for name, buffer in buffers.items()}
        ctx.resume({**changing(loaded, specs, ctx.in_training), **taught, **stored, "prompts": prompts})
        metrics = progress.before(self, policy, ctx, spent(taught.values(), ctx.rollouts))
        for step in ctx.steps(self.steps, self.checkpoints):
            kept, seen = draw(self, loaded, prompts, buffers, ctx, step)
            metrics = summary(kept, seen)
            ctx.rollouts += len(seen)
            for i, buffer in enumerate(buffers.values()):
                buffer.add(seen)
                buffer.open(loaded, sampling(self, ctx), ctx.seeds(step, i))
            learned, batch = train(updates, kept, buffers, loaded, specs, ctx, step, self.columns)
            if batch is not None:
                mark(kept, batch)
            check_gap(learned, ctx.name)
            refresh(loaded, specs, step)
            sizes = {f"buffer/{name}": float(len(b.episodes)) for name, b in buffers.items()}
            shown = seen[: 2 * self.group_size] if step % self.samples_every == 0 or step in (1, self.steps) else []
            metrics |= learned | sizes | spent(taught.values(), ctx.rollouts)
            metrics = progress.after(self, policy, ctx, step, metrics, shown)
        ctx.save(ctx.folder / "out")
        return metrics
