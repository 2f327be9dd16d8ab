"""What the commands do: compose, plan, run; one process a job in a sweep."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlx.build import Binder
from rlx.compose import Composed, compose, hydra_multirun, prepare, recipes, store, words
from rlx.launch import Launch, idle_gpus, launch_of
from rlx.paths import default_run_dir, writable
from rlx.plan import Plan, bind_objective, plan
from rlx.ranks import train_in_ranks
from rlx.report.read import JOBS, job_run
from rlx.stopping import stoppable
from rlx.types import ConfigError, Failed

SWEEP = "sweep.json"


def planned(arguments: list[str], extra: Path | None, trust: list[str]) -> tuple[Composed, Plan]:
    """Command line -> plan, with the notices printed."""
    composed = compose(arguments, extra)
    made = plan(composed.config, trusted=trust, swapped=composed.swapped, given=composed.given)
    for line in [*composed.notices, *made.notices]:
        print(f"note: {line}")
    return composed, made


def train(arguments: list[str], extra: Path | None, trust: list[str], *, sweep: str = "") -> None:
    """Run a recipe, then print where the run is and its final table. `sweep` names the sweep that this is a job of."""
    composed = compose(arguments, extra)
    for line in composed.notices:
        print(f"note: {line}")
    given = composed.config.pop("run_dir", None)
    run_dir = Path(str(given)) if given else default_run_dir(composed.config["recipe"])
    known = {"swapped": composed.swapped, "given": composed.given}
    typed = list(sys.argv)
    if sweep:  # an option that nobody types
        at = typed.index("--job-of")
        del typed[at : at + 2]
    words = {"command": typed, "overrides": composed.overrides, "sweep": sweep}
    carry_out(composed.config, known, run_dir, trust, **words)


def resume(run_dir: Path, trust: list[str]) -> None:
    """Go on with a run by the config in its directory."""
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        there = "holds a sweep: start that again with its `rlx train -m` and run_dir" if (run_dir / SWEEP).is_file() else ""
        raise ConfigError(f"{run_dir}: {there or 'holds no run (no config.yaml); expected the directory of one'}")
    carry_out(yaml.safe_load(saved.read_text(encoding="utf-8")), {}, run_dir, trust, resume=True)


def carry_out(config: dict[str, Any], known: Mapping[str, Any], run_dir: Path, trust: list[str], **how: Any) -> None:
    """Run a config in its directory; then print its final table. Raises Failed, with 128 + the signal that stopped it.

    `known`: what `plan` is told of how the config came about; `how`: what `run` notes down.
    """
    from rlx.report.read import load_run
    from rlx.report.tables import final_table

    launch = launch_of(config)
    if idle := idle_gpus(launch):
        print(f"note: {idle}")
    start = run_here if launch.stage is None else functools.partial(run_there, launch)
    try:
        start(config, known, run_dir, trust, how)
    except KeyboardInterrupt as end:
        words = shlex.join(["rlx", "resume", *options(None, trust), str(run_dir)])
        raise Failed(f"interrupted; go on with: {words}", status_of(end)) from None
    print("\n" + final_table(load_run(run_dir)))
    print(f"\nrun directory: {run_dir}\nlook at it:    rlx report {run_dir}")


def run_here(config: dict[str, Any], known: Mapping[str, Any], run_dir: Path, trust: list[str], how: dict[str, Any]) -> None:
    """Run in this process."""
    made = plan(config, trusted=trust, **known)
    for line in made.notices:
        print(f"note: {line}")

    from rlx.run import alone, run

    print(f"run directory: {run_dir}", flush=True)
    with alone(run_dir, "run"):
        run(made, run_dir, **how)


def run_there(
    launch: Launch, config: dict[str, Any], known: Mapping[str, Any], run_dir: Path, trust: list[str], how: dict[str, Any]
) -> None:
    """Run in processes of their own, which get the resolved config and compose nothing."""
    job = {"config": {**config, "launch": dataclasses.asdict(launch)}, "trust": trust, "how": how}
    print(f"run directory: {run_dir}", flush=True)
    train_in_ranks(launch, {**job, "known": {name: sorted(keys) for name, keys in known.items()}}, run_dir)


def status_of(end: KeyboardInterrupt) -> int:
    """A shell's exit status for the signal that interrupted: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + int(end.args[0] if end.args else signal.SIGINT)


def again(arguments: list[str], extra: Path | None, trust: list[str], folder: Path) -> str:
    """The command that takes up a sweep in its directory."""
    kept = [a for a in arguments if not a.startswith("run_dir=")]
    return shlex.join(["rlx", "train", "-m", *options(extra, trust), *kept, f"run_dir={folder}"])


