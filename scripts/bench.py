"""rlx beside TRL: `python scripts/bench.py [WORKLOAD ...]`. See docs/performance.md.

Prints a line a workload, writes runs/bench/NAME.json, and compares each ratio with the baseline in benchmarks/NAME.json:
the exit status is 1 where one fell by more than 5 %. Sides that do not compute the same are not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmark.cuda import limits
from benchmark.sides import Pass, Side, middle, once, rate
from benchmark.table import lines
from benchmark.workloads import CUDA, MEMORY, WORKLOADS, Workload, settings

ROOT = Path(__file__).resolve().parent.parent
BASELINES, RESULTS = ROOT / "benchmarks", ROOT / "runs" / "bench"
AGREE = 1e-5  # loss and gradient, absolute
FALL = 0.05

Made = dict[str, Any]


def main() -> int:
    """Measure what the command line names; the exit status."""
    asked = arguments()
    if asked.table:
        print(lines(BASELINES if any(BASELINES.glob("*.json")) else RESULTS), end="")
        return 0
    kind = "memory" if asked.memory else asked.device
    table = {"cpu": WORKLOADS, "memory": MEMORY, "cuda": CUDA}[kind]
    if unknown := set(asked.names) - set(table):
        raise SystemExit(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(table)}")
    if asked.trl and any(asked.trl not in settings(table[name]) for name in asked.names or table):
        raise SystemExit(f"--trl {asked.trl!r}: there are {', '.join(settings(table[(asked.names or list(table))[0]]))}")
    failed = []
    for name in asked.names or table:
        with tempfile.TemporaryDirectory(prefix="rlx-bench-") as folder:
            work = table[name]
            try:
                made = (
                    memory(work, Path(folder)) if asked.memory else measured(work, kind, Path(folder), asked.pairs, asked.trl)
                )
            except Unequal as error:
                failed.append(str(error))
                continue
        file = f"{name}_memory.json" if asked.memory else f"{name}.json"
        print(made["line"], flush=True)
        if said := complaint(made, BASELINES / file):
            failed.append(said)
        for place in [RESULTS, BASELINES] if asked.save else [RESULTS]:
            place.mkdir(parents=True, exist_ok=True)
            (place / file).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print("\n".join(failed), end="\n" if failed else "")
    return int(bool(failed))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="rlx beside TRL")
    parser.add_argument("names", nargs="*", help="workloads; all without one")
    parser.add_argument("--pairs", type=int, default=5, help="alternating passes of each side (default 5)")
    parser.add_argument("--trl", default="", help="TRL's settings, 'micro 8' say, instead of a scan for the fastest")
    parser.add_argument("--memory", action="store_true", help="peak memory at a vocabulary of 150,000 instead")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", action="store_true", help="make the results the baselines, in benchmarks/")
    parser.add_argument("--table", action="store_true", help="print the baselines as the table of docs/performance.md")
    return parser.parse_args()


def complaint(made: Made, baseline: Path) -> str:
    """That a ratio is worse than the baseline's by more than 5 %. Of memory less is better."""
    if not baseline.is_file():
        return ""
    before, now = json.loads(baseline.read_text(encoding="utf-8"))["ratio"], made["ratio"]
    fell = 1 - (before / now if made["unit"] == "bytes" else now / before)
    return f"{made['name']}: {now:.2f}x is worse than the {before:.2f}x of {baseline.name} by {fell:.0%}" if fell > FALL else ""


class Unequal(RuntimeError):
    """The two sides do not compute the same, so their speeds mean nothing."""


def check(work: Workload, found: dict[str, float]) -> None:
    """Raises Unequal where loss or gradient differ by more than 1e-5, or the gradient is 0."""
    if not (found["loss"] <= AGREE and found["gradient"] <= AGREE < found["largest"]):
        raise Unequal(f"{work.name}: the two sides do not compute the same, so nothing was timed: {found}")


