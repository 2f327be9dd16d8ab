"""`rlx reproduce`: arms x seeds as a graph of stages, each trained once, in as many one-thread processes as there are cores."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from rlx.claims import METHOD, Claim, Outcome, Verdict, outcomes, value_at, verdict
from rlx.plan import plan
from rlx.report.read import Run, load_run
from rlx.run import code_hash, make_tracker, quiet, run_stage, versions, write_json
from rlx.track import Lines
from rlx.types import ConfigError


@dataclass(frozen=True)
class Node:
    """One stage of one config and seed. `key` is a hash of all that decides its result; `inputs` are the nodes before it."""

    key: str
    stage: str
    config: dict[str, Any]
    inputs: tuple[Node, ...]

    def folder(self, root: Path) -> Path:
        """Its run directory: the stage itself, and links to its inputs."""
        return root / "stages" / self.key


@dataclass
class Result:
    """What was run and what came of it."""

    claim: Claim
    verdict: Verdict
    outcomes: list[Outcome]
    seeds: list[int]
    runs: dict[tuple[str, int], Run]
    tuned: dict[str, dict[str, Any]]
    tried: dict[str, list[tuple[dict[str, Any], float]]] = field(default_factory=dict)
    core_seconds: float = 0.0


def reproduce(
    config: dict[str, Any], claim: Claim, root: Path, *, seeds: Sequence[int], jobs: int, trust: Sequence[str] = ()
) -> Result:
    """Tune every arm alike, run every arm on every seed, decide; add seeds while the verdict is inconclusive."""
    jobs = jobs or os.cpu_count() or 1
    shutil.rmtree(root / "runs", ignore_errors=True)  # links to stages, made anew below
    tuned, tried = tune(config, claim, root, jobs)
    used = list(seeds)
    while True:
        runs = train(config, claim, root, used, tuned, jobs)
        equal_budget(claim, runs, used)
        found = outcomes(claim, runs, used)
        result = verdict(found)
        if result != "inconclusive" or len(used) >= claim.max_seeds:
            break
        used.append(max(used) + 1)
        print(f"inconclusive at {len(used) - 1} seeds; adding seed {used[-1]}", flush=True)
    return Result(claim, result, found, used, runs, tuned, tried, core_seconds(root))


def tune(
    config: dict[str, Any], claim: Claim, root: Path, jobs: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple[dict[str, Any], float]]]]:
    """The best setting of `tune` for each arm, by the objective on the tuning seeds; and every value tried."""
    grid = claim.settings()
    if not claim.tune:
        return {arm: {} for arm in claim.names}, {}
    objective = config["objective"]
    needs = [objective.partition("/")[0]]
    cells = [(arm, i, seed) for arm in claim.names for i in range(len(grid)) for seed in claim.tune_seeds]
    nodes = {c: graph(arm_config(config, claim, c[0], grid[c[1]], c[2]), needs) for c in cells}
    execute([n for found in nodes.values() for n in found], root, jobs)
    best, tried = {}, {}
    for arm in claim.names:
        scores = []
        for i, setting in enumerate(grid):
            runs = [arm_run(root, f"tune-{arm}-{i}", s, nodes[arm, i, s]) for s in claim.tune_seeds]
            scores.append((setting, fmean(value_at(run, objective, "last") for run in runs)))
        tried[arm] = scores
        best[arm] = max(scores, key=lambda pair: pair[1])[0]
    return best, tried


def train(
    config: dict[str, Any],
    claim: Claim,
    root: Path,
    seeds: Sequence[int],
    tuned: Mapping[str, dict[str, Any]],
    jobs: int,
) -> dict[tuple[str, int], Run]:
    """Every arm on every seed, stages shared where all that decides them is equal."""
    needs = list(dict.fromkeys(m.partition("/")[0] for m in claim.metrics))
    cells = [(arm, seed) for seed in seeds for arm in claim.names]
    nodes = {c: graph(arm_config(config, claim, c[0], tuned[c[0]], c[1]), needs) for c in cells}
    execute([n for found in nodes.values() for n in found], root, jobs)
    return {(arm, seed): arm_run(root, arm, seed, nodes[arm, seed]) for arm, seed in cells}


def arm_config(config: dict[str, Any], claim: Claim, arm: str, setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The recipe's config with what all arms change, what this arm changes, and the tuned values."""
    changed = copy.deepcopy({k: v for k, v in config.items() if k not in ("claim", "run_dir")})
    own = claim.arms[arm] if arm != METHOD else {}
    for path, value in {**claim.common, **own, **setting}.items():
        put(changed, path, copy.deepcopy(value))
    return changed | {"seed": seed}


def put(node: Any, path: str, value: Any) -> None:
    """Set a dotted path (list positions are numbers); null removes a key. Raises ConfigError where the path leads nowhere."""
    *parents, last = path.split(".")
    for part in parents:
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ConfigError(f"claim: {path!r}: the recipe has no {part!r} there") from None
    if isinstance(node, list):
        node[int(last)] = value
    elif value is None:
        node.pop(last, None)
    else:
        node[last] = value