def options(extra: Path | None, trust: list[str]) -> list[str]:
    """The options of a command line as words."""
    return [*(["--recipes", str(extra)] if extra else []), *(word for t in trust for word in ("--trust", t))]


def sweep(arguments: list[str], extra: Path | None, trust: list[str]) -> None:
    """Hydra's multirun: every job is `rlx train` in a process of its own, and a row of the table whether it fails or not.

    Raises Failed where a job failed, ConfigError where the directory holds another sweep's jobs.
    """
    from rlx.report.tables import sweep_table

    known = recipes(extra)
    folder = [a.partition("=")[2] for a in arguments if a.startswith("run_dir=")]
    root = Path(folder[-1] if folder else datetime.datetime.now().strftime("multirun/%Y-%m-%d_%H-%M-%S"))
    given = [a for a in arguments if not a.startswith("run_dir=")]
    texts = prepare(given, known, sweep=True)
    store(known)
    job = functools.partial(sweep_job, root, [sys.executable, "-m", "rlx.cli", "train", *options(extra, trust)])
    with writable(root):
        same_sweep(root, words(given))
        (root / JOBS).unlink(missing_ok=True)
    try:
        with stoppable():
            hydra_multirun([*texts, f'hydra.sweep.dir="{root}"'], job)
    except KeyboardInterrupt as end:
        raise Failed(f"interrupted; go on with: {again(arguments, extra, trust, root)}", status_of(end)) from None
    except ConfigError:
        raise
    except ValueError:  # of a sweeper that looks for the best of its trials where all have failed
        if not ended(root) or any(job["exit"] == 0 for job in ended(root)):
            raise
    jobs = ended(root)
    if not jobs:
        raise ConfigError("the sweep has no jobs: no value matches; `rlx list` shows the recipes")
    runs = [job_run(root, job) for job in sorted(jobs, key=lambda job: int(job["job"]))]
    print("\n" + sweep_table(runs, next((str(r.config["objective"]) for r in runs if r.config.get("objective")), "")))
    print(f"\nsweep directory: {root}\nlook at it:      rlx report {root}")
    if failed := sum(run.info.get("status") != "finished" for run in runs):
        raise Failed(f"{failed} of {len(runs)} jobs failed")


def same_sweep(root: Path, given: list[str]) -> None:
    """Note down what a sweep's directory is of. Raises ConfigError where it holds the jobs of a sweep with other overrides."""
    from rlx.run import FREE, differences, read_json, write_json

    # Where the jobs run changes none of them.
    free = re.compile(rf"\+*({'|'.join(FREE)}|hydra[./]launcher)\b")
    now = {key: value for key, _, value in (word.partition("=") for word in given) if not free.match(key)}
    there: dict[str, str] = read_json(root / SWEEP)
    if there and any(root.glob("*/config.yaml")):
        changes = differences(there, now)
        if not changes and list(there) != list(now):  # jobs are numbered in the order of the overrides
            changes = [f"order: {' '.join(there)} -> {' '.join(now)}"]
        if changes:
            shown = "\n".join(f"  {line}" for line in changes)
            raise ConfigError(
                f"run_dir={root} holds the jobs of another sweep; start it with the same overrides or choose another "
                f"directory. What differs (there -> now):\n{shown}"
            )
    write_json(root / SWEEP, now)


