"""`select`: sort the rows of a split by what a policy makes of them; later stages train on the part that teaches them most."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from rlx.build import LANGUAGE
from rlx.filters import chain
from rlx.rewards.score import score
from rlx.rollout import samplers
from rlx.stages.context import Context
from rlx.stages.summary import summary
from rlx.types import Component, ConfigError, DataRef, Episode, Keep, ModelRef, Play, Reward, Sampler, Sampling


@dataclass(kw_only=True)
class Select:
    """Play each row of `data` `samples` times; `@stage/NAME` is then the rows whose episodes pass the filters `into.NAME`.

    `reward` is what the filters read (default: the task's verifier). Nothing is copied: what is written is which rows of the
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
    max_new_tokens: int | None = None
    limit: int | None = None
    empty: Literal["error", "all"] = "error"

    @property
    def writes(self) -> list[str]:
        """The names of what it selects."""
        return list(self.into)

    def problems(self, base: frozenset[str] = LANGUAGE) -> list[str]:
        """What is wrong with the settings taken together."""
        found = [] if self.into else ["into: required; name at least one selection"]
        if not self.data.split or self.data.stage:
            found.append("data: expected a split of the task (@task/SPLIT)")
        return found

    def describe(self) -> str:
        """What is played, in words."""
        return f"{self.samples} samples of each row, sorted into {', '.join(self.into)}"

    def run(self, ctx: Context) -> dict[str, float]:
        """Sample, score, sort and write; the share of the rows that each name has."""
        policy, rows = ctx.policy(self.policy), ctx.data(self.data, self.limit)
        rewards, where = self.reward or [ctx.verifier], f"stages.{ctx.name}.reward"
        sampling = Sampling(ctx.max_new_tokens(self.max_new_tokens), self.temperature, self.top_k, self.top_p)
        pay = partial(score, rewards=rewards, where=where)
        play = Play(policy, ctx.make_env, sampling, ctx.seeds(), ctx.make_vec, score=pay)
        played = self.sampler.call(play, rows, self.samples)
        pay(played)
        selected = {name: self.groups(name, keep, played, ctx.name) for name, keep in self.into.items()}
        write(ctx, self.data.split, selected)
        metrics = {f"share/{name}": len(groups) / len(rows) for name, groups in selected.items()}
        metrics |= summary(played, played) | {"spent/updates": 0.0, "spent/rollouts": float(len(played)), "spent/tokens": 0.0}
        ctx.log.step(1, metrics, played[: 2 * self.samples])
        return metrics

    def groups(self, name: str, keep: list[Component[Keep]], played: list[Episode], stage: str) -> list[int]:
        """The groups of which an episode passes the filters. Raises ConfigError where there is none."""
        found = list(dict.fromkeys(e.group for e in chain(played, keep)))
        if not found and self.empty == "error":
            rates = f"mean reward {sum(e.reward for e in played) / len(played):.3g}"
            raise ConfigError(f"stages.{stage}.into.{name}: no row passes its filters ({rates})")
        return found or list(dict.fromkeys(e.group for e in played))


def write(ctx: Context, split: str, selected: Mapping[str, list[int]]) -> None:
    """One file for each name."""
    folder = ctx.folder / "out"
    folder.mkdir(parents=True, exist_ok=True)
    for name, groups in selected.items():
        (folder / f"{name}.json").write_text(json.dumps({"split": split, "groups": groups}), encoding="utf-8")
