"""A plan on disk: stages in order, each once, with everything that is needed to understand and repeat it beside it."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlx import __version__, offload, world
from rlx.build import hint
from rlx.health import health
from rlx.launch import launch_of
from rlx.learner import MakeLearner, TorchLearner
from rlx.paths import PACKAGE, writable
from rlx.plan import Plan
from rlx.resume import States, sync, sync_all
from rlx.rewards import pool
from rlx.source import code_hash
from rlx.stages.context import Context
from rlx.stopping import Stop, stoppable
from rlx.track import LOGS, Display, Lines, Live, Log, NoTracker, Tracker, Wandb
from rlx.types import ConfigError, Failed
from rlx.zero import learner_of

VERSIONS = ("rlx", "torch", "transformers", "hydra-core", "omegaconf", "deepspeed", "datasets", "peft", "numpy")
LOCK = ".lock"  # held while a process runs the directory
STATE = "state"  # of an unfinished stage, in its folder
# Keys of a config that may differ between two starts of one run.
FREE = {"run_dir", "track", "save", "launch", "claim", "paper", "purpose", "published", "sources", "unverified", "requires"}


# A model with fewer weights than this is faster with one thread than with several: its matrices are so small that waking
# the other threads costs more than they save, and on a machine that is busy elsewhere they wait for each other.
SMALL = 10_000_000


def run(
    plan: Plan,
    run_dir: Path,
    *,
    command: list[str] | None = None,
    overrides: list[str] | None = None,
    sweep: str = "",
    share: float = 1.0,
    resume: bool = False,
) -> dict[str, Any]:
    """Run every stage that is not done, the first of them from its last state; what run.json holds.

    `sweep` names the sweep that this run is a job of. With `resume`, run.json keeps the command that the run was started with.

    Ranks that ran out of memory start again with a `share` of the token budget.

    Raises ConfigError where `run_dir` holds another config's run or cannot be written, Failed where training broke down,
    KeyboardInterrupt(number) on SIGINT and SIGTERM.
    """
    given = {"command": shlex.join(["rlx", *(command or sys.argv)[1:]]), "overrides": overrides or [], "sweep": sweep or None}
    info = world.first(lambda: start(plan, run_dir, {} if resume else given))
    if info["status"] == "finished":
        print(f"{run_dir}: finished before; nothing is run again")
        return info
    tracker = make_tracker(plan, run_dir, info) if world.leads() else NoTracker()
    launch = launch_of(plan.config)
    learner = learner_of(launch.stage, launch.settings(), share)
    offload.enabled = launch.offload_frozen
    display: Display = Live() if sys.stdout.isatty() else Lines()
    began, before = time.monotonic(), float(info.get("seconds") or 0.0)
    done: dict[str, dict[str, float]] = {}
    current = ""

    def close(status: str, error: str | None = None) -> None:
        if not world.leads():
            return
        info.update(status=status, error=error, seconds=round(before + time.monotonic() - began, 2))
        write_json(run_dir / "run.json", info)

    try:
        choose_threads(plan)
        info["hardware"] = hardware()
        with stoppable() if world.size() == 1 else contextlib.nullcontext(Stop()) as stop:  # ranks: world.stop_asked
            for name in plan.stages:
                if asked := world.first(lambda: stop.number or world.stop_asked()):  # while a stage came to its end
                    raise KeyboardInterrupt(asked)
                current = name
                done[name] = run_stage(plan, name, run_dir, display=display, tracker=tracker, learner=learner, stop=stop)
        info["objective"] = objective(plan, done, display)
        close("finished")
    except KeyboardInterrupt:
        close("interrupted", f"in stage {current!r}")
        raise
    except ConfigError as error:
        close("failed", str(error))
        raise
    except Exception as error:
        said = f"stages.{current}: {error if isinstance(error, RuntimeError) else f'{type(error).__name__}: {error}'}"
        with contextlib.suppress(OSError):  # the disk may be what failed
            close("failed", said)
            if world.leads():
                (run_dir / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                said += f"\nthe traceback is in {run_dir / 'error.txt'}"
        if any(not path.suffix for path in (run_dir / current / STATE).glob("step-*")):
            said += f"\nonce that is put right, go on from the last state with: rlx resume {run_dir}"
        raise Failed(said) from error
    finally:
        pool.close()
        tracker.finish()
    return info


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes out of a folder, since two would write the same stages.

    Raises Failed where one is in it, ConfigError where it cannot be written.
    """
    with writable(folder):
        file = (folder / LOCK).open("a+", encoding="utf-8")
    with file as lock:  # the kernel frees it however this process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Failed(f"{folder}: this {what} is being run already (pid {lock.read()}); wait for it to end") from None
        except OSError:  # a file system without locks
            pass
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def quiet() -> None:
    """Silence what says nothing about training: progress bars of reading and writing weights, DeepSpeed's search for a GPU."""
    import torch
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()  # those of downloads stay
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def choose_threads(plan: Plan) -> None:
    """One thread for a small model on the CPU, unless OMP_NUM_THREADS says how many."""
    import torch

    from rlx.models.load import outline

    device = plan.model.settings.get("device", "auto")
    on_cpu = not torch.cuda.is_available() if device == "auto" else device == "cpu"
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        quiet()
        if sum(p.numel() for p in outline(plan.model).module.parameters()) < SMALL:
            torch.set_num_threads(1)


