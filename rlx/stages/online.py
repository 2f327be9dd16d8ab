"""`online`: the policy plays, rewards are paid, what is worth it is trained on. The whole of on-policy RL is this loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlx import optim, reduce
from rlx.learner import TorchLearner, Update, score
from rlx.rewards.score import score as pay
from rlx.rollout import samplers
from rlx.stages.context import Context
from rlx.stages.evaluation import Eval
from rlx.stages.fields import problems, reads
from rlx.stages.fit import evaluated, shuffled, spent
from rlx.tensors import seq_sum
from rlx.types import (
    Advantage,
    Batch,
    Component,
    DataRef,
    Derive,
    Episode,
    Keep,
    LossTerm,
    ModelRef,
    Optim,
    Policy,
    Reduce,
    Reward,
    Sampler,
    Sampling,
    Status,
    Watch,
)

# With more than this (nats a token, in the mean) between the sampled log-probs and the first training forward, the two
# are not the same policy; bfloat16 alone makes about 0.01.
LARGEST_GAP = 0.1


@dataclass(kw_only=True)
class Online:
    """Each step samples `prompts_per_step` x `group_size` episodes and trains `epochs` x `minibatches` times on what is kept.

    `refill`: how many times new prompts are drawn to make up for groups that `keep` dropped. Sampled log-probs are the old
    policy's: no forward is spent on them, and their gap to the training forward is logged.
    """

    data: DataRef
    reward: list[Component[Reward]]
    loss: list[Component[LossTerm]]
    steps: int
    lr: float
    prompts_per_step: int
    group_size: int
    advantage: list[Component[Advantage]] = field(default_factory=list)
    policy: ModelRef | None = None
    reference: ModelRef | None = None
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

    def problems(self) -> list[str]:
        """What is wrong with the settings taken together."""
        found = problems(
            loss=self.loss,
            advantage=self.advantage,
            derive=self.derive,
            watch=self.watch,
            reference=self.reference,
            absent=("label",),
        )
        grouped = [a.name for a in self.advantage if "group" in a.reads]
        if grouped and self.group_size < 2:
            found.append(f"group_size: advantage {grouped[0]!r} compares the samples of a prompt; 2 or more are needed")
        return found + [f"eval.{line}" for line in (self.eval.problems() if self.eval is not None else ())]

    def describe(self) -> str:
        """The batch arithmetic in words."""
        episodes, updates = self.prompts_per_step * self.group_size, self.epochs * self.minibatches
        return (
            f"{self.steps} steps of {self.prompts_per_step} prompts x {self.group_size} = {episodes} episodes, "
            f"{updates} optimiser step{'s' if updates > 1 else ''} on each"
        )

    def run(self, ctx: Context) -> dict[str, float]:
        """Train; the last metrics."""
        policy = ctx.policy(self.policy)
        wants = reads(self.loss, self.advantage, self.derive, self.watch)
        reference = ctx.policy(self.reference) if "ref_logp" in wants else None
        update = Update(
            self.loss,
            self.reduce,
            self.watch,
            epochs=self.epochs,
            minibatches=self.minibatches,
            token_budget=self.token_budget,
            temperature=self.temperature,
            sampled=True,
            grad_variance=self.grad_variance,
        )
        total = self.steps * self.epochs * self.minibatches
        learner = TorchLearner(policy, self.optim, lr=self.lr, total=total)
        prompts = shuffled(ctx.data(self.data), self.prompts_per_step, ctx.seeds(), f"stages.{ctx.name}.prompts_per_step")
        metrics: dict[str, float] = {}
        rollouts = 0
        if self.eval is not None:
            metrics, episodes = evaluated(policy, self.eval, ctx)
            ctx.log.step(0, metrics | spent(learner, 0), episodes)
            ctx.judge(metrics, policy, self.eval.patience)
        for step in ctx.steps(self.steps, policy):
            kept, seen = self.draw(policy, prompts, ctx, step)
            metrics = summary(kept, seen)
            rollouts += len(seen)
            if kept:
                batch = policy.collate(kept)
                batch["old_logp"] = batch["rollout_logp"]
                if reference is not None:
                    batch["ref_logp"] = score(reference, batch, self.token_budget, self.temperature)
                credit(batch, self.derive, self.advantage)
                mark(kept, batch)
                metrics |= learner.step(batch, update, ctx.seeds(step))
                check_gap(metrics, ctx.name)
            metrics |= spent(learner, rollouts)
            episodes = seen if step % self.samples_every == 0 or step in (1, self.steps) else []
            measured: dict[str, float] = {}
            if self.eval is not None and self.eval.due(step, self.steps):
                measured, _ = evaluated(policy, self.eval, ctx)
                metrics |= measured
                ctx.judge(metrics, policy, self.eval.patience)
            if step % self.log_every == 0 or step == self.steps or measured:
                ctx.log.step(step, metrics, episodes[: 2 * self.group_size])
            if self.checkpoint_every and step % self.checkpoint_every == 0:
                ctx.checkpoint(f"step-{step:06d}", policy)
        policy.save(ctx.folder / "out")
        return metrics

    def draw(
        self, policy: Policy, prompts: Iterator[list[Episode]], ctx: Context, step: int
    ) -> tuple[list[Episode], list[Episode]]:
        """Sample, score and filter; with `refill`, again until `prompts_per_step` groups are kept or the tries are spent."""
        sampling = Sampling(ctx.max_new_tokens(self.max_new_tokens), self.temperature)
        kept: list[Episode] = []
        seen: list[Episode] = []
        for attempt in range(1 + self.refill):
            played = self.sampler.call(policy, ctx.make_env, next(prompts), self.group_size, sampling, ctx.seeds(step, attempt))
            pay(played, self.reward, f"stages.{ctx.name}.reward")
            seen += played
            have = {e.group for e in kept}
            chosen = [e for e in played if not math.isnan(e.reward) and e.num_tokens and e.group not in have]
            for keep in self.keep:
                chosen = keep.call(chosen)
            kept += chosen
            if len({e.group for e in kept}) >= self.prompts_per_step:
                break
        groups = list(dict.fromkeys(e.group for e in kept))[: self.prompts_per_step]
        return [e for e in kept if e.group in set(groups)], seen


def credit(batch: Batch, derive: list[Component[Derive]], advantage: list[Component[Advantage]]) -> None:
    """Run the derives in order, then the advantages (a weighted sum), on the whole batch."""
    for d in derive:
        value = d.call(*(batch[name] for name in d.reads))
        batch[d.into] = batch[d.into] + value if d.add else value
        if d.into == "reward":  # what is paid along the way is part of the total
            batch["ret"] = seq_sum(batch["reward"], batch["mask"])
    if advantage:
        parts = [a.weight * a.call(*(batch[name] for name in a.reads)) for a in advantage]
        batch["adv"] = sum(parts[1:], parts[0])


def mark(kept: list[Episode], batch: Batch) -> None:
    """Write each episode's mean advantage into its info, for the samples that are shown."""
    if "adv" in batch:
        means = (batch["adv"] * batch["mask"]).sum(1) / batch["mask"].sum(1).clamp(min=1)
        for episode, value in zip(kept, means.tolist(), strict=True):
            episode.info["advantage"] = value


