"""`rlx reproduce`: every arm of a claim on every seed, tuned alike, compared in pairs; more seeds while it is undecided."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from rlx.build import hint
from rlx.claims import METHOD, Claim, Outcome, Verdict, outcomes, value_at, verdict
from rlx.graph import Node, execute, graph, seconds_of
from rlx.report.read import Run, load_run, lower_is_better, rows
from rlx.run import write_json
from rlx.source import claim_hash
from rlx.types import ConfigError

PLACES = ("step", "seconds", "policy")  # of a line of metrics.jsonl: where it stands, not what was measured

Tried = dict[str, list[tuple[dict[str, Any], float]]]


@dataclass
class Result:
    """What was run and what came of it. `code` is the hash of the code that ran."""

    claim: Claim
    verdict: Verdict
    outcomes: list[Outcome]
    seeds: list[int]
    runs: dict[tuple[str, int], Run]
    tuned: dict[str, dict[str, Any]]
    tried: Tried = field(default_factory=dict)
    core_seconds: float = 0.0
    code: str = ""


@dataclass(frozen=True)
class Lab:
    """Where a claim is run, and how: the folder, processes at a time (0: as many as fit), code that may run."""

    root: Path
    jobs: int = 0
    trust: Sequence[str] = ()

    def run(self, configs: Mapping[str, dict[str, Any]], needs: Sequence[str]) -> dict[str, list[Node]]:
        """The needed stages of each config, trained."""
        nodes = {name: graph(config, needs, self.trust) for name, config in configs.items()}
        execute(nodes, self.root, self.jobs, self.trust)
        return nodes


def reproduce(
    config: dict[str, Any], claim: Claim, root: Path, *, seeds: Sequence[int], jobs: int, trust: Sequence[str] = ()
) -> Result:
    """Tune every arm alike, run every arm on every seed, decide; add seeds while the verdict is inconclusive."""
    code, lab, used = claim_hash(config), Lab(root, jobs, trust), list(seeds)
    shutil.rmtree(root / "runs", ignore_errors=True)  # links to stages, made anew below
    tuned, tried = tune(config, claim, lab)
    while True:
        runs = train(config, claim, lab, used, tuned)
        all_logged({arm: claim.read_of(arm) for arm in claim.names}, runs)
        if config.get("scale", "none") == "none":  # a shrunken run says nothing, and may find nothing to train on
            equal_budget(claim, runs, used)
        found = outcomes(claim, runs, used)
        result = verdict(found)
        if result != "inconclusive" or len(used) >= claim.max_seeds:
            break
        used.append(next(s for s in range(max(used) + 1, max(used) + 1000) if s not in claim.tune_seeds))
        print(f"inconclusive at {len(used) - 1} seeds; adding seed {used[-1]}", flush=True)
    return Result(claim, result, found, used, runs, tuned, tried, core_seconds(root), code)


def tune(config: dict[str, Any], claim: Claim, lab: Lab) -> tuple[dict[str, dict[str, Any]], Tried]:
    """The best setting of `tune` for each arm, by the objective on the tuning seeds; and every value tried."""
    if not claim.tune:
        return {arm: {} for arm in claim.names}, {}
    grid, objective = claim.settings(), config["objective"]
    trials = {
        trial(arm, setting, seed): arm_config(config, claim, arm, setting, seed)
        for arm in claim.names
        for setting in grid
        for seed in claim.tune_seeds
    }
    print(f"tuning: {len(claim.names)} arms x {len(grid)} settings x {len(claim.tune_seeds)} seeds", flush=True)
    nodes = lab.run(trials, [objective.partition("/")[0]])
    sign = -1.0 if lower_is_better(objective) else 1.0
    best, tried = {}, {}
    for arm in claim.names:
        scores, tuning = [], list[Run]()
        for i, setting in enumerate(grid):
            own = {seed: nodes[trial(arm, setting, seed)] for seed in claim.tune_seeds}
            runs = [arm_run(lab.root, f"tune-{arm}-{i}", seed, found) for seed, found in own.items()]
            scores.append((setting, fmean(value_at(run, objective, "last") for run in runs)))
            tuning += runs
        all_logged({arm: [objective]}, {(arm, i): run for i, run in enumerate(tuning)})
        tried[arm] = scores
        best[arm] = max(scores, key=lambda pair: -math.inf if math.isnan(pair[1]) else sign * pair[1])[0]
    return best, tried


def trial(arm: str, setting: Mapping[str, Any], seed: int) -> str:
    """A run that tunes, in words."""
    return ", ".join([arm, *(f"{path}={value}" for path, value in setting.items()), f"seed {seed}"])


def train(
    config: dict[str, Any], claim: Claim, lab: Lab, seeds: Sequence[int], tuned: Mapping[str, dict[str, Any]]
) -> dict[tuple[str, int], Run]:
    """Every arm on every seed, stages shared where all that decides them is equal."""
    needs = list(dict.fromkeys(m.partition("/")[0] for m in claim.metrics))
    cells = [(arm, seed) for seed in seeds for arm in claim.names]
    print(f"claim: {len(claim.names)} arms x {len(seeds)} seeds", flush=True)
    nodes = lab.run({f"{arm}, seed {s}": arm_config(config, claim, arm, tuned[arm], s) for arm, s in cells}, needs)
    return {(arm, seed): arm_run(lab.root, arm, seed, nodes[f"{arm}, seed {seed}"]) for arm, seed in cells}


def arm_config(config: dict[str, Any], claim: Claim, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The recipe's config with what all arms change, what this arm changes, and the tuned values."""
    changed = copy.deepcopy({k: v for k, v in config.items() if k not in ("claim", "run_dir")})
    own = claim.arms[arm] if arm != METHOD else {}
    for path, value in {**claim.common, **own, **setting}.items():
        try:
            put(changed, path, copy.deepcopy(value))
        except KeyError as missing:
            raise ConfigError(f"claim, arm {arm}: {path!r}: the recipe has no {missing.args[0]!r} there") from None
    return changed | {"seed": seed}


