"""The result of a claim on paper: docs/results/<slug>.md, its plot and its data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlx.report.read import Run, series


def curves(runs: Mapping[tuple[str, int], Run], metrics: Sequence[str], path: Path) -> None:
    """One panel a metric, one colour an arm, one thin line a seed: a PNG of every curve behind a verdict."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(arm for arm, _ in runs))
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.6 * len(metrics), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        stage, _, key = metric.partition("/")
        for i, arm in enumerate(arms):
            for (name, _), run in runs.items():
                x, y = points(run, stage, key)
                if name == arm and x:
                    axis.plot(x, y, color=f"C{i}", alpha=0.75, linewidth=1.1, marker="." if len(x) < 30 else None)
            axis.plot([], [], color=f"C{i}", label=arm)
        axis.set(xlabel=f"step of {stage}", title=metric)
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def points(run: Run, stage: str, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric of one stage."""
    return next((series(log, key) for log in run.stages if log.name == stage), ([], []))


def curve_data(runs: Mapping[tuple[str, int], Run], metrics: Sequence[str]) -> dict[str, Any]:
    """arm -> seed -> metric -> [[step, value], ...]."""
    data: dict[str, Any] = {}
    for (arm, seed), run in runs.items():
        for metric in metrics:
            stage, _, key = metric.partition("/")
            x, y = points(run, stage, key)
            data.setdefault(arm, {}).setdefault(str(seed), {})[metric] = [list(p) for p in zip(x, y, strict=True)]
    return data


def write_result(folder: Path, slug: str, text: str, data: Mapping[str, Any]) -> Path:
    """The page and the numbers behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{slug}.md"
    page.write_text(text, encoding="utf-8")
    (folder / f"{slug}.json").write_text(json.dumps(data, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return page
