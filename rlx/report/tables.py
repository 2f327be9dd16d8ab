"""Runs -> tables of text: what is printed after training, and the same tables for the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from rlx.report.read import Run, StageLog, is_number, lower_is_better, series, value

WIDTH = 100

# Metrics that are shares of 1 and are shown in percent, by the last part of their name.
SHARES = ("accuracy", "sampled_accuracy", "pass@", "maj@", "truncated", "no_signal", "clip_fraction")

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Table:
    """A table of text. The first `left` columns are left-aligned; `notes` are lines that stand below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left: int = 1
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Headline:
    """A result in one line: of what, the result ("71.2 % (sft) -> 91.0 % (rl)"), and how far it goes."""

    what: str
    result: str
    remark: str

    def __str__(self) -> str:
        return f"{self.what}: {self.result}" + (f" ({self.remark})" if self.remark else "")


# --------------------------------------------------------------------------- printed
def final_table(run: Run) -> str:
    """What a run reached, as plain text: each evaluated policy with 95 % intervals, then each trained stage."""
    return "\n\n".join(text(table) for table in final_tables(run))


def sweep_table(runs: list[Run], objective: str) -> str:
    """The jobs of a sweep and the mean of `objective` over seeds with a 95 % interval per setting, as plain text."""
    return "\n\n".join(text(table) for table in sweep_tables(runs, objective))


