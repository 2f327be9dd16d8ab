"""The parent's end of the workers, and what their passes come to.

No torch here: Linux counts the memory of the process that starts another among the peak of the other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmark.floor import Groups, needed
from benchmark.workloads import Workload

SCRIPTS = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

Pass = dict[str, Any]


class Side:
    """A worker, alive between its passes. It waits while others are measured."""

    def __init__(self, folder: Path, env: Sequence[tuple[str, str]] = (), **asked: Any) -> None:
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
        self.log = (folder / "worker.log").open("a+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.worker", json.dumps({"folder": str(folder), **asked})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": path, **dict(env)},
        )
        self.asked = asked
        self.waits = False

    def next(self, word: str = "") -> Pass:
        """The next pass; the first is the warm-up. Raises RuntimeError with what a worker that died had printed."""
        if self.waits:
            pipe(self.process.stdin).write(f"{word}\n")
            pipe(self.process.stdin).flush()
        line = pipe(self.process.stdout).readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"worker {self.asked} died:\n" + "".join(self.log.readlines()[-30:]))
        self.waits = True
        found: Pass = json.loads(line)
        return found

    def close(self) -> None:
        """Ask for no more."""
        pipe(self.process.stdin).close()
        self.process.wait()
        self.log.close()


def pipe(stream: IO[str] | None) -> IO[str]:
    """A pipe that was asked for."""
    assert stream is not None
    return stream


def once(folder: Path, do: str, **asked: Any) -> dict[str, Any]:
    """What a worker says that has one thing to do."""
    side = Side(folder, do=do, **asked)
    try:
        return side.next()
    finally:
        side.close()


# --------------------------------------------------------------------------- numbers
def tokens(work: Workload, groups: Groups) -> int:
    """Real tokens of a pass: those that were sampled, or every sequence of the data with a prompt of its own."""
    return sum(sum(answers) + (0 if work.kind == "grpo" else p * len(answers)) for p, answers in groups)


def rate(work: Workload, done: Pass, by: str = "seconds") -> float:
    """Real tokens a second, of CPU time or of the wall's."""
    return float(tokens(work, done["groups"]) / done[by])


def middle(work: Workload, passes: Sequence[Pass], flops: float) -> dict[str, Any]:
    """The medians of one side. `floor` is the share of its time that the arithmetic needs at `flops` a second."""
    names = list(dict.fromkeys(name for p in passes for name in p["phases"]))
    return {
        "tokens_per_second": statistics.median(rate(work, p) for p in passes),
        "tokens_per_second_wall": statistics.median(rate(work, p, "wall") for p in passes),
        "seconds_a_step": statistics.median(p["seconds"] for p in passes) / work.steps,
        "phases": {n: statistics.median(p["phases"].get(n, 0.0) for p in passes) / work.steps for n in names},
        "peak_bytes": max(p["peak"] for p in passes),
        "floor": statistics.median(needed(work, p["groups"]) / flops / p["seconds"] for p in passes),
    }
