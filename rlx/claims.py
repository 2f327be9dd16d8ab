"""A paper's claim as data: arms, checks and the rule that turns paired differences over seeds into a verdict."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlx.build import Binder, hint
from rlx.report.read import Run, lower_is_better, rows, series
from rlx.types import ConfigError
from rlx.unroll import unrolled

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]
EXIT_STATUS: dict[str, int] = {"reproduced": 0, "not reproduced": 3, "inconclusive": 4}
METHOD = "method"
MINUTES, MOST_MINUTES = 20, 120  # of a claim on two cores: the default budget, and the most that a recipe may ask for
AT = ("first", "last", "best", "head", "tail", "mean", "growth")
REACH = re.compile(r"reach@(-?\d+(?:\.\d+)?)")


@dataclass(kw_only=True)
class Check:
    """`metric` of `arm` minus `times` that of `minus`, paired by seed, held against `min` or `max`.

    `less`: another metric of the same run, taken off on both sides: what noise costs is `metric: test/x, less: noisy/x`.

    `at`: first or last value of the curve, its best, its mean, the mean over its first (head) or last (tail) tenth, tail minus
    head (growth), or the step at which it first is as good as a level (reach@0.8; infinite where it never is). `minus_metric`
    and `minus_at` default to `metric` and `at`. Without `minus` the value itself is held against the bound. "At most half of
    the control's" is `times: 0.5, max: 0`.
    """

    metric: str
    less: str | None = None
    at: str = "last"
    arm: str = METHOD
    minus: str | None = None
    minus_metric: str | None = None
    minus_at: str | None = None
    times: float = 1.0
    min: float | None = None
    max: float | None = None

    def __str__(self) -> str:
        metric = self.metric if self.less is None else f"{self.metric} less {self.less}"
        text = f"{metric} ({self.at}) of {self.arm}"
        if self.minus is not None:
            other = (
                ""
                if self.minus_metric is None and self.minus_at is None
                else (f"{self.minus_metric or self.metric} ({self.minus_at or self.at}) of ")
            )
            text += f" minus {'' if self.times == 1.0 else f'{self.times:g} x '}{other}{self.minus}"
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.min), ("<=", self.max)) if bound is not None]
        return f"{text} {' and '.join(bounds)}"


@dataclass(kw_only=True)
class Shown:
    """A further column of the result's table."""

    metric: str
    at: str = "last"


@dataclass(kw_only=True)
class Claim:
    """`claim:` of a recipe. `arms` maps a control's name to what it changes; `common` is changed in every arm, method too.

    `equal`: what the arms share besides initial weights, data order and prompts. `tune`: values tried for every arm alike, on
    `tune_seeds`, by the recipe's objective. `show`: further metrics of the table. `minutes`: budget on two cores.
    """

    says: str
    checks: list[Check]
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    equal: Literal["steps", "rollouts", "tokens", "none"] = "steps"
    tune: dict[str, list[Any]] = field(default_factory=dict)
    tune_seeds: list[int] = field(default_factory=lambda: [1000])
    show: list[Shown] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_seeds: int = 10
    minutes: int = MINUTES
    margins: str = ""

    @property
    def names(self) -> list[str]:
        """The method and its controls."""
        return [METHOD, *self.arms]

    @property
    def metrics(self) -> list[str]:
        """Every metric that a check or the table needs."""
        checked = [m for c in self.checks for m in (c.metric, c.less, c.minus_metric) if m]
        return list(dict.fromkeys([*checked, *(s.metric for s in self.show)]))

    def read_of(self, arm: str) -> list[str]:
        """The metrics that the checks read of one arm; of the method also those that are shown."""
        checked = [c.metric for c in self.checks if c.arm == arm]
        minus = [c.minus_metric or c.metric for c in self.checks if c.minus == arm]
        less = [c.less for c in self.checks if c.less is not None and arm in (c.arm, c.minus)]
        return list(dict.fromkeys([*checked, *minus, *less, *(s.metric for s in self.show if arm == METHOD)]))

    @property
    def columns(self) -> list[tuple[str, str]]:
        """The columns of the result's table: what is checked, then what is shown."""
        checked = [(m, c.at) for c in self.checks for m in (c.metric, c.less) if m]
        return list(dict.fromkeys([*checked, *((s.metric, s.at) for s in self.show)]))

    def settings(self) -> list[dict[str, Any]]:
        """The grid of `tune`."""
        return [dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]