def sweep_job(root: Path, command: list[str], _: Any) -> float | None:
    """One job, as Hydra calls it (in this process or in a launcher's); its objective, None where it failed."""
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    run_dir = root / str(settings.job.num)
    words = [text.removeprefix("++") for text in settings.overrides.task]
    print(f"\njob {settings.job.num}: {' '.join(words)}", flush=True)
    child = subprocess.Popen([*command, "--job-of", root.name, *words, f"run_dir={run_dir}"], stdin=subprocess.DEVNULL)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    line = json.dumps({"job": settings.job.num, "overrides": words, "exit": status})
    with (root / JOBS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    info = run_dir / "run.json"
    value = json.loads(info.read_text()).get("objective") if status == 0 and info.is_file() else None
    return None if value is None else float(value)


def ended(root: Path) -> list[dict[str, Any]]:
    """The jobs of a sweep that have ended."""
    path = root / JOBS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def check(arguments: list[str], extra: Path | None, trust: list[str], *, every: bool, first_batch: bool) -> None:
    """Bind, call every component on a generated batch, print the order; with `first_batch`, look at real data."""
    from rlx.check import components, order

    if every:
        check_all(arguments, extra, trust)
        return
    _, made = planned(arguments, extra, trust)
    if found := [*components(made), *claim_mistakes(made.config, trust)]:
        raise ConfigError("\n".join(found))
    for line in order(made):
        print(line)
    if first_batch:
        from rlx.first_batch import look

        for line in look(made):
            print(line, flush=True)
    print("ok")


def check_all(arguments: list[str], extra: Path | None, trust: list[str]) -> None:
    """Every recipe; raises ConfigError with all that is wrong with any."""
    from rlx.check import components

    wrong = []
    known = recipes(extra)
    for name in known:
        try:
            composed = compose([f"recipe={name}", *arguments], extra)
            made = plan(composed.config, trusted=trust, swapped=composed.swapped, given=composed.given)
            wrong += [f"{name}: {line}" for line in [*components(made), *claim_mistakes(made.config, trust)]]
        except ConfigError as error:
            wrong += [f"{name}: {line}" for line in str(error).splitlines()]
    if wrong:
        raise ConfigError("\n".join(wrong))
    print(f"ok: {len(known)} recipes")


def claim_mistakes(config: dict[str, Any], trust: Sequence[str] = ()) -> list[str]:
    """What is wrong with a recipe's claim, where it makes one: its keys, and what keeps an arm from being run."""
    from rlx.claims import read_claim
    from rlx.reproduce import arm_config

    if not config.get("claim"):
        return []
    claim, wrong = read_claim(config)
    if claim is None:
        return wrong
    binder = Binder(errors=wrong)
    unread = {metric for metric in claim.metrics if any(repr(metric) in line for line in wrong)}
    for arm in claim.names:
        try:
            for setting in claim.settings():
                made = plan(arm_config(config, claim, arm, setting, 0), trusted=trust)
        except ConfigError as error:
            said = str(error).splitlines()
            binder.errors += [line if line.startswith("claim") else f"claim, arm {arm}: {line}" for line in said]
            continue
        for metric in claim.read_of(arm):
            before = len(binder.errors)
            if metric not in unread:  # one mistake, however many arms have it
                bind_objective(binder, metric, made.stages, f"claim, arm {arm}")
            if len(binder.errors) > before:
                unread.add(metric)
    return list(dict.fromkeys(binder.errors))


def evaluate(model: str, arguments: list[str], trust: list[str], *, as_json: bool) -> None:
    """Measure a run's stages, a model directory or a hub id on a task's held-out split."""
    import tempfile

    from rlx.evaluate import measure

    talk = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as scratch, talk:
        table, rows = measure(model, arguments, trust, Path(scratch))
    print(json.dumps(rows) if as_json else table)


def reproduce(
    arguments: list[str],
    extra: Path | None,
    trust: list[str],
    *,
    seeds: str,
    paper: bool,
    out: Path | None,
    jobs: int,
    long: bool,
) -> int:
    """Run a claim and write its result; the exit status of its verdict."""
    from rlx.claims import EXIT_STATUS, MINUTES, claim_of, seed_problems
    from rlx.reproduce import reproduce as run_claim
    from rlx.result import record
    from rlx.run import alone

    given = words(arguments)
    changes = [word for word in given if not word.startswith("recipe=")]
    slug = next((w.removeprefix("recipe=").removeprefix("paper/") for w in given if w.startswith("recipe=")), "")
    composed = compose([f"recipe={'paper/' if paper else ''}{slug}", *changes] if slug else changes, extra)
    config = plan(composed.config, trusted=trust, swapped=composed.swapped, given=composed.given).config
    if wrong := claim_mistakes(config, trust):
        raise ConfigError("\n".join(wrong))
    claim = claim_of(config)
    if claim.minutes > MINUTES and not long:
        raise ConfigError(f"this claim takes up to {claim.minutes} minutes on two cores: `make claims` runs it, or --long")
    if (launch := launch_of(config)).stage is not None:
        raise ConfigError(f"launch={launch.name}: a claim runs each of its stages in one process; leave it out")
    chosen = whole_numbers(seeds) if seeds else claim.seeds
    name = f"paper-{slug}" if paper else slug
    root = Path("runs") / "reproduce" / name
    # What was changed by hand is no result of the recipe: it stays with its runs unless the user says where it goes.
    folder = out or (root if changes or seed_problems(claim, chosen) else Path("docs") / "results")
    try:
        with alone(root, "claim"):
            result = run_claim(config, claim, root, seeds=chosen, jobs=jobs, trust=trust)
            page, text = record(result, composed.config, folder, command=sys.argv, slug=name)
    except KeyboardInterrupt as end:
        raise Failed("interrupted; the same command goes on, stages that are done are not run again", status_of(end)) from None
    print(text)
    print(f"result: {page}   runs: {root / 'runs'}")
    return EXIT_STATUS[result.verdict]


def whole_numbers(text: str) -> list[int]:
    """`0,1,2`. Raises ConfigError for anything but different whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds {text}: expected different whole numbers, such as 0,1,2")
    return [int(part) for part in parts]
