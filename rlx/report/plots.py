"""Metrics -> charts, and a chart -> SVG for the page or a PNG file. matplotlib draws both."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rlx.report.read import Run, StageLog, series
from rlx.report.tables import is_share, metric_names, settings

# The colours of a PNG. In the SVG each becomes the CSS variable of its name, which the page sets for light and dark.
COLOURS = {
    "ink": "#1d2431",
    "dim": "#6a7383",
    "grid": "#e4e7ec",
    "line0": "#2261c6",
    "line1": "#d46b08",
    "line2": "#17875b",
    "line3": "#b23588",
    "line4": "#7757d2",
    "line5": "#8c6c1a",
}
LINES = [colour for name, colour in COLOURS.items() if name.startswith("line")]
DASHES = ["-", "--", ":"]


@dataclass(frozen=True)
class Line:
    """One line of a chart. `faint` are the raw curves that it was made from; `points` marks every value."""

    label: str
    x: list[float]
    y: list[float]
    points: bool = False
    faint: tuple[tuple[list[float], list[float]], ...] = ()


@dataclass(frozen=True)
class Chart:
    """Lines over optimiser steps, or over `x`. `name` is the file's name, `y` the axis label."""

    name: str
    title: str
    y: str
    lines: list[Line]
    x: str = "step"


# --------------------------------------------------------------------------- which charts
def stage_charts(stage: StageLog) -> tuple[list[Chart], list[Chart]]:
    """A trained stage's charts: what it is judged by, and its diagnostics.

    Judged by: evaluations, then the reward and its parts. The loss is among them only where there is no reward (near 0
    for GRPO whatever happens, it says nothing there); else it is the last of the diagnostics.
    """
    keys = [key for key in metric_names(stage) if stage.kind != "evaluate"]
    evals = [key for key in keys if key.startswith("eval/")]
    parts = [key for key in keys if key.startswith("reward/") and key != "reward/failures"]
    parts = parts if len(parts) > 1 else []  # a single part is the reward itself
    shares = [key for key in evals if is_share(key)]
    groups = [shares] + [[key] for key in evals if key not in shares]
    groups += [["reward"] if "reward" in keys else ["loss"], parts]
    judged = {key for group in groups for key in group}
    rest = sorted((key for key in keys if key not in judged), key=_late)
    main = [_chart(stage, [key for key in group if key in keys]) for group in groups]
    main += [_over_kl(stage, parts, key) for key in keys if parts and key.rpartition("/")[2] == "ref_kl"]
    return [chart for chart in main if chart.lines], [_chart(stage, [key]) for key in rest]


def sweep_charts(runs: list[Run]) -> list[Chart]:
    """What each stage is judged by, one line per setting: the mean over its seeds above each seed's faint curve.

    Runs that failed are left out, and so is a step that not all seeds of a setting have reached.
    """
    alive = [run for run in runs if run.info.get("status") != "failed"]
    groups = settings(alive) if alive else {}
    charts = []
    for name in dict.fromkeys(stage.name for run in alive for stage in run.stages if stage.kind != "evaluate"):
        stages = {label: [s for run in group for s in run.stages if s.name == name] for label, group in groups.items()}
        keys = {key: None for group in stages.values() for stage in group for key in metric_names(stage)}
        first = "reward" if "reward" in keys else "loss"
        for key in [*(key for key in keys if key.startswith("eval/")), *([first] if first in keys else [])]:
            lines = [_mean_line(label, [series(stage, key) for stage in group], key) for label, group in stages.items()]
            charts.append(Chart(_file_name(name, key), f"{name}: {_spoken(key)}", _axis(key), lines))
    return charts


def smooth(y: list[float], window: int) -> list[float]:
    """The mean over the `window` values around each value, fewer at the ends."""
    half = window // 2
    return [fmean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]


def _chart(stage: StageLog, keys: list[str]) -> Chart:
    lines = [_line(_spoken(key), *series(stage, key), key) for key in keys]
    spoken = _spoken(keys[0]) if len(keys) == 1 else "evaluation" if keys and "eval/" in keys[0] else "reward parts"
    name = keys[0] if len(keys) == 1 else spoken
    return Chart(_file_name(stage.name, name), f"{stage.name}: {spoken}", _axis(*keys), lines)


