"""A run that is killed and resumed is the unbroken run: the same lines of its logs, the same weights, whenever it is killed.

Runs are processes of their own, forked from one that has imported what they need; SIGKILL comes from this process.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["resume_runs"])
TIMES = ("seconds", "tokens_per_second")
EVERY_STEP = {"steps": 1, "minutes": 0, "keep": 2}


def started(config: dict[str, Any], run_dir: Path, **how: Any) -> Any:
    """A process that carries out a run."""
    from resume_runs import carry_out

    process = FORKS.Process(target=carry_out, args=(config, run_dir, run_dir.with_suffix(".txt")), kwargs=how)
    process.start()
    return process


def finish(config: dict[str, Any], run_dir: Path, **how: Any) -> str:
    """Run to the end; all that was said in this directory so far."""
    process = started(config, run_dir, **how)
    process.join()
    text = said(run_dir)
    assert process.exitcode == 0, text
    return text


def said(run_dir: Path) -> str:
    return run_dir.with_suffix(".txt").read_text()


def kill_when(process: Any, reached: Callable[[], bool], number: int = signal.SIGKILL) -> bool:
    """Send a signal once something is the case; whether the process still ran, stopped meanwhile, when it was so."""
    while process.is_alive():
        if reached():
            os.kill(process.pid, signal.SIGSTOP)
            settle(process.pid)
            held = reached()
            if held:
                os.kill(process.pid, number)
            os.kill(process.pid, signal.SIGCONT)
            if held:
                process.join()
                return True
        time.sleep(0.0005)
    return False


def settle(pid: int) -> None:
    """Wait until a process that was told to stop has stopped, or is gone."""
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "TZX":
        time.sleep(0.0005)


def lines(run_dir: Path, stage: str = "rl") -> int:
    path = run_dir / stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def record(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, but for what a clock says and the run's own name."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run_dir.rglob("*") if p.is_file() and p.parent != run_dir):
        name = str(path.relative_to(run_dir))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        elif path.suffix == ".safetensors":  # by content: the order of a header's metadata is any
            weights = load_file(path)
            found[name] = hashlib.sha256(b"".join(k.encode() + weights[k].tobytes() for k in sorted(weights))).hexdigest()
        elif path.suffix == ".jsonl":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "DONE":
            found[name] = {k: v for k, v in json.loads(path.read_text())["summary"].items() if k not in TIMES}
        else:
            found[name] = ""
    assert not list(run_dir.glob("*/state"))
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The record of a run that nothing happens to, and that writes no state."""

    @cache
    def made(kind: str, steps: int = 0) -> dict[str, Any]:
        from resume_runs import config_of

        run_dir = tmp_path_factory.mktemp("unbroken") / f"{kind}{steps}"
        finish(config_of(kind, {"minutes": 0}, steps), run_dir)
        return record(run_dir)

    return made


def config(kind: str, save: dict[str, Any] | None = None, steps: int = 0) -> dict[str, Any]:
    from resume_runs import config_of

    return config_of(kind, save or EVERY_STEP, steps)


