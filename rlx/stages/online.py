"""`online`: the policy plays, rewards are paid, what is worth it is trained on. Reinforcement learning is this loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rlx import optim, reduce
from rlx.build import LANGUAGE, hint
from rlx.filters import chain
from rlx.learner import TorchLearner, Update
from rlx.rewards.score import score
from rlx.rollout import samplers
from rlx.stages import fields
from rlx.stages.context import Context
from rlx.stages.evaluation import Eval, evaluated
from rlx.stages.fit import shuffled
from rlx.stages.models import ModelSpec, as_spec, refresh, spec_problems, with_models
from rlx.stages.summary import check_gap, mark, spent, summary
from rlx.stages.updates import Buffer, BufferSpec, Trained, UpdateSpec, train
from rlx.types import (
    Advantage,
    Component,
    DataRef,
    Derive,
    Episode,
    Keep,
    LossTerm,
    ModelRef,
    Optim,
    Play,
    Reduce,
    Reward,
    Sampler,
    Sampling,
    Watch,
)


@dataclass(kw_only=True)
class Online:
    """Each step samples `prompts_per_step` x `group_size` episodes and trains on what is kept.

    `loss` and the keys beside it are short for one update of the policy, of `epochs` x `minibatches` optimiser steps;
    `updates` says what is trained in which order where there are several. `policy`, `reference` and `value` are short for
    the models policy, reference and critic. `refill`: how many times new prompts are drawn to make up for groups that
    `keep` dropped. Sampled log-probs are the old policy's: no forward is spent on them, and their gap to the training
    forward is logged.
    """

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
        specs, updates = self.specs(), self.all_updates()
        trained = [update.train for update in updates.values()]
        found = spec_problems(specs) + fields.misnamed(specs, reward=self.reward, keep=self.keep, sampler=[self.sampler])
        if self.updates and self.loss:
            found.append("loss: with `updates`, each update has its own; leave it out")
        for key in ("policy", "reference", "value"):
            if getattr(self, key) is not None and {"value": "critic"}.get(key, key) in self.models:
                found.append(f"{key}: given twice, here and in models")
        for name, update in updates.items():
            at = f"updates.{name}." if name else ""
            if update.train not in specs:
                found.append(f"{at}train: the stage has no model {update.train!r}{hint(update.train, specs)}")
            if update.on not in ("kept", *self.buffers):
                found.append(f"{at}on: no buffer is called {update.on!r}{hint(update.on, ['kept', *self.buffers])}")
            if not update.loss:
                found.append(f"{at}loss: required; a stage without a loss trains nothing")
            if update.lr is None:
                found.append(f"{at}lr: required, not given")
            made = fields.problems(
                specs=specs,
                base=base,
                train=update.train,
                trained=trained,
                loss=update.loss,
                advantage=update.advantage or [],
                derive=update.derive or [],
                watch=update.watch,
                absent=("label",) if update.on == "kept" else (),
                extra=self.columns + streams(self.sampler),
            )
            found += [at + line if at and line.startswith(("loss", "watch")) else line for line in made]
            grouped = [a.name for a in update.advantage or [] if "group" in a.reads]
            if grouped and self.group_size < 2:
                found.append(f"group_size: advantage {grouped[0]!r} compares the samples of a prompt; 2 or more are needed")
        for name, buffer in self.buffers.items():
            if buffer.resample and buffer.resample not in specs:
                found.append(
                    f"buffers.{name}.resample: the stage has no model {buffer.resample!r}{hint(buffer.resample, specs)}"
                )
        found += [f"eval.{line}" for line in (self.eval.problems() if self.eval is not None else ())]
        return list(dict.fromkeys(found))

    def describe(self) -> str:
        """The batch arithmetic in words."""
        episodes = self.prompts_per_step * self.group_size
        updates = sum(u.steps * u.epochs * u.minibatches for u in self.all_updates().values())
        return (
            f"{self.steps} steps of {self.prompts_per_step} prompts x {self.group_size} = {episodes} episodes, "
            f"{updates} optimiser step{'s' if updates > 1 else ''} on each"
        )

    # ----------------------------------------------------------------- the loop
    def run(self, ctx: Context) -> dict[str, float]:
        """Train; the last metrics."""
        trained = [update.train for update in self.all_updates().values()]
        specs = fields.needed(self.specs(), self._reads(), trained, [*self.reward, *self.keep, self.sampler])
        loaded = ctx.models(specs)
        policy = loaded["policy"]
        updates = self.learners(loaded)
        buffers = {name: Buffer(spec) for name, spec in self.buffers.items()}
        prompts = shuffled(ctx.data(self.data), self.prompts_per_step, ctx.seeds(), f"stages.{ctx.name}.prompts_per_step")
        ctx.in_training = {"policy": policy, **{u.spec.train: loaded[u.spec.train] for u in updates}}
        metrics: dict[str, float] = {}
        rollouts = 0
        if self.eval is not None:
            metrics, episodes = evaluated(policy, self.eval, ctx)
            ctx.log.step(0, metrics | spent([u.learner for u in updates], 0), episodes)
            ctx.judge(metrics, self.eval.patience)
        for step in ctx.steps(self.steps, self.checkpoints):
            kept, seen = self.draw(loaded, prompts, buffers, ctx, step)
            metrics = summary(kept, seen)
            rollouts += len(seen)
            for buffer in buffers.values():
                buffer.add(seen)
                buffer.open(loaded, self.sampling(ctx), ctx.seeds(step))
            learned, batch = train(updates, kept, buffers, loaded, specs, ctx, step, self.columns)
            if batch is not None:
                mark(kept, batch)
            check_gap(learned, ctx.name)
            refresh(loaded, specs, step)
            metrics |= learned | {f"buffer/{name}": float(len(b.episodes)) for name, b in buffers.items()}
            metrics |= spent([u.learner for u in updates], rollouts)
            episodes = seen if step % self.samples_every == 0 or step in (1, self.steps) else []
            measured: dict[str, float] = {}
            if self.eval is not None and self.eval.due(step, self.steps):
                measured, _ = evaluated(policy, self.eval, ctx)
                metrics |= measured
                ctx.judge(metrics, self.eval.patience)
            if step % self.log_every == 0 or step == self.steps or measured:
                ctx.log.step(step, metrics, episodes[: 2 * self.group_size])
            if self.checkpoint_every and step % self.checkpoint_every == 0:
                ctx.checkpoint(f"step-{step:06d}")
        ctx.save(ctx.folder / "out")
        return metrics

    def learners(self, loaded: Mapping[str, Any]) -> list[Trained]:
        """An optimiser for each update. The first to train the policy on what was kept compares its log-probs."""
        made: list[Trained] = []
        for name, spec in self.all_updates().items():
            sampled = spec.on == "kept" and spec.train == "policy" and all(t.spec.train != "policy" for t in made)
            update = Update(
                spec.loss,
                spec.reduce or self.reduce,
                spec.watch,
                epochs=spec.epochs,
                minibatches=spec.minibatches,
                token_budget=self.token_budget,
                temperature=self.temperature,
                sampled=sampled,
                grad_variance=self.grad_variance,
            )
            learner = TorchLearner(
                loaded[spec.train], spec.optim or self.optim, lr=spec.lr or 0.0, total=spec.total(self.steps)
            )
            reads = fields.reads(spec.loss, spec.watch, spec.advantage or [], spec.derive or [])
            made.append(Trained(name, spec, learner, update, reads))
        return made

    def _reads(self) -> set[str]:
        return {
            name
            for u in self.all_updates().values()
            for name in fields.reads(u.loss, u.watch, u.advantage or [], u.derive or [])
        }

    def sampling(self, ctx: Context) -> Sampling:
        """How the policy draws."""
        return Sampling(ctx.max_new_tokens(self.max_new_tokens), self.temperature)

    def draw(
        self,
        loaded: Mapping[str, Any],
        prompts: Iterator[list[Episode]],
        buffers: Mapping[str, Buffer],
        ctx: Context,
        step: int,
    ) -> tuple[list[Episode], list[Episode]]:
        """Sample, score and filter; with `refill`, again until `prompts_per_step` groups are kept or the tries are spent."""
        rewards = [with_models(r, loaded) for r in self.reward]
        keep = [with_models(k, loaded) for k in self.keep]
        sampler = with_models(self.sampler, loaded)
        pay = partial(score, rewards=rewards, where=f"stages.{ctx.name}.reward")
        kept: list[Episode] = []
        seen: list[Episode] = []
        for attempt in range(1 + self.refill):
            play = Play(
                policy=loaded["policy"],
                make_env=ctx.make_env,
                sampling=self.sampling(ctx),
                seed=ctx.seeds(step, attempt),
                make_vec=ctx.make_vec,
                models=loaded,
                score=pay,
                pools={name: buffer.episodes for name, buffer in buffers.items()},
                step=step,
            )
            played = sampler.call(play, next(prompts), self.group_size)
            pay(played)
            seen += played
            have = {e.group for e in kept}
            scored = [e for e in played if not math.isnan(e.reward) and e.num_tokens and e.group not in have]
            kept += chain(scored, keep)
            if len({e.group for e in kept}) >= self.prompts_per_step:
                break
        if self.refill:
            groups = set(list(dict.fromkeys(e.group for e in kept))[: self.prompts_per_step])
            kept = [e for e in kept if e.group in groups]
        return kept, seen


def streams(sampler: Component[Sampler]) -> list[str]:
    """The fields that a sampler's turns carry besides (`Turn.token`), as its function's attribute `streams` says."""
    return list(getattr(getattr(sampler.call, "func", sampler.call), "streams", ()))
