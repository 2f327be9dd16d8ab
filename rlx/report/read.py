"""Run directories -> plain records. A run that is still going, or was killed, reads as far as it got.

    run_dir/config.yaml, run.json, <stage>/metrics.jsonl, <stage>/samples.jsonl, <stage>/DONE

A sweep is a folder of run directories.
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

At = Literal["first", "last", "best", "max", "min"]

# Metrics of which less is better, by the last part of their name; `best` is the minimum of these.
LOWER_IS_BETTER = {"loss", "nll", "perplexity", "truncated", "failures"}


@dataclass(frozen=True)
class StageLog:
    """What one stage logged. `metrics` has one mapping per step (in an `evaluate` stage: per policy)."""

    name: str
    kind: str
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    done: bool


@dataclass(frozen=True)
class Run:
    """A run directory: `info` is run.json, `config` the resolved config, `stages` in the order of the config."""

    path: Path
    info: dict[str, Any]
    config: dict[str, Any]
    stages: list[StageLog]


def load(path: Path) -> Run | list[Run]:
    """The run in `path`, or the runs of the sweep in `path` in the order of their names.

    Raises ConfigError where `path` is neither.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory: expected a run directory or a sweep directory")
    if (path / "run.json").is_file():
        return load_run(path)
    jobs = [folder for folder in path.iterdir() if (folder / "run.json").is_file()]
    if not jobs:
        raise ConfigError(f"{path} is no run: it has no run.json, and no folder in it has one")
    return [load_run(job) for job in sorted(jobs, key=lambda job: _by_number(job.name))]


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
    stage_name, _, key = metric.partition("/")
    stage = next((stage for stage in run.stages if stage.name == stage_name), None)
    if stage is None:
        return None
    rows = stage.metrics
    if stage.kind == "evaluate":
        # A policy's name can hold slashes itself (a hub id), so it is looked up, not split off.
        rows = [row for row in rows if key.startswith(f"{row.get('policy')}/")]
        key = key.removeprefix(f"{rows[0].get('policy')}/") if rows else key
    values = [row[key] for row in rows if is_number(row.get(key))]
    if not values:
        return None
    if at == "best":
        at = "min" if lower_is_better(key) else "max"
    if at in ("first", "last"):
        return float(values[0 if at == "first" else -1])
    return float(min(values) if at == "min" else max(values))


def series(stage: StageLog, key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric of a stage."""
    rows = [row for row in stage.metrics if is_number(row.get(key)) and is_number(row.get("step"))]
    return [float(row["step"]) for row in rows], [float(row[key]) for row in rows]


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better, by the last part of its name."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def is_number(x: object) -> TypeGuard[float]:
    """Whether `x` is a finite number (True and False are none)."""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _stage(folder: Path, config: Mapping[str, Any]) -> StageLog:
    done = folder / "DONE"
    kind = config.get("kind") or _json(_text(done)).get("kind") or ""
    metrics = _merge(_json_lines(folder / "metrics.jsonl"))
    return StageLog(folder.name, str(kind), metrics, _json_lines(folder / "samples.jsonl"), done.is_file())


def _merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step (and policy): a resumed run logs some steps twice, and the later line counts."""
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
