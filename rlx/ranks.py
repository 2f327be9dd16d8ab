"""The process that starts the ranks of a run and waits for them: it writes the resolved config, and tells how they ended.

`FOLDER` beside the run directory is where they meet, on every machine: job.json for the ranks, and from each of them
rank-N.phase (what it is doing), rank-N.log (what it says on stderr), rank-N.stacks and rank-N.error. `stop` asks them to end.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlx.launch import Launch, chosen_gpus, visible_gpus
from rlx.stopping import Stop, stoppable
from rlx.types import ConfigError, Failed

# What an error says of how it all began: a rank's own, a rank that is gone without a word (killed, maybe because another
# had failed), and one that only knows that another is gone.
OWN, GONE, LOST = 0, 1, 2
PATIENCE = 5.0  # seconds that the other ranks have to end by themselves


class OutOfMemory(Failed):
    """A rank had too little memory for the units of the token budget."""


def train_in_ranks(launch: Launch, job: Mapping[str, Any], run_dir: Path) -> None:
    """Run a job (see `rlx/worker.py`) in the processes that `launch` says; out of memory, once more with half the budget.

    Raises ConfigError or Failed with what the first rank in trouble said, KeyboardInterrupt where the user ended it.
    """
    gpus = chosen_gpus(launch) if launch.hostfile is None else []
    try:
        attempt(launch, gpus, {**job, "share": 1.0}, run_dir)
    except OutOfMemory as error:
        print(f"! {error}\n! starts again with half of each stage's token_budget", flush=True)
        (run_dir / "error.txt").unlink(missing_ok=True)
        attempt(launch, gpus, {**job, "share": 0.5}, run_dir)


def attempt(launch: Launch, gpus: list[str], job: Mapping[str, Any], run_dir: Path) -> None:
    """Start the ranks and wait until they have ended."""
    folder = run_dir.with_name(f"{run_dir.name}.ranks-{os.getpid()}")
    remove_left(run_dir)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir={run_dir}: its parent cannot be written ({error.strerror}); choose another with run_dir=DIR"
        ) from error
    whole = {**job, "run_dir": str(run_dir), "parent": os.getpid(), "host": socket.gethostname()}
    (folder / "job.json").write_text(json.dumps(whole), encoding="utf-8")
    try:
        with stoppable() as stop:
            stop.waits = True  # for the ranks to end after their step
            child = subprocess.Popen(
                command(launch, gpus, folder), env=environment(len(gpus)), stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                status = wait(child, folder, stop)
            finally:
                kill(child)
        if status and stop.number and not any(folder.glob("rank-*.error")):
            raise KeyboardInterrupt(stop.number)
        if status:
            raise trouble(folder, status, run_dir)
    except KeyboardInterrupt:
        note(run_dir, "interrupted", "before the end of a step")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left(run_dir: Path) -> None:
    """Remove the folders of earlier starts whose process was killed on this machine."""
    for path in run_dir.parent.glob("*.ranks-*/job.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            job = json.loads(path.read_text(encoding="utf-8"))
            ours = path.parent.name.startswith(f"{run_dir.name}.ranks-") and job["host"] == socket.gethostname()
            if ours and not alive(job["parent"]):
                shutil.rmtree(path.parent, ignore_errors=True)


def command(launch: Launch, gpus: list[str], folder: Path) -> list[str]:
    """What starts the ranks: DeepSpeed's launcher of one machine, or with a hostfile its runner, which goes to the others."""
    if launch.hostfile is None:
        world = base64.urlsafe_b64encode(json.dumps({"localhost": gpus}).encode()).decode()
        start = ["deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    else:
        start = ["deepspeed.launcher.runner", f"--hostfile={Path(launch.hostfile).expanduser()}", "--force_multi"]
        start += [f"--num_gpus={launch.gpus}"] if launch.gpus is not None else []
    settings = [f"--master_port={free_port()}", "--no_local_rank", "--log_level=critical", "--module", "rlx.worker"]
    return [sys.executable, "-m", *start, *settings, str(folder.resolve())]


def environment(ranks: int) -> dict[str, str]:
    """The ranks' environment. On a CPU they share its cores."""
    own = dict(os.environ)
    own.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, ranks))))
    if not visible_gpus():
        own["DS_ACCELERATOR"] = "cpu"
    return own


def free_port() -> int:
    """A port that nobody listens on, so that several runs fit on one machine."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def wait(child: subprocess.Popen[bytes], folder: Path, stop: Stop) -> int:
    """The launcher's exit status. The ranks are told of `stop`; where one is in trouble, the others get some seconds to end."""
    deadline = float("inf")
    while child.poll() is None and time.monotonic() < deadline:
        if stop.number and not (folder / "stop").exists():
            beside = folder / "stop.partial"
            beside.write_text(str(stop.number), encoding="utf-8")
            beside.rename(folder / "stop")
        if deadline == float("inf") and any(folder.glob("rank-*.error")):
            note_the_dead(folder)
            deadline = time.monotonic() + PATIENCE
        time.sleep(0.1)
    return child.returncode if child.poll() is not None else 1