def text(table: Table, width: int = WIDTH) -> str:
    """Aligned columns, at most `width` wide: columns that do not fit follow below, with the first one repeated."""
    lines = [_clip(table.title, width)] if table.title else []
    grid = [[_clip(_one_line(cell), width // 2) for cell in row] for row in [table.header, *table.rows]]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.header))]
    for block in _blocks(widths, width):
        for row in grid:
            cells = [row[i].ljust(widths[i]) if i < table.left else row[i].rjust(widths[i]) for i in block]
            lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *(_clip(_one_line(note), width) for note in table.notes)])


# --------------------------------------------------------------------------- one run
def final_tables(run: Run) -> list[Table]:
    """One table per `evaluate` stage and one of the trained stages."""
    evaluated = [_policies(stage) for stage in run.stages if stage.kind == "evaluate" and stage.metrics]
    trained = [stage for stage in run.stages if stage.kind != "evaluate"]
    return evaluated + ([_trained(run, trained)] if trained else [])


def headline(run: Run) -> Headline | None:
    """The last `evaluate` stage's first policy -> the one of the objective's stage (else its last: the others are
    controls); without such a stage the objective's first -> last value.
    """
    objective = str(run.config.get("objective") or "")
    trained = objective.partition("/")[0]
    for stage in reversed(run.stages):
        if stage.kind == "evaluate" and len(stage.metrics) > 1:
            names = metric_names(stage)
            wanted = objective.rpartition("/")[2]
            if names:
                reached = next((row for row in stage.metrics[1:] if row.get("policy") == trained), stage.metrics[-1])
                return _between(stage.name, wanted if wanted in names else names[0], stage.metrics[0], reached)
    before, after = value(run, objective, "first"), value(run, objective, "last")
    if before is None or after is None:
        return None
    result = f"{number(objective, before)} -> {number(objective, after)}"
    return Headline(objective, result, _difference(objective, before, after))


def metric_names(stage: StageLog) -> list[str]:
    """The names of a stage's numeric metrics, in the order of their first appearance; what it has `spent` is none."""
    names = {key: None for row in stage.metrics for key, x in row.items() if is_number(x)}
    extra = ("step", "seconds", "policy", "n")
    return [key for key in names if key not in extra and not key.startswith("spent/") and not key.endswith(("/low", "/high"))]


def is_share(metric: str) -> bool:
    """Whether a metric is a share of 1, shown in percent."""
    return metric.rpartition("/")[2].startswith(SHARES)


def number(metric: str, x: object) -> str:
    """A metric's value: shares in percent, all else with four digits, '-' where there is none."""
    if not is_number(x):
        return "-"
    return f"{100 * x:.1f} %" if is_share(metric) else f"{x:.4g}"


def duration(seconds: object) -> str:
    """Seconds as a reader says them: '8.5 s', '3 min 20 s', '2 h 05 min'."""
    if not is_number(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _policies(stage: StageLog) -> Table:
    names = metric_names(stage)
    sizes = sorted({row["n"] for row in stage.metrics if is_number(row.get("n"))})
    tasks = f" ({' to '.join(f'{n:g}' for n in sizes[:: max(1, len(sizes) - 1)])} tasks)" if sizes else ""
    interval = " with 95 % interval" if any(f"{name}/low" in row for row in stage.metrics for name in names) else ""
    rows = [[str(row.get("policy", "-")), *(_with_interval(row, name) for name in names)] for row in stage.metrics]
    return Table(f"{stage.name}{tasks}{interval}", ["policy", *names], rows)


def _with_interval(row: dict[str, Any], name: str) -> str:
    low, high = row.get(f"{name}/low"), row.get(f"{name}/high")
    if not (is_number(row.get(name)) and is_number(low) and is_number(high)):
        return number(name, row.get(name))
    ends = ", ".join(number(name, x).removesuffix(" %") for x in (low, high))
    return f"{number(name, row[name])} [{ends}]"


def _trained(run: Run, stages: list[StageLog]) -> Table:
    rows = []
    for stage in stages:
        # The loss of an online stage is near 0 whatever happens, so it says nothing beside a reward.
        loss = "-" if series(stage, "reward")[1] else _first_last(run, stage, "loss")
        results = [_first_last(run, stage, "reward"), _first_last(run, stage, "eval/accuracy"), loss]
        spent = value(run, f"{stage.name}/seconds", "last")
        rows.append([stage.name, stage.kind or "-", _progress(run, stage), duration(spent), *results])
    header = ["stage", "kind", "steps", "time", "reward", "eval/accuracy", "loss"]
    kept = [i for i in range(len(header)) if i < 4 or any(row[i] != "-" for row in rows)]
    return Table("first -> last", [header[i] for i in kept], [[row[i] for i in kept] for row in rows], left=2)


def _progress(run: Run, stage: StageLog) -> str:
    if not stage.metrics:
        if stage.done:
            return "done"
        status = str(run.info.get("status"))
        return "not started" if not stage.begun else status if status in ("interrupted", "failed") else "begun"
    step = stage.metrics[-1].get("step", "-")
    stages = run.config.get("stages")
    config = stages.get(stage.name) if isinstance(stages, dict) else None
    planned = config.get("steps") if isinstance(config, dict) else None
    return f"{step}" if stage.done or planned is None else f"{step} of {planned}"


def _first_last(run: Run, stage: StageLog, key: str) -> str:
    first, last = (value(run, f"{stage.name}/{key}", at) for at in ("first", "last"))
    return "-" if first is None else f"{number(key, first)} -> {number(key, last)}"


def _between(stage: str, name: str, first: dict[str, Any], last: dict[str, Any]) -> Headline:
    remark = ""
    if is_number(first.get(name)) and is_number(last.get(name)):
        remark = _difference(name, first[name], last[name])
    ends = [x for row in (first, last) for end in ("low", "high") if is_number(x := row.get(f"{name}/{end}"))]
    if len(ends) == 4:
        apart = max(ends[0], ends[2]) > min(ends[1], ends[3])
        remark += f"; the 95 % intervals {'do not overlap' if apart else 'overlap'}"
    before, after = (f"{number(name, row.get(name))} ({row.get('policy', '-')})" for row in (first, last))
    return Headline(f"{stage} {name}", f"{before} -> {after}", remark)


def _difference(metric: str, before: float, after: float) -> str:
    return f"{100 * (after - before):+.1f} points" if is_share(metric) else f"{after - before:+.4g}"


# --------------------------------------------------------------------------- a sweep
def sweep_tables(runs: list[Run], objective: str) -> list[Table]:
    """The jobs, with the first line of the error of a failed one, and the settings with their mean over seeds."""
    jobs, errors = [], []
    shared = set.intersection(*(set(_overrides(run)) for run in runs)) if len(runs) > 1 else set()
    for run in runs:
        status = str(run.info.get("status", "unknown"))
        result = number(objective, result_of(run, objective))
        overrides = " ".join(o for o in _overrides(run) if o not in shared) or "-"
        jobs.append([run.path.name, status, overrides, result, duration(run.info.get("seconds"))])
        if status == "failed":
            error = str(run.info.get("error") or "").strip() or "no error recorded"
            errors.append(f"{run.path.name} failed: {error.splitlines()[0]}")
    rows = []
    for name, members in settings(runs).items():
        results = [x for run in members if (x := result_of(run, objective)) is not None]
        count = f"{len(results)}" if len(results) == len(members) else f"{len(results)} of {len(members)}"
        rows.append([name, count, spread(objective, results)])
    return [
        Table("jobs", ["job", "status", "overrides", objective, "time"], jobs, left=3, notes=errors),
        Table("settings: mean +- 95 % interval over seeds", ["setting", "seeds", objective], rows),
    ]


def sweep_headline(runs: list[Run], objective: str) -> Headline | None:
    """The setting with the best mean of `objective` over its seeds; None before any job has finished."""
    results = {
        name: found
        for name, members in settings(runs).items()
        if (found := [x for run in members if (x := result_of(run, objective)) is not None])
    }
    if not results:
        return None
    best = (min if lower_is_better(objective) else max)(results, key=lambda name: fmean(results[name]))
    what = f"{objective}, best of {len(results)} settings" if len(results) > 1 else objective
    over = f", mean over {len(results[best])} seeds with 95 % interval" if len(results[best]) > 1 else ""
    return Headline(what, spread(objective, results[best]), best + over)


def settings(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by their overrides without the seed; overrides that all settings share are left out of the names."""
    overrides = [tuple(o for o in _overrides(run) if o.partition("=")[0] != "seed") for run in runs]
    shared = set.intersection(*map(set, overrides)) if len(set(overrides)) > 1 else set()
    groups: dict[str, list[Run]] = {}
    for run, mine in zip(runs, overrides, strict=True):
        groups.setdefault(" ".join(o for o in mine if o not in shared) or "no override", []).append(run)
    return groups


def result_of(run: Run, objective: str) -> float | None:
    """The objective that a finished run reports, or the metric's last value; None for a run that did not finish."""
    if run.info.get("status") != "finished":
        return None
    reported = run.info.get("objective")
    if objective == run.config.get("objective") and is_number(reported):
        return float(reported)
    return value(run, objective, "last")


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval, t(n - 1) s / sqrt(n) with s of n - 1; nan half-width for one value."""
    n = len(values)
    if n < 2:
        return fmean(values), math.nan
    return fmean(values), student_t(n - 1) * stdev(values) / math.sqrt(n)


def student_t(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; past 30 degrees of freedom its expansion in 1/freedom (error < 1e-3)."""
    return T_95[freedom - 1] if freedom <= len(T_95) else 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2


def spread(metric: str, values: list[float]) -> str:
    """Mean and 95 % interval of a metric over seeds, as text."""
    if not values:
        return "-"
    mean, half = mean_interval(values)
    if math.isnan(half):
        return f"{number(metric, mean)} (one seed)"
    return f"{100 * mean:.1f} +- {100 * half:.1f} %" if is_share(metric) else f"{mean:.4g} +- {half:.2g}"


def _overrides(run: Run) -> list[str]:
    """The overrides as the user gave them, without Hydra's leading + signs and the place that the run is in."""
    given = run.info.get("overrides")
    plain = [str(override).lstrip("+") for override in given] if isinstance(given, list) else []
    return [override for override in plain if not override.startswith("run_dir=")]


# --------------------------------------------------------------------------- text
def _blocks(widths: list[int], width: int) -> list[list[int]]:
    """Columns in blocks that fit `width`, each led by column 0."""
    blocks, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + 2 + widths[i] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + widths[i]
    return blocks


def _one_line(cell: str) -> str:
    """Plain ASCII on one line: error texts and names can hold anything."""
    return " ".join(cell.split()).encode("ascii", "backslashreplace").decode()


def _clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."