def claim_of(config: Mapping[str, Any]) -> Claim:
    """The claim of a composed recipe. Raises ConfigError where there is none or it is wrong."""
    if not config.get("claim"):
        raise ConfigError(f"recipe {config['recipe']!r} makes no claim (it has no `claim:`); see docs/writing_a_recipe.md")
    claim, wrong = read_claim(config)
    if wrong or claim is None:
        raise ConfigError("\n".join(wrong))
    return claim


def read_claim(config: Mapping[str, Any]) -> tuple[Claim | None, list[str]]:
    """The claim of a recipe that makes one, None where its keys do not bind; and all that is wrong with it by itself."""
    binder = Binder()
    claim: Claim | None = binder.record(Claim, "a claim", config["claim"], "claim")
    if claim is not None:
        known = set(claim.names)
        if not claim.checks:
            binder.errors.append("claim.checks: at least one is needed to decide anything")
        if METHOD in claim.arms:
            binder.errors.append(f"claim.arms.{METHOD}: is the recipe itself; give the control another name")
        binder.errors += [f"claim.tune.{key}: no value to try" for key, values in claim.tune.items() if not values]
        for i, check in enumerate(claim.checks):
            for arm in (check.arm, check.minus):
                if arm is not None and arm not in known:
                    binder.errors.append(f"claim.checks.{i}: no arm {arm!r}{hint(arm, claim.names)}")
            if check.min is None and check.max is None:
                binder.errors.append(f"claim.checks.{i}: needs min or max")
        marks = [(f"checks.{i}.{key}", getattr(c, key)) for i, c in enumerate(claim.checks) for key in ("at", "minus_at")]
        for key, at in [*marks, *((f"show.{i}.at", shown.at) for i, shown in enumerate(claim.show))]:
            if at is not None and at not in AT and not REACH.fullmatch(at):
                binder.errors.append(f"claim.{key}: {at!r} is not one of {', '.join(AT)}, reach@LEVEL")
        present = [name for name, stage in unrolled(config.get("stages", {}), Binder()).items() if stage is not None]
        added = {path.split(".")[1] for path in claim.common if path.startswith("stages.")}
        for metric in claim.metrics:
            if metric.partition("/")[0] not in {*present, *added}:
                binder.errors.append(f"claim: metric {metric!r} names no stage of the recipe")
        binder.errors += [f"claim.seeds: {line}" for line in seed_problems(claim, claim.seeds)]
        if claim.minutes > MOST_MINUTES:
            binder.errors.append(f"claim.minutes: at most {MOST_MINUTES}, got {claim.minutes}")
    return claim, binder.errors


def seed_problems(claim: Claim, seeds: Sequence[int]) -> list[str]:
    """Why seeds are none to decide a claim on: too few, repeated, or those that its arms were tuned on."""
    found = []
    if len(set(seeds)) < 3:
        found.append(f"at least 3 different ones are run, got {list(seeds)}")
    if both := sorted(set(seeds) & set(claim.tune_seeds)):
        found.append(f"{both} are the seeds that the arms are tuned on; take others")
    return found


def value_at(run: Run, metric: str, at: str) -> float:
    """One number of one run's curve; nan where it has none there, or the run has no such metric."""
    curve = rows(run, metric)
    if not curve:
        return math.nan
    if level := REACH.fullmatch(at):
        return reached(run, metric, float(level.group(1)))
    tenth = max(1, math.ceil(len(curve) / 10))
    head, tail = fmean(curve[:tenth]), fmean(curve[-tenth:])
    best = min if lower_is_better(metric) else max
    finite = [v for v in curve if not math.isnan(v)]
    pick = {"first": curve[0], "last": curve[-1], "mean": fmean(curve), "head": head, "tail": tail, "growth": tail - head}
    return pick[at] if at != "best" else best(finite, default=math.nan)


def gap(run: Run, metric: str, less: str | None, at: str) -> float:
    """A metric of a run, or how far it is above another one."""
    return value_at(run, metric, at) - (0.0 if less is None else value_at(run, less, at))


