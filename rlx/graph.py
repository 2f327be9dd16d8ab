"""Stages of many configs as one graph: each trained once, in a process of its own, as many at a time as there is room for.

A stage is named by a hash of all that decides its result: its config, the seed, the stages that it starts from, the content
of the files that it names, the code and the libraries. Two arms that agree on a stage share it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from rlx.plan import plan
from rlx.run import make_tracker, quiet, run_stage, versions
from rlx.source import code_hash
from rlx.stopping import stoppable
from rlx.track import Lines
from rlx.types import ConfigError

LIBRARIES = ("torch", "transformers", "numpy", "peft")


@dataclass(frozen=True)
class Node:
    """One stage of one config and seed. `key` is the hash of all that decides its result; `inputs` are the nodes before it."""

    key: str
    stage: str
    config: dict[str, Any]
    code: str
    inputs: tuple[Node, ...]

    def folder(self, root: Path) -> Path:
        """Its run directory: the stage itself, and links to its inputs."""
        return root / "stages" / self.key


def graph(config: dict[str, Any], needs: Sequence[str], trust: Sequence[str] = ()) -> list[Node]:
    """The nodes of the needed stages and of all that they start from, inputs first. Raises ConfigError for a bad config."""
    made = plan(config, trusted=trust)
    if absent := [name for name in needs if name not in made.inputs]:
        raise ConfigError(f"claim: a metric is of stage {absent[0]!r}, which this arm does not have")
    installed = versions()
    nodes: dict[str, Node] = {}

    def node(name: str) -> Node:
        if name not in nodes:
            inputs = tuple(node(i) for i in made.inputs[name])
            stage = made.config["stages"][name]
            code = stage_code(made.config, name)
            shared = {k: made.config.get(k) for k in ("model", "task", "rollout", "seed", "objective")}
            decides = {
                "name": name,
                "stage": stage,
                **shared,
                "files": files((stage, shared)),
                "inputs": [i.key for i in inputs],
                "code": code,
                "libraries": {k: installed.get(k) for k in LIBRARIES},
            }
            text = json.dumps(decides, sort_keys=True, default=str)
            key = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
            nodes[name] = Node(key, name, made.config, code, inputs)
        return nodes[name]

    for name in needs:
        node(name)
    return list(nodes.values())


def stage_code(config: Mapping[str, Any], name: str) -> str:
    """A hash of the code that one stage can reach: arms share a stage whatever their other stages run."""
    return code_hash({**config, "stages": {name: config["stages"][name]}}, "rlx.graph")


def files(node: Any) -> dict[str, str]:
    """Each local file or folder that a config names (data, model, a reward of the user's), and the hash of its content."""
    found = {}
    for text in strings(node):
        path = Path(text).expanduser()
        for candidate in (path, Path(text.rpartition(":")[0]) if ":" in text else path):
            if text and candidate.name and candidate.exists():
                found[text] = content_hash(candidate)
    return found


def strings(node: Any) -> Iterator[str]:
    """Every string of a config."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from strings(value)


def content_hash(path: Path) -> str:
    """The hash of a file, or of every file below a folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def slots() -> list[dict[str, str]]:
    """Where processes run, as their environment: one on each GPU, else one on each core that this process may use."""
    import torch

    if torch.cuda.is_available():
        return [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(torch.cuda.device_count())]
    return [{} for _ in os.sched_getaffinity(0)]


def execute(whose: Mapping[str, Sequence[Node]], root: Path, jobs: int, trust: Sequence[str] = ()) -> None:
    """Run each distinct node that is not done, inputs first; `whose` has them by whom they are for, which is shown.

    Raises ConfigError when one fails; ends its processes with it.
    """
    nodes = [node for own in whose.values() for node in own]
    users: dict[str, list[str]] = {}
    for name, own in whose.items():
        for key in {node.key for node in own}:
            users.setdefault(key, []).append(name)
    waiting = {n.key: n for n in nodes if not done(n, root)}
    if waiting:
        print(f"{len(waiting)} stages to run, {len({n.key for n in nodes}) - len(waiting)} done before", flush=True)
    free = slots()
    free = [free[i % len(free)] for i in range(jobs)] if jobs else free
    running: dict[str, tuple[Node, ForkServerProcess, dict[str, str]]] = {}
    total, began = len(waiting), time.monotonic()
    try:
        with stoppable():
            while waiting or running:
                for key in [k for k, n in waiting.items() if all(done(i, root) for i in n.inputs)][: len(free)]:
                    node, slot = waiting.pop(key), free.pop()
                    running[key] = node, launch(node, root, slot, trust), slot
                for key, (node, process, slot) in list(running.items()):
                    if process.is_alive():
                        continue
                    del running[key]
                    free.append(slot)
                    log = root / "stages" / key / "log.txt"
                    first, *others = users[key]
                    who = f"{node.stage} of {first}"
                    if not done(node, root):
                        status = process.exitcode
                        raise ConfigError(f"stage {who} failed (exit status {status}); its log is {log}:\n{tail(log)}")
                    finished = total - len(waiting) - len(running)
                    left = (time.monotonic() - began) / finished * (total - finished) / 60
                    took = seconds_of(log.parent)
                    also = f" and {len(others)} more" if others else ""
                    print(f"  {finished}/{total}  {who}{also}  {took:.0f} s   about {left:.0f} min left", flush=True)
                time.sleep(0.05)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()


def done(node: Node, root: Path) -> bool:
    """Whether the node's stage has finished."""
    return (node.folder(root) / node.stage / "DONE").is_file()


@functools.cache
def forks() -> ForkServerContext:
    """Processes that are forked from one that has imported what most stages need, which takes seconds, and has done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlx.graph", "torch._dynamo", "transformers.models.qwen2.modeling_qwen2"])
    return context


def launch(node: Node, root: Path, slot: Mapping[str, str], trust: Sequence[str]) -> ForkServerProcess:
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
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = forks().Process(target=carry_out, args=(folder, node.stage, node.code, tuple(trust), {**threads, **slot}))
    process.start()
    return process


def seconds_of(folder: Path) -> float:
    """How long a node took."""
    path = folder / "seconds"
    return float(path.read_text()) if path.is_file() else 0.0


def tail(path: Path, lines: int = 8) -> str:
    """The end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def carry_out(folder: Path, stage: str, code: str, trust: Sequence[str], environment: Mapping[str, str]) -> None:
    """One node in a process of its own, which says in log.txt what it says.

    Raises ConfigError where the code is no longer what the node's key was made from.
    """
    import torch

    os.environ.update(environment)
    with (folder / "log.txt").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if stage_code(config, stage) != code:
        raise ConfigError("the code of rlx changed while the claim ran; start it again")
    torch.set_num_threads(1)
    quiet()
    began = time.monotonic()
    made = plan(config, trusted=trust)
    group = f"reproduce-{made.config['recipe'].replace('/', '-')}"
    tracker = make_tracker(made, folder, {"tracker_id": folder.name, "sweep": group})
    try:
        run_stage(made, stage, folder, display=Lines(30.0), tracker=tracker)
    finally:
        tracker.finish()
    (folder / "seconds").write_text(f"{time.monotonic() - began:.1f}")
