"""What the commands do: compose, plan, run; one process a job in a sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlx.compose import Composed, compose, prepare, recipes, store, words
from rlx.plan import Plan, plan
from rlx.types import ConfigError


def planned(arguments: list[str], extra: Path | None, trust: list[str]) -> tuple[Composed, Plan]:
    """Command line -> plan, with the notices printed."""
    composed = compose(arguments, extra)
    made = plan(composed.config, trusted=trust, swapped=composed.swapped, given=composed.given)
    for line in [*composed.notices, *made.notices]:
        print(f"note: {line}")
    return composed, made


def train(arguments: list[str], extra: Path | None, trust: list[str]) -> None:
    """Run a recipe, then print where the run is and its final table."""
    from rlx.report.read import load_run
    from rlx.report.tables import final_table
    from rlx.run import default_run_dir, run

    composed, made = planned(arguments, extra, trust)
    given = made.config.pop("run_dir", None)
    run_dir = Path(given) if given else default_run_dir(made.config["recipe"])
    print(f"run directory: {run_dir}", flush=True)
    run(made, run_dir, command=sys.argv, overrides=composed.overrides)
    print("\n" + final_table(load_run(run_dir)))
    print(f"\nrun directory: {run_dir}\nlook at it:    rlx report {run_dir}")


def sweep(arguments: list[str], extra: Path | None, trust: list[str]) -> None:
    """Hydra's multirun: every job is `rlx train` in a process of its own. Its failure is a row of the table."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from rlx.paths import CONF
    from rlx.report.read import load
    from rlx.report.tables import sweep_table

    known = recipes(extra)
    texts = prepare([a for a in arguments if not a.startswith("run_dir=")], known)
    folder = [a.partition("=")[2] for a in arguments if a.startswith("run_dir=")]
    texts += [f"hydra.sweep.dir={folder[0]}"] if folder else []
    store(known)
    command = [sys.executable, "-m", "rlx.cli", "train"]
    options = [*(["--recipes", str(extra)] if extra else []), *(f"--trust={t}" for t in trust)]
    used: list[Path] = []

    def job(_: Any) -> float:
        settings = HydraConfig.get()
        run_dir = Path(settings.sweep.dir) / settings.sweep.subdir
        used.append(run_dir)
        words = [text.removeprefix("++") for text in settings.overrides.task]
        ran = subprocess.run([*command, *options, *words, f"run_dir={run_dir}"], stdin=subprocess.DEVNULL)
        info = json.loads((run_dir / "run.json").read_text()) if (run_dir / "run.json").is_file() else {}
        value = info.get("objective")
        return float(value) if ran.returncode == 0 and value is not None else float("nan")

    sys.argv = ["rlx", "--multirun", *texts]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")(job)()
    runs = load(used[0].parent) if used and any((p / "run.json").is_file() for p in used) else []
    runs = runs if isinstance(runs, list) else [runs]
    if not used:
        raise ConfigError("the sweep has no jobs: give at least one value, such as seed=0,1,2")
    missing = [str(p) for p in used if not (p / "run.json").is_file()]
    print("\n" + (sweep_table(runs, str(runs[0].config.get("objective") or "")) if runs else "no job wrote a run"))
    for path in missing:
        print(f"{path}: failed before its run began")
    print(f"\nsweep directory: {used[0].parent}\nlook at it:      rlx report {used[0].parent}")
    failed = len(missing) + sum(run.info.get("status") != "finished" for run in runs if run.path in used)
    if failed:
        raise Told(f"{failed} of {len(used)} jobs failed")


class Told(RuntimeError):
    """A failure whose message is all there is to say."""

    told = True


def check(arguments: list[str], extra: Path | None, trust: list[str], *, every: bool, first_batch: bool) -> None:
    """Bind, call every component on a generated batch, print the order; with `first_batch`, look at real data."""
    from rlx.check import components, order

    if every:
        check_all(arguments, extra, trust)
        return
    _, made = planned(arguments, extra, trust)
    if found := components(made):
        raise ConfigError("\n".join(found))
    for line in order(made):
        print(line)
    if first_batch:
        from rlx.first_batch import look

        for line in look(made):
            print(line)
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
            wrong += [f"{name}: {line}" for line in components(made)]
            claim_if_any(composed.config)
        except ConfigError as error:
            wrong += [f"{name}: {line}" for line in str(error).splitlines()]
    if wrong:
        raise ConfigError("\n".join(wrong))
    print(f"ok: {len(known)} recipes")


def claim_if_any(config: dict[str, Any]) -> None:
    """Check a recipe's claim, where it makes one: its keys, and that every arm binds."""
    from rlx.claims import claim_of
    from rlx.reproduce import arm_config

    if config.get("claim"):
        claim = claim_of(config)
        for arm in claim.names:
            for setting in claim.settings():
                plan(arm_config(config, claim, arm, setting, 0))


def evaluate(model: str, arguments: list[str], trust: list[str], *, as_json: bool) -> None:
    """Measure a run's stages, a model directory or a hub id on a task's held-out split."""
    import contextlib
    import tempfile

    from rlx.evaluate import measure

    with tempfile.TemporaryDirectory() as scratch:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            table, rows = measure(model, arguments, trust, Path(scratch))
    print(json.dumps(rows) if as_json else table)


def reproduce(arguments: list[str], extra: Path | None, *, seeds: str, paper: bool, out: Path, jobs: int) -> int:
    """Run a claim and write its result; the exit status of its verdict."""
    from rlx.claims import EXIT_STATUS, claim_of
    from rlx.reproduce import reproduce as run_claim
    from rlx.result import record

    composed = compose(arguments, extra)
    config = composed.config
    slug = config["recipe"].removeprefix("paper/")
    claim = claim_of(config)
    if paper:
        published = compose([f"recipe=paper/{slug}", *[a for a in words(arguments) if not a.startswith("recipe=")]], extra)
        config = published.config
    plan(config, swapped=composed.swapped, given=composed.given)
    chosen = [int(s) for s in seeds.split(",")] if seeds else claim.seeds
    root = Path("runs") / "reproduce" / (f"paper-{slug}" if paper else slug)
    result = run_claim(config, claim, root, seeds=chosen, jobs=jobs)
    page, text = record(result, config, out, command=sys.argv, slug=f"paper-{slug}" if paper else slug)
    print(text)
    print(f"result: {page}   runs: {root / 'runs'}")
    return EXIT_STATUS[result.verdict]