def run_stage(
    plan: Plan,
    name: str,
    run_dir: Path,
    *,
    display: Display,
    tracker: Tracker,
    learner: MakeLearner = TorchLearner,
    stop: Stop | None = None,
) -> dict[str, float]:
    """One stage, unless it is done; its last metrics. It goes on from the last whole state of it, if there is one.

    Its checkpoints are those of that state; without one there are none, since another run's are not to be found.
    """
    folder = run_dir / name
    done = folder / "DONE"
    config = plan.config["stages"][name]
    code = code_hash({**plan.config, "stages": {name: config}})
    record = world.first(lambda: read_json(done))
    if record:
        by = "" if record.get("code") == code else " by other code than this (delete its DONE to run it again)"
        display.say(f"[{name}] done before{by}; skipped")
        if world.leads():
            shutil.rmtree(folder / STATE, ignore_errors=True)
        finished: dict[str, float] = record["summary"]
        return finished
    world.stage(name)
    quiet()
    display.say(f"[{name}] {plan.stages[name].describe()}")
    states = States(folder / STATE, plan.save, [folder / log for log in LOGS], display.say, code)
    if world.leads():
        states.put_back(folder / "checkpoints")
    advice = health if plan.config.get("scale") != "smoke" else no_advice
    sizes = states.found["logs"] if states.found else {}
    log = Log(folder if world.leads() else None, name, display=display, tracker=tracker, health=advice, sizes=sizes)
    tracker.go_on(sum(path.read_bytes().count(b"\n") for path in run_dir.glob("*/metrics.jsonl")))
    stage, key = plan.objective
    stop = stop or Stop()
    ctx = Context(
        run_dir=run_dir,
        name=name,
        seed=plan.config["seed"],
        model=plan.model,
        task=plan.task,
        log=log,
        learner=learner,
        rollout=plan.rollout,
        objective=key if stage == name else "",
        states=states,
        stop=stop,
    )
    if world.leads():
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    try:
        summary = plan.stages[name].run(ctx)
        if world.leads():
            sync_all(folder)  # first: with DONE on the disk, nothing looks at what is in it again
            write_json(done, {"kind": config["kind"], "summary": summary, "code": code})
    except BaseException:
        pool.close()  # python waits for its threads before it calls what is registered for the end
        raise
    finally:
        stop.waits = False
        log.close()
    if world.leads():
        shutil.rmtree(folder / STATE, ignore_errors=True)
    world.barrier()  # what rank 0 wrote is there for the next stage
    return summary