def kill(child: subprocess.Popen[bytes]) -> None:
    """End the launcher and all ranks of this machine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that has ended and that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except PermissionError:  # another user's
        return True
    except OSError as error:  # gone; or a system without /proc
        return sys.platform != "linux" and not isinstance(error, ProcessLookupError)


def note_the_dead(folder: Path) -> None:
    """Write an error for each rank of this machine that has died without a word: its neighbours only know that it is gone."""
    for path in folder.glob("rank-*.pid"):
        pid, _, host = path.read_text(encoding="utf-8").partition(" ")
        error = path.with_suffix(".error")
        told = error.exists() or stacks(path.with_suffix(".stacks"))
        if host == socket.gethostname() and not alive(int(pid)) and not told:
            number = path.stem.removeprefix("rank-")
            text = f"rank {number} has died (killed from outside, or out of memory) in {phase_of(folder, number)}"
            record = {"kind": GONE, "time": 0.0, "status": 1, "message": text + tail(folder, number), "traceback": ""}
            error.write_text(json.dumps(record), encoding="utf-8")


def trouble(folder: Path, status: int, run_dir: Path) -> Exception:
    """What went wrong first, as the error to raise; it is in run.json as well."""
    note_the_dead(folder)
    paths = folder.glob("rank-*.error")
    errors: list[dict[str, Any]] = [{**json.loads(path.read_text(encoding="utf-8")), "by": path.stem} for path in paths]
    errors += stall(folder)
    last: dict[str, Any] = {
        "status": 1,
        "message": f"the ranks ended with status {status}" + tail(folder, "0"),
        "traceback": "",
    }
    error = min(errors, key=lambda e: (int(e["kind"]), float(e["time"])), default=last)
    if error.get("by") != "rank-0" or error["kind"] != OWN:  # what rank 0 raised it has noted, if the directory is this run's
        note(run_dir, "failed", error["message"], error["traceback"])
    if error["status"] == 2:
        return ConfigError(error["message"])
    return (OutOfMemory if error.get("memory") else Failed)(error["message"], error["status"])


def note(run_dir: Path, status: str, error: str, traceback: str = "") -> None:
    """Say in run.json, and in error.txt where it failed, how a run ended that could not say so itself."""
    path = run_dir / "run.json"
    with contextlib.suppress(OSError):  # the disk may be what failed, and there may be no run yet
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["status"] != "running" and (info["status"], status) != ("failed", "failed"):
            return
        beside = path.with_name(path.name + ".partial")
        beside.write_text(json.dumps({**info, "status": status, "error": error}, indent=1), encoding="utf-8")
        beside.replace(path)
        if status == "failed":
            (run_dir / "error.txt").write_text(traceback or error, encoding="utf-8")


def stall(folder: Path) -> list[dict[str, Any]]:
    """The error of ranks that made no progress, if there are such: what each rank was doing, and where the culprit was.

    The others wait for it in a collective; where all do, it is the one whose time was over first.
    """
    found = [path for path in folder.glob("rank-*.stacks") if stacks(path)]
    if not any(path.read_text(encoding="utf-8").startswith("Timeout") for path in found):
        return []  # the launcher has ended them
    path = min(found, key=lambda path: ("torch/distributed" in stacks(path), path.stat().st_mtime))
    number = path.stem.removeprefix("rank-")
    names = sorted(p.stem.removeprefix("rank-") for p in folder.glob("rank-*.phase"))
    phases = "".join(f"\nrank {name}: {phase_of(folder, name)}" for name in names)
    said = f"rank {number} made no progress in {phase_of(folder, number)} for launch.timeout seconds{phases}"
    began = min(path.stat().st_mtime for path in found)
    return [{"kind": OWN, "time": began, "status": 1, "message": f"{said}\n{stacks(path)}", "traceback": ""}]


def stacks(path: Path) -> str:
    """What faulthandler wrote when a rank was ended, without the thread that looks after the parent; empty before."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return "\n\n".join(part for part in text.strip().split("\n\n") if " in end_with" not in part)


def phase_of(folder: Path, number: str) -> str:
    """What a rank was doing."""
    path = folder / f"rank-{number}.phase"
    return path.read_text(encoding="utf-8") if path.is_file() else "its start"


def tail(folder: Path, number: str, lines: int = 20) -> str:
    """The last that a rank said on stderr."""
    path = folder / f"rank-{number}.log"
    said = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:] if path.is_file() else []
    return "\n" + "\n".join(said) if said else ""
