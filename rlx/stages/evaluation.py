"""Evaluation with its own sampling: greedy and sampled rollouts, scored by the verifier, made into numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rlx import world
from rlx.metrics import wilson
from rlx.offload import present
from rlx.rewards.score import begin, pay, show
from rlx.rollout.samplers import plain
from rlx.stages.context import Context
from rlx.stages.drawing import drawing, drawing_problems
from rlx.stages.spread import spread, together
from rlx.types import Component, DataRef, Episode, Metric, Play, Reward, Sampler


@dataclass(kw_only=True)
class Measure:
    """What is measured on held-out tasks, and how the answers are drawn.

    `metrics` that read `sampled` rollouts get `samples` of them a task (default: as many as the largest k asks for), at
    `temperature`, from the `top_k` likeliest tokens (0: all), those that hold `top_p` of the probability, and those at
    least `min_p` times as likely as the likeliest. An answer ends with the token that completes one of the `stop` strings.
    """

    data: DataRef
    metrics: list[Component[Metric]]
    samples: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int | None = None
    limit: int | None = None
    verifier: Component[Reward] | None = None
    sampler: Component[Sampler] = Component("plain", plain)

    def problems(self, base: frozenset[str] = frozenset()) -> list[str]:
        """What is wrong with the settings taken together."""
        found = drawing_problems(self)
        for metric in self.metrics:
            k = int(metric.settings.get("k", 1))
            if metric.reads[0] == "sampled" and self.samples is not None and self.samples < k:
                found.append(f"samples: metric {metric.name!r} needs at least {k} samples of each task, got {self.samples}")
        return found


@dataclass(kw_only=True)
class Eval(Measure):
    """What is measured during training: every `every` steps, and before the first and after the last.

    `patience`: training ends after so many evaluations without a better value of the recipe's objective.
    """

    every: int = 0
    patience: int | None = None

    def due(self, step: int, last: int) -> bool:
        """Whether to evaluate after this step (0: before the first)."""
        return step in (0, last) or (self.every > 0 and step % self.every == 0)


def evaluate(policy: Any, settings: Measure, ctx: Context) -> tuple[dict[str, float], list[list[Episode]]]:
    """The metrics of a policy on held-out tasks, and the greedy (or else sampled) episodes behind them, task by task.

    The draws depend on the run's seed and the task alone, so two policies are compared on the same random numbers.
    """
    rows = ctx.data(settings.data, settings.limit)
    reads = {metric.reads[0] for metric in settings.metrics}
    wanted = [int(m.settings.get("k", 1)) for m in settings.metrics if m.reads[0] == "sampled"]
    num = {"greedy": 1, "sampled": settings.samples or max(wanted, default=1)}
    groups: dict[str, list[list[Episode]]] = {}
    for kind in sorted(reads):
        sampling = drawing(settings, ctx)
        if kind == "greedy":
            sampling = replace(sampling, temperature=0.0)
        told = partial(begin, verified(settings, ctx)[0])
        play = Play(policy, ctx.make_env, sampling, (ctx.seed, 0), ctx.make_vec, ended=told)
        with world.phase("evaluation"):
            one = partial(scored, settings, ctx, play, num[kind])
            episodes = spread(rows, one, together=together(settings.sampler))
        show(episodes, *verified(settings, ctx))
        groups[kind] = [episodes[i : i + num[kind]] for i in range(0, len(episodes), num[kind])]
    values = {m.name: float(m.call(groups[m.reads[0]])) for m in settings.metrics}
    if failures := sum(math.isnan(e.reward) for kind in groups.values() for group in kind for e in group):
        values["failures"] = float(failures)  # episodes that no metric counts
    return values, groups.get("greedy") or groups.get("sampled") or []


def scored(settings: Measure, ctx: Context, play: Play, n: int, rows: list[Episode]) -> list[Episode]:
    """`n` episodes of each row, scored by the verifier."""
    with present():  # what a sampler or a verifier brings itself
        episodes: list[Episode] = settings.sampler.call(play, rows, n)
        pay(episodes, *verified(settings, ctx))
    return episodes


def verified(settings: Measure, ctx: Context) -> tuple[list[Component[Reward]], str]:
    """What says whether an answer is right, as a list of rewards, and the config key that an error of it names."""
    return [settings.verifier or ctx.verifier], f"stages.{ctx.name}.eval.verifier"


def evaluated(policy: Any, settings: Eval, ctx: Context) -> tuple[dict[str, float], list[Episode]]:
    """The metrics under their logged names, and a few episodes to look at."""
    values, groups = evaluate(policy, settings, ctx)
    return {f"eval/{name}": value for name, value in values.items()}, [group[0] for group in groups[:4]]


def num_scored(groups: list[list[Episode]]) -> int:
    """How many tasks have an episode that could be scored."""
    return sum(any(not math.isnan(episode.reward) for episode in group) for group in groups)


def interval(value: float, n: int) -> dict[str, float]:
    """The 95 % Wilson interval of an accuracy over n scored tasks, as keys beside it; (0, 1) where there are none."""
    low, high = wilson(round(value * n) if n else 0, n)
    return {"accuracy/low": low, "accuracy/high": high}