# --------------------------------------------------------------------------- killed once, after k steps
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("kind", ["fit", "online", "everything", "collect"])
def test_killed_after_k_steps(kind: str, k: int, unbroken: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_dir, made = tmp_path / "run", config(kind)
    state = run_dir / "rl" / "state" / f"step-{k:06d}"
    assert kill_when(started(made, run_dir), state.exists)
    text = finish(made, run_dir, resume=True)
    after = int(text.partition("[rl] goes on after step ")[2].split()[0])
    assert k <= after <= k + 1
    assert record(run_dir) == unbroken(kind)


@pytest.mark.parametrize("stage", ["sft", "loop-1-dpo", "loop-2-pairs"])
def test_rounds_of_stages_killed_within_one(stage: str, unbroken: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_dir, made = tmp_path / "run", config("repeat")
    assert kill_when(started(made, run_dir), (run_dir / stage / "state" / "step-000001").exists)
    text = finish(made, run_dir, resume=True)
    assert f"[{stage}] goes on after step " in text
    assert record(run_dir) == unbroken("repeat")


# --------------------------------------------------------------------------- killed at any moment
def test_killed_at_any_time_over_twenty_times(unbroken: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Random times, most of them within a step; at the latest two steps after the start, so that the run outlives them."""
    run_dir, made, rng = tmp_path / "run", config("everything", steps=50), random.Random(7)
    kills = 0
    while kills < 22:
        before, process = lines(run_dir), started(made, run_dir)
        deadline = time.monotonic() + rng.uniform(0.0, 1.5)
        kills += kill_when(process, lambda: lines(run_dir) >= before + 2 or time.monotonic() >= deadline)  # noqa: B023
        assert process.exitcode == -signal.SIGKILL, said(run_dir)
    finish(made, run_dir)
    assert record(run_dir) == unbroken("everything", 50)


@pytest.mark.parametrize("kind", ["fit", "everything"])
def test_killed_while_a_state_is_written(kind: str, unbroken: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_dir, made = tmp_path / "run", config(kind)
    states = run_dir / "rl" / "state"
    for step in (1, 4, 7):  # the state of this step is begun, and no more
        beside, whole = states / f"step-{step:06d}.partial", states / f"step-{step:06d}"
        assert kill_when(started(made, run_dir), lambda: beside.exists() and not whole.exists())  # noqa: B023
        assert not whole.exists()
    text = finish(made, run_dir)
    assert "skipped" not in text  # half a state is not taken for one
    assert record(run_dir) == unbroken(kind)


def test_killed_while_a_rollout_is_paid(unbroken: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_dir, made = tmp_path / "run", config("online")
    for step in (2, 5):
        process = started(made, run_dir)
        mark = run_dir.with_suffix(".playing")
        assert kill_when(process, lambda: lines(run_dir) >= step and mark.exists())  # noqa: B023
        mark.unlink()
    finish(made, run_dir)
    assert record(run_dir) == unbroken("online")


# --------------------------------------------------------------------------- what can be wrong with a state
def killed(run_dir: Path, made: dict[str, Any], step: int) -> list[Path]:
    """The states of a run that was killed after `step`, newest first."""
    assert kill_when(started(made, run_dir), (run_dir / "rl" / "state" / f"step-{step:06d}").exists)
    return sorted(run_dir.glob("rl/state/step-??????"), reverse=True)


def truncate(path: Path) -> None:
    (path / "tensors.safetensors").write_bytes((path / "tensors.safetensors").read_bytes()[:100])


def flip(path: Path) -> None:
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def unmark(path: Path) -> None:
    (path / "manifest.json").unlink()


def lose_lines(path: Path) -> None:
    size = json.loads((path / "manifest.json").read_text())["logs"]["metrics.jsonl"]
    os.truncate(path.parents[1] / "metrics.jsonl", size - 1)


BROKEN = {
    truncate: "tensors.safetensors has 100 bytes instead of ",
    flip: "tensors.safetensors is not what was written",
    unmark: "manifest.json is missing",
    lose_lines: "metrics.jsonl has lost lines",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__)
def test_a_state_that_is_not_whole_is_skipped(
    breaks: Callable[[Path], None], unbroken: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    newest, before, *_ = killed(run_dir, config("everything"), 4)  # that of before may not be removed yet
    breaks(newest)
    text = finish(config("everything"), run_dir)
    step = int(newest.name[5:])
    skipped = next(line for line in text.splitlines() if "skipped" in line)
    assert skipped.startswith(f"! the state of step {step} is skipped: ")
    assert BROKEN[breaks] in skipped
    assert f"[rl] goes on after step {int(before.name[5:])}\n" in text
    assert record(run_dir) == unbroken("everything")


def test_without_a_whole_state_the_stage_begins_anew(unbroken: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    states = killed(run_dir, config("fit"), 3)
    for path in states:
        truncate(path)
    text = finish(config("fit"), run_dir)
    assert text.count("is skipped") == len(states) >= 2
    assert "goes on" not in text
    assert record(run_dir) == unbroken("fit")


def test_a_disk_that_takes_no_state_leaves_the_last_one(unbroken: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; the last good state is that of before the limit."""
    run_dir, made = tmp_path / "run", config("everything")
    newest = killed(run_dir, made, 3)[0]
    size = (newest / "tensors.safetensors").stat().st_size
    process = started(made, run_dir, file_size=size - 1000)
    tries = "could not be written"
    assert kill_when(process, lambda: said(run_dir).count(tries) >= 2)
    lines_ = [line for line in said(run_dir).splitlines() if tries in line]
    assert lines_[0].endswith(f"File too large (os error 27)); that of step {int(newest.name[5:])} stays"), lines_
    assert not list(run_dir.glob("rl/state/*.partial"))
    assert newest.is_dir()
    finish(made, run_dir)
    assert record(run_dir) == unbroken("everything")


# --------------------------------------------------------------------------- stopped, not killed
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_after_the_step(
    number: int, status: int, unbroken: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_dir, made = tmp_path / "run", config("everything", {"minutes": 0})
    process = started(made, run_dir)
    kill_when(process, lambda: lines(run_dir) >= 4, number)
    assert process.exitcode == status, said(run_dir)
    (state,) = (run_dir / "rl" / "state").iterdir()
    assert lines(run_dir) == int(state.name[5:]) + 1  # an evaluation, and a line for each step
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"
    finish(made, run_dir, resume=True)
    assert record(run_dir) == unbroken("everything")
    shutil.rmtree(run_dir)