def check_gap(metrics: dict[str, float], stage: str) -> None:
    """Stop where the tokens were not sampled from the policy that is trained."""
    if metrics.get("gap/mean", 0.0) > LARGEST_GAP:
        raise RuntimeError(
            f"stages.{stage}: sampled log-probs differ from the training forward by {metrics['gap/mean']:.3g} nats a token: "
            "the rollout engine and the learner do not compute the same policy"
        )


def summary(kept: list[Episode], seen: list[Episode]) -> dict[str, float]:
    """What happened in the rollouts of one step, as numbers."""
    scored = [e for e in seen if not math.isnan(e.reward)]
    mean = {f"reward/{name}": average([e.rewards[name] for e in scored]) for name in (scored[0].rewards if scored else ())}
    return {
        "reward": average([e.reward for e in scored]),
        **mean,
        "reward/failures": float(len(seen) - len(scored)),
        "length": average([float(e.num_tokens) for e in seen]),
        "truncated": average([float(e.status is Status.TRUNCATED) for e in seen]),
        "groups/no_signal": no_signal(scored),
        "groups/trained_no_signal": no_signal(kept),
        "episodes": float(len(seen)),
        "kept": len(kept) / max(1, len(seen)),
        "tokens": float(sum(e.num_tokens for e in seen)),
    }


def no_signal(episodes: list[Episode]) -> float:
    """The share of groups whose rewards are all equal."""
    groups = [list(g) for _, g in itertools.groupby(episodes, key=lambda e: e.group)]
    return average([float(len({e.reward for e in g}) == 1) for g in groups])


def average(values: list[float]) -> float:
    """The mean, nan where there is nothing."""
    return sum(values) / len(values) if values else float("nan")