def graph(config: dict[str, Any], needs: Sequence[str]) -> list[Node]:
    """The nodes of the needed stages and of all that they start from, inputs first. Raises ConfigError for a bad config."""
    made = plan(config)
    nodes: dict[str, Node] = {}

    def node(name: str) -> Node:
        if name not in nodes:
            inputs = tuple(node(i) for i in made.inputs[name])
            shared = {k: config.get(k) for k in ("model", "task", "seed", "objective")}
            decides = {
                "name": name,
                "stage": config["stages"][name],
                **shared,
                "inputs": [i.key for i in inputs],
                "code": code_hash(),
                "torch": versions()["torch"],
            }
            text = json.dumps(decides, sort_keys=True, default=str)
            nodes[name] = Node(f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}", name, config, inputs)
        return nodes[name]

    for name in needs:
        node(name)
    return list(nodes.values())


def execute(nodes: Sequence[Node], root: Path, jobs: int) -> None:
    """Run each distinct node that is not done, inputs first, `jobs` processes at a time. Raises ConfigError when one fails."""
    waiting = {n.key: n for n in nodes if not done(n, root)}
    if waiting:
        print(f"{len(waiting)} stages to run, {len({n.key for n in nodes}) - len(waiting)} done before", flush=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    total, began = len(waiting), time.monotonic()
    try:
        while waiting or running:
            for key in [k for k, n in waiting.items() if all(done(i, root) for i in n.inputs)][: jobs - len(running)]:
                running[key] = launch(waiting.pop(key), root)
            for key, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                folder = root / "stages" / key
                if process.returncode:
                    raise ConfigError(f"stage {key} failed; its log is {folder / 'log.txt'}:\n{tail(folder / 'log.txt')}")
                finished = total - len(waiting) - len(running)
                spent = time.monotonic() - began
                left = spent / finished * (total - finished)
                print(
                    f"  {finished}/{total}  {key}  {seconds_of(folder):.0f} s   about {left / 60:.0f} min left",
                    flush=True,
                )
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()


def done(node: Node, root: Path) -> bool:
    """Whether the node's stage has finished."""
    return (node.folder(root) / node.stage / "DONE").is_file()


def launch(node: Node, root: Path) -> subprocess.Popen[bytes]:
    """A one-thread process for one node, with links to its inputs where run_stage looks for them."""
    folder = node.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    pending = list(node.inputs)
    while pending:
        before = pending.pop()
        link = folder / before.stage
        if not link.is_symlink():
            link.symlink_to(Path("..") / before.key / before.stage)
        pending += before.inputs
    (folder / "config.yaml").write_text(yaml.safe_dump(node.config, sort_keys=False), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "rlx.reproduce", str(folder), node.stage]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


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


def equal_budget(claim: Claim, runs: Mapping[tuple[str, int], Run], seeds: Sequence[int]) -> None:
    """Raises ConfigError where the arms differ by over 2 % in what the claim says is equal."""
    if claim.equal == "none":
        return
    for seed in seeds:
        spent_ = {arm: spent(runs[arm, seed])[claim.equal] for arm in claim.names}
        if max(spent_.values()) > 1.02 * min(spent_.values()):
            shown = ", ".join(f"{arm} {amount:g}" for arm, amount in spent_.items())
            raise ConfigError(f"claim.equal: the arms were to have equal {claim.equal}, but on seed {seed} had {shown}")


def spent(run: Run) -> dict[str, float]:
    """Steps, rollouts and trained tokens of a run, in all stages that train."""
    totals = {"steps": 0.0, "rollouts": 0.0, "tokens": 0.0}
    for log in run.stages:
        rows = [row for row in log.metrics if row.get("step")]
        if rows:
            totals["steps"] += float(rows[-1]["step"])
            totals["rollouts"] += sum(float(row.get("episodes") or 0.0) for row in rows)
            totals["tokens"] += sum(float(row.get("tokens") or 0.0) for row in rows)
    return totals


def core_seconds(root: Path) -> float:
    """What the stages behind the runs of this claim took, each counted once, on one core each."""
    behind = {stage.resolve().parent for run in (root / "runs").iterdir() for stage in run.iterdir() if stage.is_symlink()}
    return sum(seconds_of(folder) for folder in behind)


def seconds_of(folder: Path) -> float:
    """How long a node took."""
    path = folder / "seconds"
    return float(path.read_text()) if path.is_file() else 0.0


def tail(path: Path, lines: int = 8) -> str:
    """The end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def main(folder: Path, stage: str) -> None:
    """One node in a process of its own."""
    import torch

    torch.set_num_threads(1)
    quiet()
    began = time.monotonic()
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    made = plan(config)
    group = f"reproduce-{config['recipe'].replace('/', '-')}"
    tracker = make_tracker(made, folder, {"tracker_id": folder.name, "sweep": group})
    try:
        run_stage(made, stage, folder, display=Lines(30.0), tracker=tracker)
    finally:
        tracker.finish()
    (folder / "seconds").write_text(f"{time.monotonic() - began:.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
