"""`evaluate`: several policies on the same held-out tasks, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from rlx.stages.context import Context
from rlx.stages.evaluation import Eval, evaluate, interval
from rlx.types import ModelRef


@dataclass(kw_only=True)
class Evaluate(Eval):
    """`policies` maps a name to the weights that are measured under it."""

    policies: dict[str, ModelRef]

    def problems(self) -> list[str]:
        """Nothing can be wrong that the types do not say."""
        return []

    def describe(self) -> str:
        """What is measured, in words."""
        return f"{', '.join(m.name for m in self.metrics)} of {', '.join(self.policies)}"

    def run(self, ctx: Context) -> dict[str, float]:
        """Measure; `name/metric` for each policy."""
        found: dict[str, float] = {}
        for name, ref in self.policies.items():
            values, episodes = evaluate(ctx.policy(ref), self, ctx)
            n = len(ctx.data(self.data, self.limit))
            record = dict(values)
            if "accuracy" in values:
                record |= interval(values["accuracy"], n)
            ctx.log.step(0, record | {"n": float(n)}, episodes[:8], policy=name)
            found |= {f"{name}/{metric}": value for metric, value in values.items()}
        return found
