"""What the commands do: compose, plan, run; one process a job in a sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlx.compose import Composed, compose, prepare, recipes, store
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
