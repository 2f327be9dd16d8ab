"""A paper's claim as data: arms, checks and the rule that turns paired differences over seeds into a verdict."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlx.build import Binder
from rlx.report.read import Run
from rlx.report.tables import mean_interval
from rlx.types import ConfigError

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]
EXIT_STATUS: dict[str, int] = {"reproduced": 0, "not reproduced": 3, "inconclusive": 4}
METHOD = "method"
MINUTES, MOST_MINUTES = 20, 120  # of a claim on two cores: the default budget, and the most that a recipe may ask for
At = Literal["first", "last", "best", "head", "tail", "mean", "growth"]


@dataclass(kw_only=True)
class Check:
    """`metric` of `arm` minus that of `minus` (or divided by that of `per`), paired by seed, held against `min` or `max`.

    `at`: first or last value of the curve, its best, its mean, the mean over its first (head) or last (tail) tenth, or tail
    minus head (growth). `minus_metric` and `minus_at` default to `metric` and `at`. With neither `minus` nor `per` the value
    itself is held against the bound.
    """

    metric: str
    at: At = "last"
    arm: str = METHOD
    minus: str | None = None
    minus_metric: str | None = None
    minus_at: At | None = None
    per: str | None = None
    min: float | None = None
    max: float | None = None

    def __str__(self) -> str:
        text = f"{self.metric} ({self.at}) of {self.arm}"
        if self.minus is not None:
            other = (
                ""
                if self.minus_metric is None and self.minus_at is None
                else (f"{self.minus_metric or self.metric} ({self.minus_at or self.at}) of ")
            )
            text += f" minus {other}{self.minus}"
        if self.per is not None:
            text += f" divided by {self.per}'s"
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.min), ("<=", self.max)) if bound is not None]
        return f"{text} {' and '.join(bounds)}"


@dataclass(kw_only=True)
class Shown:
    """A further column of the result's table."""

    metric: str
    at: At = "last"


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
        checked = [m for c in self.checks for m in (c.metric, c.minus_metric) if m]
        return list(dict.fromkeys([*checked, *(s.metric for s in self.show)]))

    @property
    def columns(self) -> list[tuple[str, At]]:
        """The columns of the result's table: what is checked, then what is shown."""
        checked = [(c.metric, c.at) for c in self.checks]
        return list(dict.fromkeys([*checked, *((s.metric, s.at) for s in self.show)]))

    def settings(self) -> list[dict[str, Any]]:
        """The grid of `tune`."""
        return [dict(zip(self.tune, values, strict=True)) for values in itertools.product(*self.tune.values())]


def claim_of(config: Mapping[str, Any]) -> Claim:
    """The claim of a composed recipe. Raises ConfigError where there is none or it is wrong."""
    node = config.get("claim")
    if not node:
        raise ConfigError(f"recipe {config['recipe']!r} makes no claim (it has no `claim:`); see docs/writing_a_recipe.md")
    binder = Binder()
    claim: Claim | None = binder.record(Claim, "a claim", node, "claim")
    if claim is not None:
        known = set(claim.names)
        for i, check in enumerate(claim.checks):
            for arm in (check.arm, check.minus, check.per):
                if arm is not None and arm not in known:
                    binder.errors.append(f"claim.checks.{i}: no arm {arm!r} (known: {', '.join(claim.names)})")
            if check.min is None and check.max is None:
                binder.errors.append(f"claim.checks.{i}: needs min or max")
        added = {path.split(".")[1] for path in claim.common if path.startswith("stages.")}
        for metric in claim.metrics:
            if metric.partition("/")[0] not in {*config.get("stages", {}), *added}:
                binder.errors.append(f"claim: metric {metric!r} names no stage of the recipe")
        if len(claim.seeds) < 3:
            binder.errors.append(f"claim.seeds: at least 3 are run, got {claim.seeds}")
        if claim.minutes > MOST_MINUTES:
            binder.errors.append(f"claim.minutes: at most {MOST_MINUTES}, got {claim.minutes}")
    if binder.errors or claim is None:
        raise ConfigError("\n".join(binder.errors))
    return claim


def value_at(run: Run, metric: str, at: str) -> float:
    """One number of one run's curve. Raises ConfigError where the run has no such metric."""
    stage_name, _, key = metric.partition("/")
    rows: list[float] = []
    for stage in run.stages:
        if stage.name == stage_name:
            for row in stage.metrics:
                policy = row.get("policy")
                name = f"{policy}/" if policy else ""
                if key.startswith(name) and isinstance(row.get(key.removeprefix(name)), int | float):
                    rows.append(float(row[key.removeprefix(name)]))
    if not rows:
        raise ConfigError(f"claim: no run wrote the metric {metric!r} (in {run.path})")
    tenth = max(1, math.ceil(len(rows) / 10))
    head, tail = fmean(rows[:tenth]), fmean(rows[-tenth:])
    pick = {"first": rows[0], "last": rows[-1], "best": max(rows), "mean": fmean(rows), "head": head, "tail": tail}
    pick["growth"] = tail - head
    return pick[at]


@dataclass(frozen=True)
class Outcome:
    """One check over seeds: `values` in the order of the seeds, their mean and the half-width of its 95 % interval."""

    check: Check
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval (Student's t); nan with one seed."""
        return mean_interval(self.values)[1]

    @property
    def in_the_mean(self) -> bool:
        """The bound holds for the mean over seeds."""
        return holds(self.mean, self.check.min, self.check.max)

    @property
    def on_each_seed(self) -> bool:
        """A paired difference has the claimed sign on every seed (or keeps within a bound that allows the other sign)."""
        if self.check.minus is None and self.check.per is None:
            return True
        none = 0.0 if self.check.per is None else 1.0  # the difference, or the ratio, of two equal arms
        low = None if self.check.min is None else min(self.check.min, none)
        high = None if self.check.max is None else max(self.check.max, none)
        return all(holds(v, low, high) for v in self.values)


def outcomes(claim: Claim, runs: Mapping[tuple[str, int], Run], seeds: Sequence[int]) -> list[Outcome]:
    """Each check on each seed, arms paired by seed."""
    out = []
    for check in claim.checks:
        values = []
        for seed in seeds:
            value = value_at(runs[check.arm, seed], check.metric, check.at)
            if check.minus is not None:
                other = runs[check.minus, seed]
                value -= value_at(other, check.minus_metric or check.metric, check.minus_at or check.at)
            if check.per is not None:
                value /= value_at(runs[check.per, seed], check.metric, check.at)
            values.append(value)
        out.append(Outcome(check, values))
    return out


def verdict(found: Sequence[Outcome]) -> Verdict:
    """Reproduced: every bound holds in the mean and every paired difference has its sign on each seed.

    Not reproduced: a bound fails in the mean. Inconclusive: the rest.
    """
    if not all(o.in_the_mean for o in found):
        return "not reproduced"
    return "reproduced" if all(o.on_each_seed for o in found) else "inconclusive"


def holds(value: float, low: float | None, high: float | None) -> bool:
    """low <= value <= high."""
    return (low is None or value >= low) and (high is None or value <= high)


def recorded_verdict(path: Path, code: str = "") -> str:
    """What a result file says, and whether the code that made it has changed since."""
    if not path.is_file():
        return "no result"
    text = path.read_text(encoding="utf-8")
    said = re.search(r"^\*\*Verdict: (.+?)\*\*", text, re.M)
    made = re.search(r"code `([0-9a-f]+)`", text)
    stale = "" if not code or (made and made.group(1) == code) else ", stale: the code has changed"
    return (said.group(1) if said else "unreadable") + stale
