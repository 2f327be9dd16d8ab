"""The record of a stage: metrics.jsonl and samples.jsonl always, a live display, health lines, wandb on request."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from rlx.types import Episode

LOGS = ("metrics.jsonl", "samples.jsonl")

Health = Callable[[str, Mapping[str, float], Sequence[Mapping[str, float]]], list[tuple[str, str]]]


class Tracker(Protocol):
    """A sink beside the files: it may fail, the run goes on."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, stage: str, step: int, rows: list[dict[str, Any]]) -> None: ...

    def go_on(self, rows: int) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    """Tracks nothing."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def samples(self, stage: str, step: int, rows: list[dict[str, Any]]) -> None:
        """Nothing."""

    def go_on(self, rows: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class Wandb:
    """Weights and Biases. Its first failure is told once and ends it; the files are the record, so nothing is lost.

    Rows are numbered as the lines of the run's metrics.jsonl: of a run that goes on it drops those that it has.
    """

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any], run_dir: Path, identity: str) -> None:
        self.dead = False
        self.run: Any = None
        self.axes: set[str] = set()
        self.sent = 0
        self._try(lambda: self._start(settings, config, run_dir, identity))

    def _start(self, settings: Mapping[str, Any], config: Mapping[str, Any], run_dir: Path, identity: str) -> None:
        import wandb

        self.run = wandb.init(
            id=identity,
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
            project=settings.get("project") or "rlx",
            entity=settings.get("entity"),
            group=settings.get("group"),
            name=settings.get("run_name") or run_dir.name,
            mode=settings.get("mode"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics prefixed with their stage, on the stage's own step axis."""
        row = {f"{stage}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step}

        def send() -> None:
            if stage not in self.axes:
                self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self.axes.add(stage)
            self.run.log(row, step=self.sent)

        self.sent += 1
        self._try(send)

    def samples(self, stage: str, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of sample completions."""

        def send() -> None:
            import wandb

            columns = ["step", "prompt", "completion", "reward", "advantage", "rewards"]
            data = [[step, *(str(row.get(c)) for c in columns[1:])] for row in rows]
            self.run.log({f"{stage}/samples": wandb.Table(columns=columns, data=data)}, step=self.sent)

        self._try(send)

    def go_on(self, rows: int) -> None:
        """So many rows are in the files: the next has the number after them."""
        self.sent = rows

    def finish(self) -> None:
        """Close the run."""
        self._try(lambda: self.run.finish())

    def _try(self, act: Callable[[], object]) -> None:
        if self.dead:
            return
        try:
            act()
        except Exception as error:  # whatever a tracker does must not end a training run
            self.dead = True
            print(f"wandb stopped ({type(error).__name__}: {error}); metrics go on in the run directory", file=sys.stderr)


class Display(Protocol):
    """What is shown while a stage runs."""

    def begin(self, stage: str, total: int) -> None: ...

    def show(self, stage: str, step: int, total: int, metrics: Mapping[str, float], left: float) -> None: ...

    def say(self, line: str) -> None: ...

    def end(self) -> None: ...


class Lines:
    """Plain lines, at most one in `every` seconds and stage: for logs and pipes."""

    def __init__(self, every: float = 5.0) -> None:
        self.every = every
        self.shown = 0.0

    def begin(self, stage: str, total: int) -> None:
        """A stage begins."""
        self.shown = 0.0

    def show(self, stage: str, step: int, total: int, metrics: Mapping[str, float], left: float) -> None:
        """One line."""
        if step < total and time.monotonic() - self.shown < self.every and not any(k.startswith("eval/") for k in metrics):
            return
        self.shown = time.monotonic()
        print(f"[{stage}] {step}/{total}  {headline(metrics)}  {clock(left)} left", flush=True)

    def say(self, line: str) -> None:
        """A line of its own."""
        print(line, flush=True)

    def end(self) -> None:
        """Nothing to close."""


class Live:
    """One line a stage that is rewritten in place, for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()
        self.progress: Any = None
        self.measured = ""

    def begin(self, stage: str, total: int) -> None:
        """A bar for the stage."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        numbers = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis"), markup=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(12), MofNCompleteColumn(), numbers)
        self.measured = ""
        self.progress = Progress(*columns, console=self.console, refresh_per_second=4)
        self.progress.add_task(stage, total=total, text="")
        self.progress.start()

    def show(self, stage: str, step: int, total: int, metrics: Mapping[str, float], left: float) -> None:
        """Move the bar; the last evaluation stays in sight."""
        if evals := {k: v for k, v in metrics.items() if k.startswith("eval/")}:
            self.measured = headline(evals)
        now = headline({k: v for k, v in metrics.items() if not k.startswith("eval/")})
        if self.progress is not None:
            parts = (f"{clock(left)} left", self.measured, now)
            self.progress.update(self.progress.task_ids[0], completed=step, text="  ".join(p for p in parts if p))

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.console.print(line, markup=False, highlight=False)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class Log:
    """The log of one stage: every line is flushed, so that a killed run keeps what it had.

    Without a folder, nothing is written. `sizes` says how much of each file a stage that goes on keeps, in bytes: what came
    after its state comes again.
    """

    def __init__(
        self,
        folder: Path | None,
        stage: str,
        *,
        display: Display,
        tracker: Tracker,
        health: Health,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.stage, self.display, self.tracker, self.health = stage, display, tracker, health
        self.folder = folder
        self.metrics_file, self.samples_file = (opened(folder, name, (sizes or {}).get(name, 0)) for name in LOGS)
        self.history: list[dict[str, float]] = []
        self.warned: set[str] = set()
        self.stopped = ""
        self.total = 0
        self.started = self.last = time.monotonic()
        self.seconds = 0.0
        self.last_step = 0

    def begin(self, total: int) -> None:
        """Training begins, or goes on: `total` steps."""
        self.total = total
        self.display.begin(self.stage, total)
        self.last = time.monotonic()
        self.started = self.last - self.seconds

    def step(self, step: int, metrics: Mapping[str, float], episodes: list[Episode], *, policy: str = "") -> None:
        """One line of metrics, and the episodes worth looking at."""
        now = time.monotonic()
        record = dict(metrics)
        if "tokens" in metrics and step > self.last_step:
            record["tokens_per_second"] = metrics["tokens"] * (step - self.last_step) / max(1e-9, now - self.last)
        self.last, self.last_step = now, step
        line = {"step": step, "seconds": round(now - self.started, 3), **({"policy": policy} if policy else {})}
        write(self.metrics_file, line | record)
        rows = [{"step": step, **({"policy": policy} if policy else {}), **sample(e)} for e in episodes]
        for row in rows:
            write(self.samples_file, row)
        prefix = f"{self.stage}/{policy}" if policy else self.stage
        self.tracker.log(prefix, step, record)
        if rows:
            self.tracker.samples(prefix, step, rows)
        left = (now - self.started) / step * (self.total - step) if step else 0.0
        if self.total:
            self.display.show(self.stage, step, self.total, record, left)
        for key, text in self.health(self.stage, record, self.history):
            if key not in self.warned:
                self.warned.add(key)
                self.note(text)
        self.history.append(record)

    def state_dict(self) -> dict[str, Any]:
        """The clock and the advice that was given; what was logged is in the files."""
        return {"seconds": self.last - self.started, "last_step": self.last_step, "warned": sorted(self.warned)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.seconds, self.last_step, self.warned = saved["seconds"], saved["last_step"], set(saved["warned"])
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if self.folder is not None else []
        self.history = [logged(json.loads(line)) for line in lines]

    def note(self, line: str) -> None:
        """Something that the user should know."""
        self.display.say(f"! {line}")

    def stop(self, reason: str) -> None:
        """End the stage after this step."""
        self.stopped = reason
        self.display.say(f"[{self.stage}] stops early: {reason}")

    def close(self) -> None:
        """Close the files and leave the display."""
        self.display.end()
        self.metrics_file.close()
        self.samples_file.close()


def opened(folder: Path | None, name: str, size: int) -> IO[str]:
    """A file to add lines to, after the first `size` bytes of it."""
    if folder is None:
        return Path(os.devnull).open("a", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / name).open("a", encoding="utf-8")
    file.truncate(size)
    return file


def logged(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl."""
    return {k: math.nan if v is None else v for k, v in line.items() if k not in ("step", "seconds", "policy")}


def write(file: Any, row: Mapping[str, Any]) -> None:
    """One JSON line; a number that is not finite becomes null, so that any reader can parse it."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    file.write(json.dumps(clean, ensure_ascii=False, default=str) + "\n")
    file.flush()


def sample(episode: Episode) -> dict[str, Any]:
    """An episode as a row of samples.jsonl."""
    return {
        "prompt": "\n".join(m.text for m in episode.task.prompt),
        "completion": episode.completion,
        "answer": episode.task.answer,
        "rewards": {k: None if math.isnan(v) else v for k, v in episode.rewards.items()},
        "reward": None if math.isnan(episode.reward) else episode.reward,
        "advantage": episode.info.get("advantage"),
        "status": episode.status.value,
    }


# What a line shows, in this order. A policy-gradient loss is near 0 whatever happens, so the reward stands instead of it.
SHOWN = {"reward": "reward", "eval/accuracy": "accuracy", "entropy": "entropy", "tokens_per_second": "tok/s"}


def headline(metrics: Mapping[str, float]) -> str:
    """The few numbers that say how it goes."""
    parts = [f"{label} {short(metrics[key])}" for key, label in SHOWN.items() if key in metrics]
    if "reward" not in metrics and "loss" in metrics:
        parts.insert(0, f"loss {short(metrics['loss'])}")
    parts += [f"{k[5:]} {short(v)}" for k, v in metrics.items() if k.startswith("eval/") and k not in SHOWN]
    if failed := metrics.get("reward/failures"):
        parts.append(f"reward failures {failed:.0f}")
    return "  ".join(parts)


def short(value: float) -> str:
    """A number in a few characters."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
