"""Run directories -> plain records. A run that is still going, or was killed, reads as far as it got.

    run_dir/config.yaml, run.json, <stage>/metrics.jsonl, <stage>/samples.jsonl, <stage>/DONE

A sweep is a folder of run directories with a jobs.jsonl: one line for each job that ended, {job, overrides, exit}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import yaml

from rlx.types import ConfigError

JOBS = "jobs.jsonl"

At = Literal["first", "last", "best", "max", "min"]

# Metrics of which less is better, by the last part of their name; `best` is the minimum of these.
LOWER_IS_BETTER = {
    *("loss", "nll", "perplexity", "truncated", "failures", "length", "wrong_length", "excess_length"),
    *("grad_variance", "no_signal", "trained_no_signal", "kl", "ref_kl", "approx_kl"),
}


@dataclass(frozen=True)
class StageLog:
    """What one stage logged. `metrics` has one mapping per step (in an `evaluate` stage: per policy).

    `begun`: its folder is there.
    """

    name: str
    kind: str
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    done: bool
    begun: bool = True


@dataclass(frozen=True)
class Run:
    """A run directory: `info` is run.json, `config` the resolved config, `stages` in the order of the config."""

    path: Path
    info: dict[str, Any]
    config: dict[str, Any]
    stages: list[StageLog]


def load(path: Path) -> Run | list[Run]:
    """The run in `path`, or the runs in the folder `path` in the order of their names, with the failed jobs of a sweep.

    Raises ConfigError where `path` is neither.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory: expected a run directory or a sweep directory")
    if (path / "run.json").is_file():
        return load_run(path)
    runs = {folder.name: load_run(folder) for folder in path.iterdir() if (folder / "run.json").is_file()}
    runs |= {str(job["job"]): job_run(path, job) for job in _json_lines(path / JOBS)}
    if not runs:
        raise ConfigError(f"{path} is no run: it has no run.json, and no folder in it has one")
    return [runs[name] for name in sorted(runs, key=_by_number)]


def is_sweep(path: Path) -> bool:
    """Whether a folder of runs is a sweep's, and not just a folder."""
    return (path / JOBS).is_file() or (path / "multirun.yaml").is_file()


def job_run(root: Path, job: Mapping[str, Any]) -> Run:
    """A sweep's job as a run; where it failed before its own run began, a run that holds nothing but that."""
    path = root / str(job["job"])
    run = load_run(path)
    if run.info and (job["exit"] == 0) == (run.info.get("status") == "finished"):
        return run
    recipe = next((word.partition("=")[2] for word in job["overrides"] if word.startswith("recipe=")), None)
    error = "before its run began; `rlx check` with its overrides says why"
    return Run(path, {"status": "failed", "recipe": recipe, "overrides": job["overrides"], "error": error}, {}, [])


def load_run(path: Path) -> Run:
    """The run directory `path`; files that are missing or half-written read as empty."""
    info = _json(_text(path / "run.json"))
    config = _yaml(path / "config.yaml")
    declared = {name: node for name, node in _mapping(config.get("stages")).items() if node is not None}
    found = sorted(file.parent.name for file in path.glob("*/metrics.jsonl"))
    names = [*declared, *(name for name in found if name not in declared)]
    return Run(path, info, config, [_stage(path / name, _mapping(declared.get(name))) for name in names])


def value(run: Run, metric: str, at: At) -> float | None:
    """A metric's first, last, best, largest or smallest finite value; None where the run has none.

    `metric` is "stage/metric", as in "rl/eval/accuracy"; for an `evaluate` stage "stage/policy/metric", as in
    "test/rl/accuracy". `best` is the largest value, or the smallest of a metric in `LOWER_IS_BETTER`.
    """
    values = [x for x in rows(run, metric) if not math.isnan(x)]
    if not values:
        return None
    if at == "best":
        at = "min" if lower_is_better(metric) else "max"
    if at in ("first", "last"):
        return values[0 if at == "first" else -1]
    return min(values) if at == "min" else max(values)


def rows(run: Run, metric: str) -> list[float]:
    """A metric at each step that logged it (in an `evaluate` stage: of each policy that it names), in the log's order.

    nan where it was logged without a finite value; `metric` is named as in `value`. Empty where nothing logged it.
    """
    stage_name, _, key = metric.partition("/")
    stage = next((stage for stage in run.stages if stage.name == stage_name), None)
    if stage is None:
        return []
    found = []
    for row in stage.metrics:
        # A policy's name can hold slashes itself (a hub id), so it is looked up, not split off.
        prefix = f"{row.get('policy')}/" if stage.kind == "evaluate" else ""
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name in row:
            found.append(float(row[name]) if is_number(row[name]) else math.nan)
    return found


def series(stage: StageLog, key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric of a stage."""
    rows = [row for row in stage.metrics if is_number(row.get(key)) and is_number(row.get("step"))]
    return [float(row["step"]) for row in rows], [float(row[key]) for row in rows]


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better, by the last part of its name.

    Every loss term is minimised (loss/NAME); the reward `length` is paid, so more of it is better.
    """
    part, _, name = f"/{metric}".rpartition("/")
    if part.endswith("/reward") and name == "length":
        return False
    return name in LOWER_IS_BETTER or part.endswith("/loss")


def is_number(x: object) -> TypeGuard[float]:
    """Whether `x` is a finite number (True and False are none)."""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _stage(folder: Path, config: Mapping[str, Any]) -> StageLog:
    done = folder / "DONE"
    kind = config.get("kind") or _json(_text(done)).get("kind") or ""
    metrics = _merge(_json_lines(folder / "metrics.jsonl"))
    samples = _json_lines(folder / "samples.jsonl")
    return StageLog(folder.name, str(kind), metrics, samples, done.is_file(), folder.is_dir())


def _merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step (and policy): lines of the same step are joined, and the later one's values count."""
    merged: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in rows:
        merged.setdefault((str(row.get("step")), str(row.get("policy"))), {}).update(row)
    return list(merged.values())


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """The lines that hold a JSON object; a line that the end of the process cut is left out."""
    rows = (_json(line) for line in _text(file).split("\n"))
    return [row for row in rows if row]


def _json(text: str) -> dict[str, Any]:
    try:
        return _mapping(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _yaml(file: Path) -> dict[str, Any]:
    try:
        return _mapping(yaml.safe_load(_text(file)))
    except yaml.YAMLError:
        return {}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _mapping(x: object) -> dict[str, Any]:
    return {str(key): item for key, item in x.items()} if isinstance(x, Mapping) else {}


def _by_number(name: str) -> tuple[int, int, str]:
    """Hydra numbers the jobs of a sweep: 2 comes before 10."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
