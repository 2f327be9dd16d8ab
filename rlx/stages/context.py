"""What a stage is given: where it writes, what its references mean, and the log."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx import world
from rlx.data.rows import write
from rlx.learner import MakeLearner, TorchLearner
from rlx.report.read import lower_is_better
from rlx.resume import States
from rlx.rollout.noise import key
from rlx.stages.models import ModelSpec, freeze, padded, random_heads, target_of
from rlx.stages.rows import first, mark_of
from rlx.stages.state import Generators, State
from rlx.stopping import Stop
from rlx.track import Log
from rlx.types import (
    Component,
    ConfigError,
    DataRef,
    Env,
    Episode,
    Model,
    ModelRef,
    Policy,
    Reward,
    Rollout,
    Task,
    TaskSource,
    VecEnv,
)


@dataclass(kw_only=True)
class Sources:
    """What the references of the stage `name` mean: weights, rows, environment, verifier, random draws.

    `rollout` is the engine that samples (without one, the native).
    """

    run_dir: Path
    name: str
    seed: int
    model: Component[Model]
    task: TaskSource | None = None
    rollout: Component[Rollout] | None = None
    rows: dict[str, list[Episode]] = field(default_factory=dict)

    def policy(self, ref: ModelRef | None) -> Any:
        """The weights that a reference means (without one, the recipe's `model`)."""
        return self.load(ModelSpec(from_=ref))

    def models(self, specs: Mapping[str, ModelSpec]) -> dict[str, Any]:
        """The models of a stage by name. Targets that follow another model start as copies of it.

        Mixtures are of the models themselves.
        """
        from rlx.models.mixture import Mixture

        made = {name: self.load(spec) for name, spec in specs.items() if not spec.ema and not spec.mix}
        made |= {name: target_of(made[spec.ema]) for name, spec in specs.items() if spec.ema}
        mixes = {name: spec.mix for name, spec in specs.items() if spec.mix}
        return made | {name: Mixture([(made[part], w) for part, w in parts.items()]) for name, parts in mixes.items()}

    @world.phase("loading a model")
    def load(self, spec: ModelSpec) -> Any:
        """One model: its weights, its heads, and the rollout engine where it takes one."""
        from rlx.models.load import read
        from rlx.rollout.native import generate

        seed = int(self.model.settings.get("seed", self.seed))
        folder = None if spec.from_ is None or spec.from_.stage == "model" else self.place(spec.from_)
        if folder is not None:
            policy = read(folder, self.model.settings, seed, lora=spec.lora, add_tokens=spec.add_tokens, heads=spec.heads)
        else:
            model = spec.model or self.model
            policy = model.call() if "seed" in model.settings else model.call(seed=self.seed)
            policy = policy if not spec.heads else policy.with_heads(spec.heads, seed)
        if spec.bias:
            policy.heads.begin(spec.bias)
        freeze(policy, spec.freeze, f"stages.{self.name}")
        if hasattr(policy, "engine"):
            policy.engine = self.rollout.call if self.rollout is not None else generate
        return policy

    def place(self, ref: ModelRef) -> str:
        """The directory or hub id of a reference. Raises ConfigError where its stage wrote no such weights."""
        if not ref.stage:
            return ref.path
        folder = self.run_dir / ref.stage
        at = {"last": folder / "out", "best": folder / "checkpoints" / "best"}
        found = at.get(ref.pick) or folder / "checkpoints" / checkpoint_name(ref.pick)
        if ref.name != "policy":
            found = found / "models" / ref.name
        if not found.is_dir():
            raise ConfigError(f"stages.{self.name}: {ref} names {found}, which stage {ref.stage!r} did not write")
        return str(found)

    @world.phase("reading data")
    def data(self, ref: DataRef, limit: int | None = None) -> list[Episode]:
        """The rows that a reference means, read once: of all groups, or of the first `limit`."""
        from rlx.data.files import jsonl_rows
        from rlx.data.formats import placed_episodes

        name = f"{ref.stage}/{ref.split}" if ref.source is None else written(ref.source)
        if name not in self.rows:
            if ref.source is not None:
                self.rows[name] = ref.source.call()
            elif ref.stage and ref.split:
                found = json.loads((self.run_dir / ref.stage / "out" / f"{ref.split}.json").read_text(encoding="utf-8"))
                chosen = set(found["groups"])
                self.rows[name] = [row for row in self.data(DataRef(split=found["split"])) if row.group in chosen]
            elif ref.stage:
                path = str(self.run_dir / ref.stage / "out" / "rows.jsonl")
                self.rows[name] = placed_episodes(jsonl_rows(path), source=path, empty=True)
            elif self.task is not None:
                self.rows[name] = self.task.splits[ref.split]()
        return first(self.rows[name], limit)

    @property
    def make_vec(self) -> Callable[[list[Task]], VecEnv] | None:
        """The task's environments of arrays, if it has such."""
        return self.task.make_vec if self.task is not None else None

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
    """One stage of one run. `objective` is the metric of this stage that 'best checkpoint' means, if it is this stage's.

    `learner` makes what trains a model, in one process or in several. `step` steps have been taken, and `rollouts` episodes
    sampled. `state` is all that a step changes, by name (see `resume`).
    """

    log: Log
    learner: MakeLearner = TorchLearner
    objective: str = ""
    states: States | None = None
    stop: Stop = field(default_factory=Stop)
    step: int = 0
    rollouts: int = 0
    in_training: Mapping[str, Policy] = field(default_factory=dict)
    buffers: Mapping[str, Sequence[Episode]] = field(default_factory=dict)
    best: float | None = None
    since_best: int = 0
    state: dict[str, State] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)

    def models(self, specs: Mapping[str, ModelSpec], trained: Collection[str] = ()) -> dict[str, Any]:
        """The models of a stage by name; random heads that are not `trained`, and padding, are noted."""
        made = super().models(specs)
        for line in [*random_heads(made, specs, trained), *padded(made, trained)]:
            self.log.note(f"stages.{self.name}.{line}")
        return made

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return self.run_dir / self.name

    def steps(self, total: int, at: Sequence[str] = ()) -> Iterator[int]:
        """1 to `total`, or on from the state that `resume` has read; ends early when the evaluation's patience is spent.

        Checkpoints are written after the shares of the steps that `at` names (20%), under those names; the state when it is
        due, or where the run is to be stopped. Raises KeyboardInterrupt then.
        """
        self.log.begin(total)
        self.stop.waits = bool(self.state)
        shares = [(max(1, round(total * float(share.removesuffix("%")) / 100)), share) for share in at]
        for step in range(self.step + 1, total + 1):
            world.step(f"step {step} of stage {self.name!r}")
            self.step = step
            yield step
            for share in (name for when, name in shares if when == step):
                self.checkpoint(checkpoint_name(share))
            if self.log.stopped:
                break
            if step < total:  # after the last, what is left is to write the weights
                self._keep()

    def resume(self, state: Mapping[str, State]) -> None:
        """Say what the steps of this stage change, before the first of them; go on from the state on disk, if there is one.

        Raises ConfigError where the data is not what it was.
        """
        generators = Generators(*self.seeds())
        self.state = {"stage": self, "log": self.log, "generators": generators, **state}
        if self.states is None:
            return
        with world.phase("reading the state"):
            saved = self.states.read(self.rows)
        if saved is None:
            return
        if saved.keys() != self.state.keys():
            other = ", ".join(sorted(saved.keys() ^ self.state.keys()))
            raise ConfigError(f"stages.{self.name}: {self.states.folder} is of other code ({other}); remove it to begin anew")
        for name, part in self.state.items():
            part.load_state_dict(saved[name])
        self.log.display.say(f"[{self.name}] goes on after step {self.step}")

    def _keep(self) -> None:
        """Write the state, if it is time to."""
        states = self.states if self.state else None
        asked, due = world.first(lambda: (self.stop.number or world.stop_asked(), states is not None and states.due(self.step)))
        if states is not None and (asked or due):
            with world.phase("saving the state"):
                states.write(self.step, {name: part.state_dict() for name, part in self.state.items()}, self.rows)
        if asked and (self.stop.waits or not self.stop.number):
            raise KeyboardInterrupt(asked)

    def state_dict(self) -> dict[str, Any]:
        """The counters, the best evaluation, and marks of the rows, by which other data is noticed."""
        counts = {"step": self.step, "rollouts": self.rollouts, "best": self.best, "since_best": self.since_best}
        for name, rows in self.rows.items():
            if name not in self.marks:
                self.marks[name] = mark_of(rows)
        return {**counts, "marks": self.marks}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there. Raises ConfigError where rows have changed."""
        for name, rows in self.rows.items():
            self.marks[name] = mark_of(rows)
            if saved["marks"].get(name, self.marks[name]) != self.marks[name]:
                raise ConfigError(
                    f"stages.{self.name}: the rows of @{name.strip('/')} are not those that the stage began with, so it cannot "
                    "go on; put them back, or start a new run"
                )
        self.step, self.rollouts = saved["step"], saved["rollouts"]
        self.best, self.since_best = saved["best"], saved["since_best"]

    def checkpoint(self, name: str) -> None:
        """Write a checkpoint: the models in training in Hugging Face format, and the pools."""
        self.save(self.folder / "checkpoints" / name)

    @world.phase("saving weights")
    def save(self, folder: Path) -> None:
        """Write the policy to a folder, what else is trained below its `models/`, its pools below `buffers/`: rank 0 does."""
        if not world.leads():
            return
        for name, model in self.in_training.items():
            model.save(folder if name == "policy" else folder / "models" / name)
        for name, episodes in self.buffers.items():
            write(folder / "buffers" / f"{name}.jsonl", episodes)

    def judge(self, metrics: dict[str, float], patience: int | None) -> None:
        """Keep the best checkpoint by the recipe's objective; stop after `patience` evaluations without a better one."""
        if self.objective not in metrics:
            return
        value = metrics[self.objective]
        sign = -1.0 if lower_is_better(self.objective) else 1.0
        if self.best is None or sign * value > sign * self.best:
            self.best, self.since_best = value, 0
            self.checkpoint("best")
        else:
            self.since_best += 1
        if patience is not None and self.since_best >= patience:
            self.log.stop(f"{self.objective} has not improved in {patience} evaluations")


def written(source: Component[Any]) -> str:
    """A data set by its name and settings: the same in every process."""
    return f"{source.name} {json.dumps(source.settings, sort_keys=True, default=lambda x: [x.name, x.settings])}"


def checkpoint_name(pick: str) -> str:
    """The folder of `step=80` or of `20%`."""
    return f"step-{int(pick[5:]):06d}" if pick.startswith("step=") else f"at-{pick.removesuffix('%')}-percent"