def _over_kl(stage: StageLog, parts: list[str], kl: str) -> Chart:
    """The parts of the reward over the distance from the reference: what is paid against what was meant, if both are parts."""
    at = dict(zip(*series(stage, kl), strict=True))
    lines = []
    for key in parts:
        points = sorted((at[step], y) for step, y in zip(*series(stage, key), strict=True) if step in at)
        lines.append(_line(_spoken(key), [x for x, _ in points], [y for _, y in points], key))
    name = _file_name(stage.name, "reward parts over", kl)
    return Chart(name, f"{stage.name}: reward parts over KL", "reward", lines, x="KL to the reference (nats a token)")


def _line(label: str, x: list[float], y: list[float], key: str) -> Line:
    y = [100 * v for v in y] if is_share(key) else y
    if key.startswith("eval/") or len(y) < 24:
        return Line(label, x, y, points=True)
    return Line(label, x, smooth(y, len(y) // 12), faint=((x, y),))


def _mean_line(label: str, curves: list[tuple[list[float], list[float]]], key: str) -> Line:
    shared = sorted(set.intersection(*(set(x) for x, _ in curves))) if curves else []
    at = [dict(zip(*curve, strict=True)) for curve in curves]
    line = _line(label, shared, [fmean(values[step] for values in at) for step in shared], key)
    scale = 100 if is_share(key) else 1
    faint = tuple((x, [scale * v for v in y]) for x, y in curves) if len(curves) > 1 and line.points else line.faint
    return Line(line.label, line.x, line.y, line.points, faint)


def _late(key: str) -> tuple[int, str]:
    """Diagnostics in the order of the alphabet, but speed and the loss last."""
    return (2 if key.startswith("loss") else 1 if "per_second" in key else 0, key)


def _spoken(key: str) -> str:
    return key.removeprefix("eval/").removeprefix("reward/").replace("_", " ")


def _axis(*keys: str) -> str:
    name = _spoken(keys[0]) if len(keys) == 1 else "share" if keys and "eval/" in keys[0] else "reward"
    return f"{name} (%)" if keys and is_share(keys[0]) else name


def _file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.@-]+", "_", "-".join(parts)).lstrip(".")


# --------------------------------------------------------------------------- drawing
def svg(chart: Chart) -> str:
    """The chart as an <svg> element: text is text, colours are CSS variables, the same chart gives the same bytes."""
    out = io.StringIO()
    _save(chart, out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = out.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return drawn


def png(chart: Chart, folder: Path) -> Path:
    """Write the chart to `folder`/NAME.png, on white."""
    file = folder / f"{chart.name}.png"
    _save(chart, file, format="png", dpi=160, facecolor="white")
    return file


def _save(chart: Chart, out: Any, **how: Any) -> None:
    import matplotlib

    style = {
        **{"font.family": ["sans-serif"], "font.size": 8.5, "text.color": COLOURS["ink"], "text.parse_math": False},
        **{"axes.edgecolor": COLOURS["grid"], "axes.labelcolor": COLOURS["dim"]},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.unicode_minus": False},
        **{"axes.grid": True, "grid.color": COLOURS["grid"], "grid.linewidth": 0.6},
        **{"xtick.color": COLOURS["grid"], "ytick.color": COLOURS["grid"]},
        **{"xtick.labelcolor": COLOURS["dim"], "ytick.labelcolor": COLOURS["dim"]},
        **{"svg.fonttype": "none", "svg.hashsalt": "rlx", "figure.facecolor": "none", "axes.facecolor": "none"},
    }
    with matplotlib.rc_context(style):
        _draw(chart).savefig(out, **how)


def _draw(chart: Chart) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.0, 2.9), layout="constrained")
    axes = figure.add_subplot()
    drawn = []
    for i, line in enumerate(chart.lines):
        colour, dash = LINES[i % len(LINES)], DASHES[i // len(LINES) % len(DASHES)]
        for x, y in line.faint:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
        marker = "o" if line.points else ""
        drawn += axes.plot(line.x, line.y, color=colour, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.6)
    steps = chart.x == "step"
    last = max([1.0 if steps else 1e-9, *(x for line in chart.lines for x in line.x)])
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.set_title(chart.title, loc="left", fontsize=9.5, fontweight="bold")
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=steps, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if len(drawn) > 1:
        labels = [line.label if len(line.label) < 60 else line.label[:57] + "..." for line in chart.lines]
        columns = min(len(labels), 3) if max(map(len, labels)) < 18 else 1
        figure.legend(
            drawn, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8, labelcolor=COLOURS["ink"]
        )
    return figure
