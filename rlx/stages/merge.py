"""`merge`: arithmetic on weights (averages, soups, task vectors, extrapolation), with the step length chosen by a metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlx.build import LANGUAGE, hint
from rlx.report.read import lower_is_better
from rlx.stages.context import Context
from rlx.stages.evaluation import Measure, evaluate
from rlx.stages.models import ModelSpec, as_spec, named_weights, spec_problems
from rlx.types import ConfigError, ModelRef


@dataclass(kw_only=True)
class Merge:
    """theta = sum_m terms[m] theta_m + alpha sum_m direction[m] theta_m, over the `models`.

    `terms: {a: 0.5, b: 0.5}` is an average of weights. `terms: {dpo: 1}` with `direction: {dpo: 1, sft: -1}` goes on from dpo
    in the direction in which training has moved it from sft (ExPO, Zheng et al. 2024, arXiv 2404.16792). Of several `alpha`
    the one with the best `choose` is written, a metric of `eval`; of equal ones the first. Adapters are merged into their
    model first; heads are weights like all others. Sums are computed in float64 and rounded once.
    """

    models: dict[str, ModelRef | ModelSpec]
    terms: dict[str, float]
    direction: dict[str, float] = field(default_factory=dict)
    alpha: list[float] = field(default_factory=lambda: [1.0])
    eval: Measure | None = None
    choose: str | None = None

    def specs(self) -> dict[str, ModelSpec]:
        """The models by name; the one that leads `terms` lends the merged model its shape and tokenizer."""
        return {name: as_spec(given) for name, given in self.models.items()}

    def problems(self, base: frozenset[str] = LANGUAGE) -> list[str]:
        """What is wrong with the settings taken together."""
        found = spec_problems(self.specs())
        for key in ("terms", "direction"):
            for name in getattr(self, key):
                if name not in self.models:
                    found.append(f"{key}.{name}: the stage has no model {name!r}{hint(name, self.models)}")
        if not self.terms:
            found.append("terms: required; the weight of at least one model")
        if not self.alpha:
            found.append("alpha: expected at least one number")
        measured = [m.name for m in self.eval.metrics] if self.eval is not None else []
        if len(self.alpha) > 1 and self.choose is None:
            found.append("choose: required, because there are several alpha; a metric of `eval`")
        elif self.choose is not None and self.choose not in measured:
            found.append(f"choose: `eval` measures no {self.choose!r}{hint(self.choose, measured)}")
        return found + [f"eval.{line}" for line in (self.eval.problems() if self.eval is not None else ())]

    def describe(self) -> str:
        """The sum in words."""
        along = f" + alpha ({written(self.direction)}), alpha {', '.join(map(str, self.alpha))}" if self.direction else ""
        return written(self.terms) + along

    def run(self, ctx: Context) -> dict[str, float]:
        """Write the sum; what was measured of it, and its alpha."""
        plain = {key: value for key, value in ctx.model.settings.items() if key != "lora"}
        bare = replace(ctx, model=replace(ctx.model, settings=plain))  # out/ holds adapters merged: none is added here
        loaded = bare.models(self.specs())
        parts = {name: named_weights(policy) for name, policy in loaded.items()}
        kept = {name: {key: x.detach().clone() for key, x in found.items()} for name, found in parts.items()}
        first = next(iter(self.terms))
        check_alike(kept, first, f"stages.{ctx.name}")
        ctx.in_training = {"policy": loaded[first]}
        best: tuple[float, float, dict[str, float]] | None = None
        for step in ctx.steps(len(self.alpha)):
            alpha = self.alpha[step - 1]
            weigh(parts[first], kept, coefficients(self.terms, self.direction, alpha))
            values, groups = evaluate(loaded[first], self.eval, ctx) if self.eval is not None else ({}, [])
            metrics = {"alpha": alpha, **{f"eval/{name}": value for name, value in values.items()}}
            ctx.log.step(step, metrics, [group[0] for group in groups[:4]])
            chosen = values.get(self.choose or "", 0.0) * (-1.0 if lower_is_better(self.choose or "") else 1.0)
            if best is None or chosen > best[0]:
                best = chosen, alpha, metrics
        assert best is not None
        weigh(parts[first], kept, coefficients(self.terms, self.direction, best[1]))
        ctx.save(ctx.folder / "out")
        return best[2]


def coefficients(terms: Mapping[str, float], direction: Mapping[str, float], alpha: float) -> dict[str, float]:
    """The weight of each model in the sum; those of weight 0 are left out, so that what is left is exact."""
    found = {m: terms.get(m, 0.0) + alpha * direction.get(m, 0.0) for m in dict.fromkeys([*terms, *direction])}
    return {m: c for m, c in found.items() if c != 0.0}


def check_alike(models: Mapping[str, Mapping[str, Tensor]], first: str, where: str) -> None:
    """Raises ConfigError where the models have not the same weights in the same shapes."""
    for name, found in models.items():
        for key in dict.fromkeys([*models[first], *found]):
            one, other = models[first].get(key), found.get(key)
            if one is None or other is None:
                lacks = first if one is None else name
                raise ConfigError(f"{where}: models {first!r} and {name!r} cannot be merged: {lacks!r} has no weight {key!r}")
            if one.shape != other.shape:
                raise ConfigError(
                    f"{where}: models {first!r} and {name!r} cannot be merged: the weight {key!r} has the shapes "
                    f"{tuple(one.shape)} and {tuple(other.shape)}"
                )


@torch.no_grad()
def weigh(into: Mapping[str, Tensor], models: Mapping[str, Mapping[str, Tensor]], by: Mapping[str, float]) -> None:
    """Write the sum of the models' weights, each times its coefficient, into `into`."""
    for key, target in into.items():
        parts = [c * models[m][key].double() for m, c in by.items()]
        target.copy_(sum(parts[1:], parts[0]) if parts else torch.zeros_like(target))


def written(terms: Mapping[str, float]) -> str:
    """A sum as text."""
    return " + ".join(f"{c:g} {name}" for name, c in terms.items())
