"""Results as the table of docs/performance.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = (
    "| workload | ratio | spread | rlx tok/s | TRL tok/s (settings) | TRL default | rlx s/step: rollout / update / rest | "
    "TRL s/step: rollout / update / rest | peak GB rlx / TRL | floor / rlx time |"
)


def lines(folder: Path) -> str:
    """A row a result of the folder, then one a measure of memory."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    speed = [row(made) for made in found if made["unit"] != "bytes"]
    text = "\n".join([HEAD, "|" + "---|" * HEAD.count(" | ") + "---|", *speed]) + "\n"
    peaks = [f"* {made['line']}" for made in found if made["unit"] == "bytes"]
    return text + ("\n" + "\n".join(peaks) + "\n" if peaks else "")


def row(made: dict[str, Any]) -> str:
    """One result."""
    rlx, trl, default = made["rlx"], made["trl"], made["trl_default"]
    cells = [
        made["name"],
        f"{made['ratio']:.2f}x",
        f"{made['spread'][0]:.2f}-{made['spread'][1]:.2f}",
        f"{rlx['tokens_per_second']:.0f}",
        f"{trl['tokens_per_second']:.0f} ({trl['setting']})",
        f"{default['tokens_per_second']:.0f}",
        phases(rlx),
        phases(trl),
        f"{rlx['peak_bytes'] / 1e9:.2f} / {trl['peak_bytes'] / 1e9:.2f}",
        f"{100 * rlx['floor']:.0f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def phases(side: dict[str, Any]) -> str:
    """Seconds a step."""
    return " / ".join(f"{side['phases'].get(name, 0.0):.2f}" for name in ("rollout", "update", "rest"))
