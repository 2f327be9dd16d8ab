"""rlx's side: a stage of a recipe, planned and run as `rlx train` does."""

from __future__ import annotations

import functools
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.clock import Clock, Passes
from benchmark.prepare import policy
from benchmark.workloads import BETA, LR, Workload
from rlx.learner import TorchLearner
from rlx.models.language import LanguageModel
from rlx.plan import Plan, plan
from rlx.run import run_stage
from rlx.track import Lines, NoTracker
from rlx.types import Component, Episode, Play

ME = "benchmark.rlx_side"


def paid(text: str) -> float:
    """A reward that tells almost any two texts apart: no group is without signal, on either side."""
    return zlib.crc32(text.encode()) % 1000 / 1000


def pay(episodes: list[Episode]) -> list[float]:
    """The same as a component."""
    return [paid(e.completion) for e in episodes]


def config(work: Workload, folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe of one stage; `more` are keys of the stage."""
    data = {"name": "jsonl", "path": str(folder / "rows.jsonl")}
    stage: dict[str, Any] = {"data": data, "steps": 1_000_000, "lr": LR, "log_every": 1, **OWN[work.kind](work), **more}
    return {"recipe": "bench", "seed": 0, "stages": {"bench": stage}}


def online(work: Workload) -> dict[str, Any]:
    """GRPO without a penalty, averaged over tokens: TRL's default."""
    return {
        "kind": "online",
        "reward": [{"name": f"{ME}:pay"}],
        "advantage": [{"name": "group_zscore", "eps": 1e-4}],  # TRL's
        "loss": [{"name": "clipped_surrogate"}],
        "prompts_per_step": work.rows,
        "group_size": work.group,
        "max_new_tokens": work.new,
    }


def fit(work: Workload, loss: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Training on rows."""
    return {"kind": "fit", "loss": [loss], "rows_per_step": work.rows, **more}


OWN: Mapping[str, Callable[[Workload], dict[str, Any]]] = {
    "grpo": online,
    "sft": lambda work: fit(work, {"name": "nll"}),
    "dpo": lambda work: fit(work, {"name": "dpo", "beta": BETA}, reference="@model"),
    "rm": lambda work: fit(work, {"name": "bradley_terry"}, models={"policy": {"heads": {"score": "last"}}}),
}


def planned(work: Workload, folder: Path, device: str, **more: Any) -> Plan:
    """The plan of the recipe, with the weights of `prepare`."""
    made = plan(config(work, folder, **more), trusted=[ME])
    made.model = Component("bench", functools.partial(policy, work, folder, device))
    return made


def carried_out(made: Plan, tracker: Any) -> dict[str, float]:
    """Run its stage in a directory of its own; the last metrics."""
    with tempfile.TemporaryDirectory() as run_dir:
        return run_stage(made, "bench", Path(run_dir), display=Lines(1e9), tracker=tracker)


class Steps(NoTracker):
    """Told of each step of the stage."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self.passes.step()


def run(work: Workload, folder: Path, clock: Clock, passes: Passes) -> None:
    """Train until the parent asks for no more."""
    made = planned(work, folder, clock.device)
    clock.wrap(TorchLearner, "step", "update")
    clock.wrap(LanguageModel, "forward", "update")  # of a reference: outside the learner's step
    clock.without_optimizer()
    stage: Any = made.stages["bench"]
    if work.kind == "grpo":
        sample = clock.timed(stage.sampler.call, "rollout")

        def watched(play: Play, rows: list[Episode], n: int) -> list[Episode]:
            episodes: list[Episode] = sample(play, rows, n)
            for i in range(0, len(episodes), n):
                group = episodes[i : i + n]
                passes.played(len(group[0].turns[0].seen), [e.num_tokens for e in group])
            return episodes

        stage.sampler = replace(stage.sampler, call=watched)
    carried_out(made, Steps(passes))
