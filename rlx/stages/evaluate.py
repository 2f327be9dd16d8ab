"""`evaluate`: several policies on the same held-out tasks, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlx.stages.context import Context
from rlx.stages.evaluation import Measure, evaluate, interval, num_scored
from rlx.types import ModelRef


@dataclass(kw_only=True)
class Evaluate(Measure):
    """`policies` maps a name to the weights that are measured under it."""

    instead_of_weights: ClassVar[str] = "metrics"

    policies: dict[str, ModelRef]

    def describe(self) -> str:
        """What is measured, in words."""
        return f"{', '.join(m.name for m in self.metrics)} of {', '.join(self.policies)}"

    def run(self, ctx: Context) -> dict[str, float]:
        """Measure; `name/metric` for each policy."""
        found: dict[str, float] = {}
        for name, ref in self.policies.items():
            values, groups = evaluate(ctx.policy(ref), self, ctx)
            n = num_scored(groups)
            record = dict(values)
            if "accuracy" in values:
                record |= interval(values["accuracy"], n)
            ctx.log.step(0, record | {"n": float(n)}, [group[0] for group in groups[:8]], policy=name)
            found |= {f"{name}/{metric}": value for metric, value in values.items()}
        return found
