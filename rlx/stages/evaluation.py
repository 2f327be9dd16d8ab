"""Evaluation with its own sampling: greedy and sampled rollouts, scored by the verifier, made into numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlx.metrics import wilson
from rlx.rewards.score import score
from rlx.rollout.samplers import plain
from rlx.stages.context import Context
from rlx.types import Component, DataRef, Episode, Metric, Policy, Reward, Sampling


@dataclass(kw_only=True)
class Eval:
    """What is measured during training: every `every` steps, and before the first and after the last.

    `metrics` that read `sampled` rollouts get `samples` of them a task (default: as many as the largest k asks for).
    """

    data: DataRef
    metrics: list[Component[Metric]]
    every: int = 0
    samples: int | None = None
    temperature: float = 1.0
    max_new_tokens: int | None = None
    limit: int | None = None
    patience: int | None = None
    verifier: Component[Reward] | None = None

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after this step (0: before the first)."""
        return step in (0, last) or (self.every > 0 and step % self.every == 0)


def evaluate(policy: Policy, settings: Eval, ctx: Context) -> tuple[dict[str, float], list[Episode]]:
    """The metrics of a policy on held-out tasks, and the greedy (or else sampled) episodes behind them.

    The draws depend on the run's seed and the task alone, so two policies are compared on the same random numbers.
    """
    rows = ctx.data(settings.data, settings.limit)
    reads = {metric.reads[0] for metric in settings.metrics}
    wanted = [int(m.settings.get("k", 1)) for m in settings.metrics if m.reads[0] == "sampled"]
    num = {"greedy": 1, "sampled": settings.samples or max(wanted, default=1)}
    groups: dict[str, list[list[Episode]]] = {}
    for kind in sorted(reads):
        sampling = Sampling(
            max_new_tokens=ctx.max_new_tokens(settings.max_new_tokens),
            temperature=0.0 if kind == "greedy" else settings.temperature,
        )
        episodes = plain(policy, ctx.make_env, rows, num[kind], sampling, (ctx.seed, 0))
        score(episodes, [settings.verifier or ctx.verifier], f"stages.{ctx.name}.eval.verifier")
        groups[kind] = [episodes[i : i + num[kind]] for i in range(0, len(episodes), num[kind])]
    values = {m.name: float(m.call(groups[m.reads[0]])) for m in settings.metrics}
    shown = groups.get("greedy") or groups.get("sampled") or []
    return values, [group[0] for group in shown]


def interval(value: float, n: int) -> dict[str, Any]:
    """The 95 % Wilson interval of an accuracy over n tasks, as keys beside it."""
    low, high = wilson(round(value * n), n)
    return {"accuracy/low": low, "accuracy/high": high}