def reached(run: Run, metric: str, level: float) -> float:
    """The step at which a curve first is as good as `level`; infinite where it never is, nan where there is no curve."""
    stage, _, key = metric.partition("/")
    sign = -1.0 if lower_is_better(metric) else 1.0
    for steps, curve in (series(log, key) for log in run.stages if log.name == stage):
        return next(
            (step for step, value in zip(steps, curve, strict=True) if sign * value >= sign * level),
            math.inf if steps else math.nan,
        )
    return math.nan


@dataclass(frozen=True)
class Outcome:
    """One check over seeds, in the order of the seeds: `values` are held against the bound, their mean decides (each of them,
    where one is infinite).

    `paired` are the plain differences between the two arms (empty without `minus`).
    """

    check: Check
    values: list[float]
    paired: list[float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return average(self.values)

    @property
    def in_the_mean(self) -> bool:
        """The bound holds for the mean over seeds; on each seed, where one is infinite and would decide for the others."""
        decide = self.values if any(map(math.isinf, self.values)) else [self.mean]
        return all(holds(v, self.check.min, self.check.max) for v in decide)

    @property
    def on_each_seed(self) -> bool:
        """The paired difference has the claimed sign on every seed.

        A bound that allows either sign ("not lower by more than 0.02", "within 1.5 times") claims none, and is held in the
        mean alone.
        """
        check = self.check
        low = 0.0 if check.min is not None and check.min >= 0 and check.times >= 1 else None
        high = 0.0 if check.max is not None and check.max <= 0 and check.times <= 1 else None
        return all(holds(v, low, high) for v in self.paired)


def outcomes(claim: Claim, runs: Mapping[tuple[str, int], Run], seeds: Sequence[int]) -> list[Outcome]:
    """Each check on each seed, arms paired by seed."""
    out = []
    for check in claim.checks:
        values, paired = [], []
        for seed in seeds:
            value = gap(runs[check.arm, seed], check.metric, check.less, check.at)
            if check.minus is None:
                values.append(value)
                continue
            metric, at = check.minus_metric or check.metric, check.minus_at or check.at
            other = gap(runs[check.minus, seed], metric, check.less, at)
            values.append(beyond(value, check.times * other, check))
            paired.append(beyond(value, other, check))
        out.append(Outcome(check, values, paired))
    return out


def beyond(value: float, other: float, check: Check) -> float:
    """value - other; where both are infinite, because neither arm gets there, the infinity that is outside the bound."""
    neither = math.isinf(value) and math.isinf(other)
    return (math.inf if check.max is not None else -math.inf) if neither else value - other


def average(values: Sequence[float]) -> float:
    """The mean; an infinity where there is one, nan where there are both."""
    return fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def verdict(found: Sequence[Outcome]) -> Verdict:
    """Reproduced: every bound holds in the mean (on each seed, where a value is infinite), and every paired difference has its
    sign on each seed.

    Not reproduced: a bound fails in the mean. Inconclusive: the rest, and where a value could not be had (nan).
    """
    if any(math.isnan(v) for o in found for v in o.values):
        return "inconclusive"
    if not all(o.in_the_mean for o in found):
        return "not reproduced"
    return "reproduced" if all(o.on_each_seed for o in found) else "inconclusive"


def holds(value: float, low: float | None, high: float | None) -> bool:
    """low <= value <= high."""
    return (low is None or value >= low) and (high is None or value <= high)


def settings_hash(config: Mapping[str, Any]) -> str:
    """A hash of what a claim is made of: a recorded verdict is of one recipe, not of what its file says later."""
    decides = {k: config.get(k) for k in ("model", "task", "stages", "objective", "claim", "seed")}
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def recorded_verdict(path: Path, code: str, settings: str) -> str:
    """What a result file says, and whether the code or the recipe that made it has changed since."""
    if not path.is_file():
        return "no result"
    text = path.read_text(encoding="utf-8")
    said = re.search(r"^\*\*Verdict: (.+?)\*\*", text, re.M)
    stale = [what for what, now in (("code", code), ("settings", settings)) if f"{what} `{now}`" not in text]
    changed = f", stale: other {' and '.join(stale)}" if stale else ""
    return (said.group(1) if said else "unreadable") + changed
