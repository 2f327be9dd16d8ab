"""`select`: sort the rows of a split by what a policy makes of them; later stages train on the part that teaches them most."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rlx import world
from rlx.build import LANGUAGE
from rlx.filters import chain
from rlx.rollout import samplers
from rlx.stages.context import Context
from rlx.stages.drawing import drawing, drawing_problems
from rlx.stages.played import played
from rlx.stages.summary import average, summary
from rlx.types import Component, ConfigError, DataRef, Episode, Keep, ModelRef, Reward, Sampler


@dataclass(kw_only=True)
class Select:
    """Play each row of `data` `samples` times; `@stage/NAME` is then the rows whose episodes pass the filters `into.NAME`.

    `limit` takes the first rows; the rows of a group count as one. `reward` is what the filters read (default: the task's
    verifier), and an episode that could not be scored passes none. Nothing is copied: what is written is which rows of the
    split belong to a name. `empty` says what a name without a row means: a mistake, or that it takes all rows.
    """

    instead_of_weights: ClassVar[str] = "selections of rows, which `data` takes"

    data: DataRef
    into: dict[str, list[Component[Keep]]]
    policy: ModelRef | None = None
    reward: list[Component[Reward]] = field(default_factory=list)
    sampler: Component[Sampler] = Component("plain", samplers.plain)
    samples: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int | None = None
    limit: int | None = None
    empty: Literal["error", "all"] = "error"

    @property
    def writes(self) -> list[str]:
        """The names of what it selects."""
        return list(self.into)

    def problems(self, base: frozenset[str] = LANGUAGE) -> list[str]:
        """What is wrong with the settings taken together."""
        found = drawing_problems(self) + ([] if self.into else ["into: required; name at least one selection"])
        if not self.data.split or self.data.stage:
            found.append("data: expected a split of the task (@task/SPLIT)")
        return found

    def describe(self) -> str:
        """What is played, in words."""
        return f"{self.samples} samples of each row, sorted into {', '.join(self.into)}"

    def run(self, ctx: Context) -> dict[str, float]:
        """Sample, score, sort and write; the share of the rows that each name has."""
        rows = ctx.data(self.data, self.limit)
        seen = played(
            ctx,
            rows,
            self.samples,
            sampler=self.sampler,
            reward=self.reward or [ctx.verifier],
            models={"policy": ctx.policy(self.policy)},
            sampling=drawing(self, ctx),
            seed=ctx.seeds(),
        )
        selected = {name: self.groups(name, keep, seen, ctx.name) for name, keep in self.into.items()}
        if world.leads():
            write(ctx, self.data.split, selected)
        metrics = {f"share/{name}": len(groups) / len({row.group for row in rows}) for name, groups in selected.items()}
        metrics |= summary(scored(seen), seen) | {"spent/updates": 0.0, "spent/rollouts": float(len(seen)), "spent/tokens": 0.0}
        ctx.log.step(1, metrics, seen[: 2 * self.samples])
        return metrics

    def groups(self, name: str, keep: list[Component[Keep]], seen: list[Episode], stage: str) -> list[int]:
        """The groups of which a scored episode passes the filters. Raises ConfigError where there is none."""
        found = list(dict.fromkeys(e.group for e in chain(scored(seen), keep)))
        if not found and self.empty == "error":
            rates = f"mean reward {average([e.reward for e in scored(seen)]):.3g}"
            raise ConfigError(f"stages.{stage}.into.{name}: no row passes its filters ({rates})")
        return found or list(dict.fromkeys(e.group for e in seen))


def scored(episodes: list[Episode]) -> list[Episode]:
    """Those that could be scored."""
    return [e for e in episodes if not math.isnan(e.reward)]


def write(ctx: Context, split: str, selected: Mapping[str, list[int]]) -> None:
    """One file for each name."""
    folder = ctx.folder / "out"
    folder.mkdir(parents=True, exist_ok=True)
    for name, groups in selected.items():
        (folder / f"{name}.json").write_text(json.dumps({"split": split, "groups": groups}), encoding="utf-8")
