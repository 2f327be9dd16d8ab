"""A run or a sweep -> one HTML page that needs no network, and a PNG file of each chart beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlx.report import plots, tables
from rlx.report.read import Run, StageLog, is_number, is_sweep, load
from rlx.types import ConfigError

# What a page shows of a text: a completion can be as long as a model's context.
LONGEST_TEXT = 8000


def write(path: Path, out: Path | None = None) -> Path:
    """Write the report of the run or sweep in `path` to `out` (default: path/report.html) and return where it is.

    The PNG files lie in a folder beside it, named as the page without its ending. Raises ConfigError where `path` is
    neither a run nor a sweep, or `out` does not end in .html.
    """
    found = load(path)
    page = out or path / "report.html"
    if page.suffix != ".html":
        raise ConfigError(f"{page}: expected the name of a page, ending in .html")
    images = page.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    html = render(found, path, images)
    unfinished = page.with_name(page.name + ".part")
    unfinished.write_text(html, encoding="utf-8")
    unfinished.replace(page)
    return page


def render(found: Run | list[Run], path: Path, images: Path) -> str:
    """The page as text; `found` is what lies in `path`, `images` an existing folder for the PNG files."""
    # Completions are whatever a model wrote: autoescape stays on, and only our own SVG is marked as safe.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": tables.number, "cut": cut, "signs": signs}
    content = _run(found, images) if isinstance(found, Run) else _sweep(found, path, images)
    return environment.get_template("page.html.j2").render(name=path.resolve().name, directory=str(path), **content)


def _run(run: Run, images: Path) -> dict[str, Any]:
    sections = []
    for stage in run.stages:
        main, diagnostics = plots.stage_charts(stage)
        if main or diagnostics:
            kind = f" ({stage.kind})" if stage.kind else ""
            sections.append((stage.name + kind, _drawn(main, images), _drawn(diagnostics, images)))
    return {
        **_about(run),
        "status": str(run.info.get("status", "unknown")),
        "error": str(run.info.get("error") or ""),
        "headline": tables.headline(run),
        "facts": _facts(run, time=tables.duration(run.info.get("seconds")), seed=run.info.get("seed")),
        "tables": tables.final_tables(run),
        "sections": sections,
        "samples": [(f"{stage.name}, {at}", pick(rows)) for stage in run.stages for at, rows in _sampled(stage)],
    }


def _sweep(runs: list[Run], path: Path, images: Path) -> dict[str, Any]:
    objective = next((str(run.config["objective"]) for run in runs if run.config.get("objective")), "objective")
    by_stage: dict[str, list[plots.Chart]] = {}
    for chart in plots.sweep_charts(runs):
        by_stage.setdefault(chart.title.partition(":")[0], []).append(chart)
    states = [str(run.info.get("status", "unknown")) for run in runs]
    what = f"sweep of {len(runs)}" if is_sweep(path) else f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    one = next((run for run in runs if run.config), runs[0])  # a job that failed early has no config
    return {
        **_about(one),
        "status": f"{what}: {counts}",
        "error": "",
        "headline": tables.sweep_headline(runs, objective),
        "facts": _facts(one, objective=objective, settings=len(tables.settings(runs))),
        "tables": list(reversed(tables.sweep_tables(runs, objective))),
        "sections": [(stage, _drawn(charts, images), []) for stage, charts in by_stage.items()],
        "samples": [],
    }


def _about(run: Run) -> dict[str, Any]:
    paper = run.config.get("paper")
    paper = paper if isinstance(paper, Mapping) else {}
    versions = run.info.get("versions")
    provenance = {
        "command": run.info.get("command"),
        "git": run.info.get("git") or "not a git repository",
        "created": run.info.get("created"),
        "overrides": " ".join(map(str, run.info.get("overrides") or [])),
        **(versions if isinstance(versions, Mapping) else {}),
    }
    return {
        "recipe": str(run.info.get("recipe") or run.config.get("recipe") or run.path.name),
        "purpose": str(run.info.get("purpose") or run.config.get("purpose") or ""),
        "title": str(run.config.get("title") or ""),
        "paper": ", ".join(str(paper[key]) for key in ("title", "year") if paper.get(key)),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100) if run.config else "",
        "provenance": {key: x for key, x in provenance.items() if x},
    }


def _facts(run: Run, **more: object) -> dict[str, object]:
    model, task = (run.config.get(key) for key in ("model", "task"))
    facts = {
        "model": model.get("name") if isinstance(model, Mapping) else model,
        "task": task.get("name") if isinstance(task, Mapping) else task,
        **more,
        "hardware": run.info.get("hardware"),
    }
    return {key: x for key, x in facts.items() if x not in (None, "", "-")}


def _drawn(charts: list[plots.Chart], images: Path) -> list[tuple[str, Markup]]:
    for chart in charts:
        plots.png(chart, images)
    return [(chart.title, Markup(plots.svg(chart))) for chart in charts]


# --------------------------------------------------------------------------- samples
def pick(samples: list[dict[str, Any]], most: int = 3) -> dict[str, Any]:
    """The `most` highest and lowest samples by reward, and how many of all samples are right."""
    ranked = sorted(samples, key=lambda s: s["reward"] if is_number(s.get("reward")) else float("-inf"), reverse=True)
    shown = ranked if len(ranked) <= 2 * most else ranked[:most] + ranked[-most:]
    verdicts = [verdict for sample in samples if (verdict := right(sample)) is not None]
    return {
        "shown": [{**sample, "right": right(sample), "parts": _parts(sample)} for sample in shown],
        "logged": len(samples),
        "judged": len(verdicts),
        "right": sum(verdicts),
    }


def right(sample: Mapping[str, Any]) -> bool | None:
    """Whether a sample's answer is right: its task's verifier gave 1. None where nothing judged the answer."""
    parts = _parts(sample)
    score: object = parts.get("verifier", parts.get("answer_match"))
    return score >= 1 - 1e-6 if is_number(score) else None


def signs(text: str) -> str:
    """The signs that a text table spells in ASCII."""
    return text.replace("->", "\u2192").replace("+-", "\u00b1")


def cut(x: object) -> str:
    """Text for the page; of a very long one the start, and how much was left out."""
    text = str(x)
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}\n[{len(text) - LONGEST_TEXT} more characters]"


def _parts(sample: Mapping[str, Any]) -> dict[str, Any]:
    parts = sample.get("rewards")
    return dict(parts) if isinstance(parts, Mapping) else {}


def _sampled(stage: StageLog) -> list[tuple[str, list[dict[str, Any]]]]:
    """The samples of the last and the first step that has some; of an `evaluate` stage those of each policy."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in stage.samples:
        at = f"policy {sample['policy']}" if sample.get("policy") else f"step {sample.get('step', '-')}"
        groups.setdefault(at, []).append(sample)
    found = list(groups.items())
    return found if stage.kind == "evaluate" or len(found) < 2 else [found[-1], found[0]]