def no_advice(*_: object) -> list[tuple[str, str]]:
    """Nothing: two steps of a random model say nothing about a recipe."""
    return []


def start(plan: Plan, run_dir: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Make the run directory, or take up the one that is there (a finished one as it is); refuse it when its config differs.

    `said`: what run.json holds of the command.
    """
    with writable(run_dir):
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    saved = run_dir / "config.yaml"
    if saved.is_file():
        if changes := differences(yaml.safe_load(saved.read_text()), plan.config):
            shown = "\n".join(f"  {line}" for line in changes[:20])
            raise ConfigError(
                f"run_dir={run_dir} holds a run of another config; start it with the same settings or choose another "
                f"directory. What differs (there -> now):\n{shown}"
            )
        info = read_json(run_dir / "run.json")
        if info.get("status") == "finished":
            return info
        write_text(saved, as_yaml(plan.config))  # `rlx resume` goes on as it was last started: with this `launch`, say
    elif any(path.name != LOCK for path in run_dir.iterdir()):
        raise ConfigError(f"run_dir={run_dir}: is not empty and holds no run; choose an empty or new directory")
    else:
        info = {}
        write_text(saved, as_yaml(plan.config))
    info |= {
        "recipe": plan.config["recipe"],
        "purpose": plan.config.get("purpose", ""),
        **said,
        "status": "running",
        "error": None,
        "seed": plan.config["seed"],
        "created": info.get("created") or datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git_revision(),
        "code": code_hash(plan.config),
        "versions": versions(),
        "hardware": hardware(),
        "objective": info.get("objective"),
        "tracker_id": info.get("tracker_id") or uuid.uuid4().hex[:8],
    }
    write_json(run_dir / "run.json", info)
    return info


def objective(plan: Plan, done: dict[str, dict[str, float]], display: Display) -> float | None:
    """The last value of the recipe's objective."""
    stage, key = plan.objective
    if stage and key not in done[stage]:
        display.say(f"! objective: stage {stage!r} logs no {key!r}{hint(key, done[stage])}")
    return done.get(stage, {}).get(key)


def make_tracker(plan: Plan, run_dir: Path, info: dict[str, Any]) -> Tracker:
    """What `track` names. Sweeps share a group."""
    settings = plan.config.get("track") or {}
    if settings.get("name") != "wandb":
        return NoTracker()
    group = settings.get("group") or info.get("sweep")
    return Wandb({**settings, "group": group}, plan.config, run_dir, info["tracker_id"])


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: there -> now` for each leaf that differs, but for the keys that may."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if path or k not in FREE]
        return [
            line
            for k in keys
            for line in differences(old.get(k, "(absent)"), new.get(k, "(absent)"), f"{path}.{k}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def as_yaml(config: Mapping[str, Any]) -> str:
    """A config as its file has it."""
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def write_text(path: Path, text: str) -> None:
    """Written beside and renamed: a reader sees the old file or the new one, after a loss of power too."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """JSON, written whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def git_revision() -> str | None:
    """The revision of the code that runs, and whether there are local changes to it; None outside a checkout."""
    git = shutil.which("git")
    if git is None or not (PACKAGE.parent / ".git").exists():
        return None

    def ask(*args: str) -> str:
        done = subprocess.run([git, "-C", str(PACKAGE.parent), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = ask("rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    return head + (" (with local changes)" if ask("status", "--porcelain", "--", ":!docs") else "")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide a result."""
    found = {"python": platform.python_version(), "rlx": __version__}
    for name in VERSIONS[1:]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """What it ran on."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = torch.get_num_threads()
    on = [platform.machine(), f"{os.cpu_count()} cores", f"{threads} torch thread{'s' if threads > 1 else ''}"]
    ranks = [f"{world.size()} ranks"] if world.size() > 1 else []
    return ", ".join([*on, *devices, *ranks])