def put(node: Any, path: str, value: Any) -> None:
    """Set a dotted path (list positions are numbers); null removes a key. Raises KeyError with the part that is missing."""
    *parents, last = path.split(".")
    for part in parents:
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise KeyError(part) from None
    if isinstance(node, list):
        node[int(last)] = value
    elif value is None:
        node.pop(last, None)
    else:
        node[last] = value


def arm_run(root: Path, arm: str, seed: int, nodes: Sequence[Node]) -> Run:
    """A run directory of one arm and seed: its config, and links to its stages."""
    folder = root / "runs" / f"{arm}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for node in nodes:
        (folder / node.stage).symlink_to(Path("../../stages") / node.key / node.stage)
    config = nodes[0].config
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    info = {"recipe": config["recipe"], "status": "finished", "seed": seed, "overrides": [f"arm={arm}", f"seed={seed}"]}
    write_json(folder / "run.json", info)
    return load_run(folder)


def all_logged(metrics: Mapping[str, Sequence[str]], runs: Mapping[tuple[str, int], Run]) -> None:
    """Raises ConfigError where no run of an arm logged a metric that is read of it: more seeds would not, either."""
    wrong = []
    for arm, names in metrics.items():
        own = [run for (of, _), run in runs.items() if of == arm]
        for metric in (name for name in names if not any(rows(run, name) for run in own)):
            stage = metric.partition("/")[0]
            logs = [log for run in own for log in run.stages if log.name == stage]
            known = dict.fromkeys(f"{stage}/{key}" for log in logs for row in log.metrics for key in row if key not in PLACES)
            wrong.append(f"claim: no run of arm {arm} logged {metric!r}{hint(metric, known, f'{stage}/metrics.jsonl')}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def equal_budget(claim: Claim, runs: Mapping[tuple[str, int], Run], seeds: Sequence[int]) -> None:
    """Raises ConfigError where a control had over 2 % less than the method of what the claim says is equal."""
    if claim.equal == "none":
        return
    for seed in seeds:
        had = {arm: spent(runs[arm, seed])[claim.equal] for arm in claim.names}
        if had[METHOD] > 1.02 * min(had.values()):
            shown = ", ".join(f"{arm} {amount:g}" for arm, amount in had.items())
            raise ConfigError(f"claim.equal: no arm may have fewer {claim.equal} than the method, but on seed {seed}: {shown}")


def spent(run: Run) -> dict[str, float]:
    """Optimiser steps, rollouts and trained tokens of a run, over all stages that train."""
    names = {"steps": "spent/updates", "rollouts": "spent/rollouts", "tokens": "spent/tokens"}
    last: list[dict[str, Any]] = [
        next((row for row in reversed(log.metrics) if "spent/updates" in row), {}) for log in run.stages
    ]
    return {word: sum(float(row.get(name) or 0.0) for row in last) for word, name in names.items()}


def core_seconds(root: Path) -> float:
    """What the stages behind the runs of this claim took, each counted once, on one core each."""
    behind = {stage.resolve().parent for run in (root / "runs").iterdir() for stage in run.iterdir() if stage.is_symlink()}
    return sum(seconds_of(folder) for folder in behind)
