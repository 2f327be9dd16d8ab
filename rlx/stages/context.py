"""What a stage is given: where it writes, what its references mean, and the log."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rlx.report.read import lower_is_better
from rlx.rollout.noise import key
from rlx.track import Log
from rlx.types import Component, ConfigError, DataRef, Env, Episode, Model, ModelRef, Policy, Reward, TaskSource

if TYPE_CHECKING:
    from rlx.models.language import LanguageModel


@dataclass(kw_only=True)
class Sources:
    """What the references of the stage `name` mean: weights, rows, environment, verifier, random draws."""

    run_dir: Path
    name: str
    seed: int
    model: Component[Model]
    task: TaskSource | None = None
    rows: dict[str, list[Episode]] = field(default_factory=dict)

    def policy(self, ref: ModelRef | None) -> Policy:
        """The weights that a reference means (without one, the recipe's `model`), with the rollout engine."""
        from rlx.rollout.native import generate

        policy = self.load(ref)
        policy.engine = generate
        return policy

    def load(self, ref: ModelRef | None) -> LanguageModel:
        """The weights alone."""
        from rlx.models.load import pretrained

        if ref is None or ref.stage == "model":
            made = self.model.call() if "seed" in self.model.settings else self.model.call(seed=self.seed)
            return cast("LanguageModel", made)
        path = ref.path
        if ref.stage:
            folder = self.run_dir / ref.stage
            at = {"last": folder / "out", "best": folder / "checkpoints" / "best"}
            found = at.get(ref.pick) or folder / "checkpoints" / f"step-{int(ref.pick.removeprefix('step=')):06d}"
            if not found.is_dir():
                raise ConfigError(f"stages.{self.name}: {ref} names {found}, which stage {ref.stage!r} did not write")
            path = str(found)
        shared = set(inspect.signature(pretrained).parameters) - {"path", "seed"}
        settings = {k: v for k, v in self.model.settings.items() if k in shared}
        return pretrained(path=path, seed=self.model.settings.get("seed", self.seed), **settings)

    def data(self, ref: DataRef, limit: int | None = None) -> list[Episode]:
        """The rows that a reference means, read once."""
        name = ref.split or repr(ref.source)
        if name not in self.rows:
            if ref.source is not None:
                self.rows[name] = ref.source.call()
            elif self.task is not None:
                self.rows[name] = self.task.splits[ref.split]()
        return self.rows[name][:limit]

    def make_env(self) -> Env:
        """A fresh environment of the task; without a task, the single-turn one."""
        from rlx.envs.single import SingleTurn

        return self.task.make_env() if self.task is not None else SingleTurn()

    @property
    def verifier(self) -> Component[Reward]:
        """What says whether an answer is right: the task's own, else a match with the row's `answer`."""
        from rlx.rewards.rules import answer_match

        return Component("verifier", self.task.verifier if self.task is not None else functools.partial(answer_match))

    def max_new_tokens(self, given: int | None) -> int:
        """The stage's own limit, else the task's."""
        return given or (self.task.max_new_tokens if self.task is not None else 512)

    def seeds(self, *parts: int) -> tuple[int, ...]:
        """A key of random draws that belongs to this run and stage."""
        return (self.seed, key(*self.name.encode()), *parts)


@dataclass(kw_only=True)
class Context(Sources):
    """One stage of one run. `objective` is the metric of this stage that 'best checkpoint' means, if it is this stage's."""

    log: Log
    objective: str = ""
    step: int = 0
    policy_in_training: Policy | None = None
    best: float | None = None
    since_best: int = 0

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return self.run_dir / self.name

    def steps(self, total: int, policy: Policy) -> Iterator[int]:
        """1 to `total`; ends early when the evaluation's patience is spent. An interrupt finds the policy to save here."""
        self.policy_in_training = policy
        self.log.begin(total)
        for step in range(1, total + 1):
            self.step = step
            yield step
            if self.log.stopped:
                break

    def checkpoint(self, name: str, policy: Policy) -> None:
        """Write a checkpoint of this stage in Hugging Face format."""
        policy.save(self.folder / "checkpoints" / name)

    def judge(self, metrics: dict[str, float], policy: Policy, patience: int | None) -> None:
        """Keep the best checkpoint by the recipe's objective; stop after `patience` evaluations without a better one."""
        if self.objective not in metrics:
            return
        value = metrics[self.objective]
        sign = -1.0 if lower_is_better(self.objective) else 1.0
        if self.best is None or sign * value > sign * self.best:
            self.best, self.since_best = value, 0
            self.checkpoint("best", policy)
        else:
            self.since_best += 1
        if patience is not None and self.since_best >= patience:
            self.log.stop(f"{self.objective} has not improved in {patience} evaluations")
