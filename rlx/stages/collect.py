"""`collect`: a policy answers, rewards (a verifier, a reward model, a judge) label, and a data set is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rlx import world
from rlx.build import LANGUAGE
from rlx.data.write import FORMS, Rows, jsonl
from rlx.filters import chain
from rlx.offload import present
from rlx.rollout import samplers
from rlx.stages.context import Context
from rlx.stages.drawing import drawing, drawing_problems
from rlx.stages.fields import misnamed
from rlx.stages.models import ModelSpec, as_spec, models_of, named, spec_problems, with_models
from rlx.stages.played import played
from rlx.stages.summary import average, summary
from rlx.types import Component, DataError, DataRef, Episode, Keep, ModelRef, Reward, Sampler


@dataclass(kw_only=True)
class Collect:
    """`group_size` answers to each prompt of `data` are paid and filtered; `rows` says what is written of each group.

    | rows           | a group becomes |
    |----------------|-----------------|
    | pairs          | its best and its worst answer, chosen and rejected, if their rewards differ by more than `margin` |
    | all_pairs      | every two answers whose rewards do |
    | best           | its best answer, as a demonstration |
    | demonstrations | every answer that is kept |

    The rows are in out/rows.jsonl, and `data: "@NAME"` of a later stage reads them. They hold texts, with the rewards as
    columns. `sampler: given` plays nothing and labels the answers that the data has. An answer that the token limit cut is
    written as if it were whole: `keep: [untruncated]` leaves it out. `limit` takes the first rows of `data`; those of a group
    count as one.
    """

    instead_of_weights: ClassVar[str] = "rows, which `data` takes"
    writes_rows: ClassVar[bool] = True
    gives_models_to: ClassVar[tuple[str, ...]] = ("reward", "keep", "sampler")

    data: DataRef
    reward: list[Component[Reward]]
    rows: Literal["pairs", "all_pairs", "best", "demonstrations"]
    group_size: int = 1
    margin: float = 0.0
    policy: ModelRef | None = None
    models: dict[str, ModelRef | ModelSpec] = field(default_factory=dict)
    sampler: Component[Sampler] = Component("plain", samplers.plain)
    keep: list[Component[Keep]] = field(default_factory=list)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int | None = None
    limit: int | None = None
    prompts_per_step: int = 64

    def specs(self) -> dict[str, ModelSpec]:
        """The models by name."""
        return {"policy": as_spec(self.policy)} | {name: as_spec(given) for name, given in self.models.items()}

    def problems(self, base: frozenset[str] = LANGUAGE) -> list[str]:
        """What is wrong with the settings taken together."""
        specs = self.specs()
        found = drawing_problems(self) + spec_problems(specs)
        found += misnamed(specs, reward=self.reward, keep=self.keep, sampler=[self.sampler])
        if self.policy is not None and "policy" in self.models:
            found.append("policy: given twice, here and in models")
        if self.rows in ("pairs", "all_pairs") and self.group_size < 2 and samplers.plays(self.sampler):
            found.append(f"group_size: rows: {self.rows} compares the answers to a prompt; 2 or more are needed")
        return found

    def asks_policy(self) -> bool:
        """Whether the policy is needed at all."""
        components = [*self.reward, *self.keep, self.sampler]
        return samplers.plays(self.sampler) or any(model == "policy" for _, _, model in named(components))

    def describe(self) -> str:
        """What is written, in words."""
        answers = f"{self.group_size} answers" if samplers.plays(self.sampler) else "the data's answers"
        return f"{self.rows} from {answers} to each prompt"

    def run(self, ctx: Context) -> dict[str, float]:
        """Write the rows; what they are made of, over all steps."""
        specs = self.specs()
        loaded = ctx.models({name: spec for name, spec in specs.items() if name != "policy" or self.asks_policy()})
        keep = [with_models(k, loaded) for k in self.keep]
        sampling = drawing(self, ctx)
        asked = list(grouped(ctx.data(self.data, self.limit)))
        so_far = Collected()
        ctx.resume({"collected": so_far})
        for step in ctx.steps(math.ceil(len(asked) / self.prompts_per_step)):
            chosen = asked[(step - 1) * self.prompts_per_step : step * self.prompts_per_step]
            found = played(
                ctx,
                [row for group in chosen for row in group],
                self.group_size,
                sampler=self.sampler,
                reward=self.reward,
                models=loaded,
                sampling=sampling,
                seed=ctx.seeds(step),
                step=step,
            )
            with present(*models_of(self.keep, loaded)):
                passed = chain([e for e in found if not math.isnan(e.reward) and e.turns], keep)
            made = [row for group in grouped(passed) for row in FORMS[self.rows](group, self.margin)]
            so_far.add(made, found, passed)
            ctx.log.step(step, measured(passed, found, made, len(chosen)), found[: 2 * self.group_size] if step == 1 else [])
        rows, seen, kept = so_far.rows, so_far.seen, so_far.kept
        if not rows:
            raise DataError(
                f"stages.{ctx.name}: none of {len(asked)} prompts made a row (rows: {self.rows}, {len(kept)} of {len(seen)} "
                "answers kept)"
            )
        if world.leads():
            jsonl(rows, ctx.folder / "out" / "rows.jsonl")
        return measured(kept, seen, rows, len(asked))


class Collected:
    """What the steps so far have written, played and kept."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.seen: list[Episode] = []
        self.kept: list[Episode] = []

    def add(self, rows: Rows, seen: list[Episode], kept: list[Episode]) -> None:
        """Take in a step."""
        self.rows += rows
        self.seen += seen
        self.kept += kept

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return vars(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there."""
        vars(self).update(saved)


def grouped(episodes: list[Episode]) -> Iterator[list[Episode]]:
    """The episodes of each group, which stand together."""
    return (list(group) for _, group in itertools.groupby(episodes, key=lambda e: e.group))


def measured(kept: list[Episode], seen: list[Episode], rows: Rows, asked: int) -> dict[str, float]:
    """What happened, how many rows it made, and how far apart the pairs are."""
    margins = [row["chosen_reward"] - row["rejected_reward"] for row in rows if "chosen_reward" in row]
    apart = {"margin": average(margins)} if margins else {}
    return {**summary(kept, seen), "rows": float(len(rows)), "rows_per_prompt": len(rows) / max(1, asked), **apart}