def measured(work: Workload, table: str, folder: Path, pairs: int, best: str) -> Made:
    """Both sides in turn, TRL in its defaults and in its settings `best`; without those, in what a scan finds the fastest."""
    about: dict[str, Any] = {"table": table, "workload": work.name}
    once(folder, "prepare", **about)
    equal = once(folder, "equal", **about) if table == "cpu" else None
    if equal is not None:
        check(work, equal)
    machine = once(folder, "machine", table=table)
    scan: dict[str, float] = {}
    for name, setting in settings(work).items() if not best else ():
        (done,), _ = alternating([Side(folder, setting.env, do="trl", setting=name, **about)], 1)
        scan[name] = rate(work, done[0])
    best = best or max(scan, key=lambda name: scan[name])
    names = dict.fromkeys([best, "default"])
    trl = [Side(folder, settings(work)[name].env, do="trl", setting=name, **about) for name in names]
    passes, syncs = alternating([Side(folder, do="rlx", **about), *trl], pairs, "syncs" if table == "cuda" else "")
    ours, theirs, default = passes[0], passes[1], passes[-1]
    ratios = [rate(work, a) / rate(work, b) for a, b in zip(ours, theirs, strict=True)]
    sides = {
        "rlx": middle(work, ours, machine["flops"]),
        "trl": {"setting": best, **middle(work, theirs, machine["flops"])},
        "trl_default": middle(work, default, machine["flops"]),
    }
    if table == "cuda":
        for name, found, extra in zip(("rlx", "trl"), passes, syncs, strict=False):
            sides[name] |= limits(work, found, machine["flops"], machine["bandwidth"])
            sides[name] |= {"host_syncs_a_step": extra["syncs"] / work.steps}
    ratio, spread = statistics.median(ratios), (min(ratios), max(ratios))
    rates = [sides[name]["tokens_per_second"] for name in ("rlx", "trl")]
    line = (
        f"{work.name} {ratio:.2f}x (rlx {rates[0]:.0f} tok/s, trl {rates[1]:.0f} tok/s, spread {spread[0]:.2f}-{spread[1]:.2f})"
    )
    made = {"name": work.name, "ratio": ratio, "unit": "tokens/s", "spread": spread, "pairs": pairs, "line": line}
    return {**made, **sides, "scan": scan, "equal": equal, "machine": machine}


def alternating(sides: list[Side], pairs: int, last: str = "") -> tuple[list[list[Pass]], list[Pass]]:
    """`pairs` passes of each side after a warm-up of each, one side after the other, in turning order.

    With a word `last`, then one more pass of each that is told so, apart from the others.
    """
    done: list[list[Pass]] = [[] for _ in sides]
    try:
        for side in sides:
            side.next()
        for turn in range(pairs):
            for i in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
                done[i].append(sides[i].next())
        return done, [side.next(last) for side in sides] if last else []
    finally:
        for side in sides:
            side.close()


def memory(work: Workload, folder: Path) -> Made:
    """Peak memory of a process of each side after two passes. The ratio is to the smallest of TRL's settings."""
    about: dict[str, Any] = {"table": "memory", "workload": work.name}
    once(folder, "prepare", **about)
    asked: dict[str, dict[str, Any]] = {name: {"setting": name, "env": s.env} for name, s in settings(work).items()}
    peaks, rates = {}, {}
    for name, more in {"rlx": {}, **asked}.items():
        (done,), _ = alternating([Side(folder, do="trl" if more else "rlx", **more, **about)], 1)
        peaks[name], rates[name] = done[0]["peak"], rate(work, done[0])
    ours = peaks.pop("rlx")
    least = min(peaks, key=lambda name: peaks[name])
    shown = f"rlx {ours / 1e9:.2f} GB, trl {peaks[least] / 1e9:.2f} GB with {least}, {peaks['default'] / 1e9:.2f} GB by default"
    line = f"{work.name} memory {ours / peaks[least]:.2f}x ({shown})"
    made = {"name": work.name, "ratio": ours / peaks[least], "unit": "bytes", "line": line, "rlx": ours, "trl": peaks}
    return {**made, "tokens_per_second": rates, "machine": once(folder, "machine", table="memory")}


if __name__ == "__main__":
    raise SystemExit(main())
