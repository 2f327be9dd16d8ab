"""A claim's result in words: the verdict table and docs/results/<slug>.md."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlx.claims import METHOD, average, settings_hash, value_at
from rlx.report.result import curve_data, curves, write_result
from rlx.report.tables import mean_interval
from rlx.reproduce import Result, spent
from rlx.run import git_revision, hardware, versions


def record(result: Result, config: Mapping[str, Any], out: Path, *, command: list[str], slug: str) -> tuple[Path, str]:
    """Write the page, the plot and the data; the page's path and its text for the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    plotted = [m for m in result.claim.metrics if any(len(s.metrics) > 1 for s in stages(result, m))]
    if plotted:
        curves(result.runs, plotted, out / f"{slug}.png")
    summary = "\n".join(
        [*heading(result, config), "", *checks(result), "", *arms(result), "", *published(config, result)]
    ).strip()
    sections = [summary, *(["", f"![Curves of every arm and seed]({slug}.png)"] if plotted else [])]
    sections += ["", *tuning(result), *provenance(result, config, command)]
    data = {
        "verdict": result.verdict,
        "seeds": result.seeds,
        "checks": [
            {"check": str(o.check), "values": [finite(v) for v in o.values], "mean": finite(o.mean)} for o in result.outcomes
        ],
        "tuned": result.tuned,
        "curves": curve_data(result.runs, result.claim.metrics),
    }
    return write_result(out, slug, "\n".join(sections) + "\n", data), summary


def finite(value: float) -> float | str:
    """A number as JSON has it: nan and inf are text."""
    return value if math.isfinite(value) else str(value)


def stages(result: Result, metric: str) -> list[Any]:
    """The stage logs that hold a metric."""
    return [s for run in result.runs.values() for s in run.stages if s.name == metric.partition("/")[0]]


def heading(result: Result, config: Mapping[str, Any]) -> list[str]:
    """Settings, claim and verdict; the first line says whether this is the stand-in."""
    name, paper, scale = config["recipe"], config.get("paper") or {}, config.get("scale", "none")
    kind = "published settings" if name.startswith("paper/") else "stand-in"
    title = f"{paper['title']} ({paper['year']}). " if paper else ""
    return [
        f"# {name} ({kind}{'' if scale == 'none' else f', scale={scale}: says nothing about the claim'})",
        "",
        f"{title}Claim: {result.claim.says}.",
        "",
        f"**Verdict: {result.verdict}** ({len(result.seeds)} seeds: {', '.join(map(str, result.seeds))})",
    ]


def checks(result: Result) -> list[str]:
    """A row a check: mean, 95 % interval and every seed."""
    lines = ["| check | mean | 95 % interval | each seed | holds |", "|---|---|---|---|---|"]
    for o in result.outcomes:
        mean, half = interval(o.values)
        holds = (
            "no value"
            if any(map(math.isnan, o.values))
            else "yes"
            if o.in_the_mean and o.on_each_seed
            else "in the mean only"
            if o.in_the_mean
            else "no"
        )
        each = ", ".join(f"{v:.3f}" for v in o.values)
        within = "-" if math.isnan(half) else f"[{mean - half:.3f}, {mean + half:.3f}]"
        lines.append(f"| {o.check} | {mean:.3f} | {within} | {each} | {holds} |")
    if result.claim.margins:
        lines += ["", f"Margins: {result.claim.margins}."]
    return lines


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval; nan where a value is missing, and no width where one is infinite."""
    return mean_interval(values) if all(map(math.isfinite, values)) else (average(values), math.nan)


def arms(result: Result) -> list[str]:
    """A row an arm: the checked and shown values (mean and half of the 95 % interval over seeds) and what was spent."""
    columns = result.claim.columns
    heads = [metric if at == "last" else f"{metric} ({at})" for metric, at in columns]
    lines = ["| arm | " + " | ".join(heads) + " | steps | rollouts |", "|---" * (len(heads) + 3) + "|"]
    for arm in result.claim.names:
        cells = []
        for metric, at in columns:
            mean, half = interval([value_at(result.runs[arm, s], metric, at) for s in result.seeds])
            cells.append("-" if math.isnan(mean) else "never on some seed" if math.isinf(mean) else f"{mean:.3f} +- {half:.3f}")
        total = spent(result.runs[arm, result.seeds[0]])
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {total['steps']:.0f} | {total['rollouts']:.0f} |")
    return [*lines, "", "Last values unless said otherwise; mean and half-width of the 95 % interval over seeds."]


def tuning(result: Result) -> list[str]:
    """What was tried for every arm."""
    if not result.tried:
        return []
    lines = [f"Tuned on seeds {result.claim.tune_seeds} and the dev split, the same values for every arm:", ""]
    lines += ["| arm | setting | objective | chosen |", "|---|---|---|---|"]
    for arm, tried in result.tried.items():
        for setting, score in tried:
            words = ", ".join(f"{k}={v}" for k, v in setting.items())
            lines.append(f"| {arm} | {words} | {score:.3f} | {'yes' if setting == result.tuned[arm] else ''} |")
    return [*lines, ""]


def published(config: Mapping[str, Any], result: Result) -> list[str]:
    """The paper's own figures; beside them ours, where the row names the metric of the recipe that is theirs (`ours`)."""
    rows = config.get("published") or []
    if not rows:
        return []
    lines = ["Published figures:", "", "| setting | metric | control | method | ours | source |", "|---|---|---|---|---|---|"]
    for r in rows:
        ours = "-"
        if r.get("ours"):
            mean, half = interval([value_at(result.runs[METHOD, s], r["ours"], "last") for s in result.seeds])
            ours = f"{100 * mean:.1f} +- {100 * half:.1f}"
        cells = [r["setting"], r["metric"], r.get("control", "-"), r["method"], ours, r["source"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def provenance(result: Result, config: Mapping[str, Any], command: list[str]) -> list[str]:
    """How to run it again, and with what it was run."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [
        f"Command: `{shlex.join(['rlx', *command[1:]])}` ({result.core_seconds:.0f} core-seconds, one thread a process; "
        f"{hardware().partition(',')[0]}).",
        "",
        f"Made at {git_revision() or 'no revision'} by code `{result.code}`, settings `{settings_hash(config)}`, {packages}. "
        "The values behind the plot are in the JSON file of the same name.",
    ]
