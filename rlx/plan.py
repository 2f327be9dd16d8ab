"""A composed config -> a plan: every component bound, every reference resolved, the stages in order; or every mistake."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx.build import Binder, hint, looks_local, model_offers, untrusted
from rlx.catalogue import CATALOGUE
from rlx.launch import launch_of, undivided
from rlx.paths import CONF
from rlx.resume import Save
from rlx.types import Component, ConfigError, DataRef, Episode, Model, ModelName, ModelRef, Stage, TaskSource
from rlx.unroll import moved, unrolled

# Every key of a composed config and the type of its value; what else stands in a recipe is a mistake.
KEYS: dict[str, Any] = {
    "recipe": str,
    "purpose": str,
    "paper": dict[str, Any],
    "family": str,
    "model": Any,
    "task": Any,
    "objective": str,
    "claim": dict[str, Any],
    "published": list[Any],
    "sources": dict[str, str],
    "unverified": list[str],
    "requires": dict[str, Any],
    "stages": dict[str, Any],
    "seed": int,
    "run_dir": str | None,
    "track": dict[str, Any],
    "launch": dict[str, Any],
    "caps": dict[str, Any],
    "scale": str,
    "save": Save,
}

# A stage is a folder of the run and a part of dotted paths; `@model` and `@task/...` already mean something.
STAGE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
RESERVED = {"model": "@model already means what the recipe starts from", "task": "@task already means the recipe's task"}

# Settings of stages that are at least 1; a temperature is more than 0, and a rate of 0 measures a frozen policy.
COUNTS = {
    "steps",
    "rows_per_step",
    "prompts_per_step",
    "group_size",
    "epochs",
    "minibatches",
    "token_budget",
    "max_length",
    "max_new_tokens",
    "samples",
    "limit",
    "log_every",
    "samples_every",
}


@dataclass
class Plan:
    """What `rlx train` is about to do. `objective` is (stage, metric); `config` is without the keys that were dropped."""

    config: dict[str, Any]
    model: Component[Model]
    stages: dict[str, Stage]
    task: TaskSource | None = None
    objective: tuple[str, str] = ("", "")
    inputs: dict[str, list[str]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    save: Save = field(default_factory=Save)


def plan(
    config: dict[str, Any], *, trusted: Sequence[str] = (), swapped: Collection[str] = (), given: Collection[str] = ()
) -> Plan:
    """Bind the config. Raises ConfigError with every mistake found, one line each."""
    written = config["stages"] if isinstance(config.get("stages"), Mapping) else {}
    binder = Binder(trusted, moved(swapped, written), moved(given, written))
    for key in config:
        if key not in KEYS:
            binder.errors.append(f"{key}: no such key at the top of a recipe{hint(key, KEYS)}")
    bound = {key: binder.value(want, config[key], key) for key, want in KEYS.items() if key in config}
    save = bound.get("save") or Save()
    binder.errors += [f"save.{line}" for line in save.problems()]
    if isinstance(config.get("seed"), int) and config["seed"] < 0:
        binder.errors.append(f"seed: expected at least 0, got {config['seed']}")
    model = bind_model(binder, config.get("model", {"name": "tiny"}))
    task = bind_task(binder, config.get("task"))
    if task is not None:
        binder.provided = {("reward", "verifier"): verifier_of(task)}
    if not config.get("stages"):
        binder.errors.append("stages: a recipe needs at least one stage")
    elif written:
        config = {**config, "stages": unrolled(written, binder)}
    given_stages = config.get("stages")
    nodes = {n: node for n, node in given_stages.items() if node is not None} if isinstance(given_stages, Mapping) else {}
    inputs = {name: stage_refs(node) for name, node in nodes.items()}
    check_refs(binder, nodes, task, no_task=config.get("task") is None)
    order = in_order(binder, inputs)
    stages = {name: bind_stage(binder, name, nodes[name], model_offers(model)) for name in order}
    check_rows(binder, stages)
    check_models(binder, stages)
    check_weights(binder, stages)
    if not binder.errors:  # references may go round in circles
        check_mixes(binder, stages, model)
    check_verifier(binder, stages, no_task=config.get("task") is None)
    if model is not None and model.settings.get("trust_remote_code"):
        check_trust(binder, stages)
    check_launch(binder, config, stages)
    objective = bind_objective(binder, config.get("objective"), stages)
    if binder.errors:
        raise ConfigError("\n".join(dict.fromkeys(binder.errors)))
    return Plan(without(config, binder.dropped), model, stages, task, objective, inputs, binder.notices, save)


def without(config: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """A copy of the config in which the keys at some dotted paths are gone."""
    kept = copy.deepcopy(config)
    for path in paths:
        *parents, last = path.split(".")
        node: Any = kept
        for part in parents:
            if isinstance(node, list):
                node = node[int(part)]
            elif part in node:  # a component that stands for a list of one has position 0 without having a list
                node = node[part]
        node.pop(last, None)
    return kept


def bind_model(binder: Binder, node: Any) -> Any:
    """A model of the catalogue, a directory or a hub id; the sizes of conf/model are in the config already."""
    node = dict(node) if isinstance(node, Mapping) else {"name": node}
    name = str(node.get("name") or "tiny")
    if name not in CATALOGUE["model"]:
        if not Path(name).expanduser().is_dir() and (looks_local(name) or "/" not in name):
            known = [*CATALOGUE["model"], *(p.stem for p in (CONF / "model").glob("*.yaml"))]
            binder.errors.append(
                f"model.name: {name!r} is no model of rlx, no directory here and no hub id (owner/name)"
                f"{hint(name, dict.fromkeys(known))}"
            )
            return None
        node = {"path": name, **node, "name": "pretrained"}
    node["name"] = node.get("name") or name
    return binder.component("model", node, "model")


def bind_task(binder: Binder, node: Any) -> TaskSource | None:
    """The task's splits, environment and verifier; nothing is read yet."""
    if node is None:
        return None
    bound = binder.component("task", node, "task")
    if bound is None:
        return None
    try:
        source: TaskSource = bound.call()
    except ConfigError as error:
        binder.errors += [f"task: {line}" for line in str(error).splitlines()]
        return None
    return source


def verifier_of(task: TaskSource) -> Callable[[list[Episode]], Any]:
    """The reward `verifier`: what says whether an answer is right when the task is tested also pays in training."""

    def verifier(episodes: list[Episode]) -> Any:
        return task.verifier(episodes)

    return verifier


def check_verifier(binder: Binder, stages: Mapping[str, Any], *, no_task: bool) -> None:
    """The reward `verifier` (the catalogue's, not a function of the user's) needs a task."""
    for name, stage in stages.items():
        calls = [getattr(reward.call, "func", None) for reward in getattr(stage, "reward", []) if reward is not None]
        if no_task and any(call.__module__ == "rlx.rewards.rules" and call.__name__ == "verifier" for call in calls if call):
            binder.errors.append(f"stages.{name}.reward: the recipe has no task, so it has no verifier; give task=NAME")


def check_models(binder: Binder, stages: Mapping[str, Any]) -> None:
    """A setting that names a model of the stage stands where the stage puts the model in its place."""
    for name, stage in stages.items():
        for f in dataclasses.fields(stage) if stage is not None else ():
            if f.name not in getattr(stage, "gives_models_to", ()):
                for component, key in model_names(getattr(stage, f.name)):
                    binder.errors.append(
                        f"stages.{name}.{f.name}: {component!r} is given a model of the stage ({key}), which works in "
                        "the reward, keep and sampler of online and collect only"
                    )


def model_names(node: Any) -> Iterator[tuple[str, str]]:
    """(component, key) of each setting below a node that names a model of the stage."""
    if isinstance(node, Component):
        yield from ((node.name, key) for key, value in node.settings.items() if isinstance(value, ModelName))
        children: Any = node.settings.values()
    elif dataclasses.is_dataclass(node):
        children = [getattr(node, f.name) for f in dataclasses.fields(node)]
    else:
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    for child in children:
        yield from model_names(child)


def check_launch(binder: Binder, config: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
    """What `launch` says, and what its several processes cannot do in a stage."""
    try:
        launch = launch_of(config)
    except ConfigError as error:
        binder.errors += str(error).splitlines()
        return
    for name, stage in stages.items():
        if stage is not None and launch.stage is not None:
            binder.errors += [f"stages.{name}.{line}" for line in undivided(stage)]


def check_rows(binder: Binder, stages: Mapping[str, Any]) -> None:
    """`data: "@x"` names a stage that writes rows, `@x/medium` one that selects some under this name."""
    for name, stage in stages.items():
        ref = getattr(stage, "data", None)
        source = ref.stage if isinstance(ref, DataRef) else ""
        if not isinstance(ref, DataRef) or not source or stages.get(source) is None:
            continue
        selects = getattr(stages[source], "writes", [])
        if ref.split and ref.split not in selects:
            binder.errors.append(f"stages.{name}.data: stage {source!r} selects no {ref.split!r}{hint(ref.split, selects)}")
        elif not ref.split and not getattr(stages[source], "writes_rows", False):
            binder.errors.append(
                f"stages.{name}.data: stage {source!r} writes no rows; expected @task/SPLIT, a stage that does, or a data set "
                "such as {name: jsonl, path: FILE}"
            )


def check_weights(binder: Binder, stages: Mapping[str, Any]) -> None:
    """A stage takes weights from one that writes weights."""
    for name, stage in stages.items():
        for path, ref in model_refs(stage, f"stages.{name}"):
            if writes := getattr(stages.get(ref.stage), "instead_of_weights", ""):
                binder.errors.append(f"{path}: '{ref}' names weights, and stage {ref.stage!r} writes {writes}")


def check_mixes(binder: Binder, stages: Mapping[str, Any], model: Any) -> None:
    """A mixture is of causal language models. Models of a directory or hub id are looked at when they are loaded."""
    for name, stage in stages.items():
        specs = specs_of(stage)
        for mix, part in ((mix, part) for mix, spec in specs.items() for part in spec.mix):
            made = maker_of(specs[part], stages, model) if part in specs else None
            if made is not None and not getattr(getattr(made.call, "func", made.call), "mixes", True):
                binder.errors.append(
                    f"stages.{name}.models.{mix}.mix: {part!r} is a model {made.name!r}, which cannot be mixed; a mixture is "
                    "of causal language models of text alone"
                )


def maker_of(spec: Any, stages: Mapping[str, Any], model: Any) -> Any:
    """The model of the catalogue that a stage's model began as, through the stages that trained it; None: not known here."""
    ref = spec.from_
    if spec.model is not None or ref is None or ref.stage == "model":
        return spec.model or model
    specs = specs_of(stages.get(ref.stage))
    return maker_of(specs[ref.name], stages, model) if ref.name in specs else None


def specs_of(stage: Any) -> Mapping[str, Any]:
    """The models of a stage by name; none of one that has no list of them."""
    return stage.specs() if hasattr(stage, "specs") else {}


def check_trust(binder: Binder, stages: Mapping[str, Any]) -> None:
    """Where the recipe's model brings code, each other directory or hub id that a stage loads brings its own."""
    for name, stage in stages.items():
        for path, ref in model_refs(stage, f"stages.{name}"):
            if ref.path and not binder.trusts(ref.path):
                binder.errors.append(f"{path}: with model.trust_remote_code this {untrusted(ref.path)}")


def model_refs(node: Any, path: str) -> Iterator[tuple[str, ModelRef]]:
    """Every reference to weights below a bound node, with its dotted path."""
    if isinstance(node, ModelRef):
        yield path, node
    elif isinstance(node, Component):
        yield from model_refs(node.settings, path)
    elif dataclasses.is_dataclass(node):
        for f in dataclasses.fields(node):
            yield from model_refs(getattr(node, f.name), f"{path}.{f.name.removesuffix('_')}")
    elif isinstance(node, Mapping | list):
        for key, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from model_refs(child, f"{path}.{key}")


def bind_stage(binder: Binder, name: str, node: Any, base: frozenset[str]) -> Any:
    """One stage of the recipe, by its `kind`; `base` are the fields that the recipe's model computes."""
    path = f"stages.{name}"
    if name in RESERVED:
        binder.errors.append(f"{path}: {RESERVED[name]}; call the stage something else")
    elif not STAGE_NAME.fullmatch(str(name)):
        binder.errors.append(
            f"stages: {name!r}: a stage's name is made of letters, digits, '_', '-' and '.', and begins with no '.'"
        )
        return None
    if not isinstance(node, Mapping):
        binder.errors.append(f"{path}: expected a mapping with `kind`, got {node!r}")
        return None
    kind = node.get("kind")
    if kind not in CATALOGUE["stage"]:
        binder.errors.append(f"{path}.kind: no stage kind is called {kind!r}{hint(kind, CATALOGUE['stage'])}")
        return None
    cls = binder.locate("stage", str(kind), f"{path}.kind")
    settings = {k: v for k, v in node.items() if k != "kind"} | watched(node)
    stage = binder.record(cls, f"stage kind {kind!r}", settings, path)
    if stage is not None:
        binder.errors += [f"{path}.{line}" for line in [*sizes(stage), *stage.problems(base)]]
    return stage


def sizes(node: Any) -> list[str]:
    """Settings of a stage, and of its `eval`, that are too small to mean anything."""
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    given = {key: value for key, value in values.items() if value is not None}
    found = [f"{key}: expected at least 1, got {value}" for key, value in given.items() if key in COUNTS and value < 1]
    if given.get("lr", 0.0) < 0:
        found.append(f"lr: expected 0 or more, got {given['lr']}")
    if given.get("temperature", 1.0) <= 0:
        found.append(f"temperature: expected more than 0, got {given['temperature']}")
    if values.get("loss") == [] and not values.get("updates"):
        found.append("loss: required; a stage without a loss trains nothing")
    if dataclasses.is_dataclass(values.get("eval")):
        found += [f"eval.{line}" for line in sizes(values["eval"])]
    return found


def watched(node: Mapping[str, Any]) -> dict[str, Any]:
    """`watch` with what its diagnostics leave unset taken from the one loss term that has it (clip bounds, say).

    The same in each of the node's `updates`.
    """
    updates = node.get("updates")
    if isinstance(updates, Mapping):
        filled = {k: {**u, **watched(u)} if isinstance(u, Mapping) else u for k, u in updates.items()}
        return {"updates": filled, **watched({k: v for k, v in node.items() if k != "updates"})}
    if not isinstance(node.get("watch"), list) or not isinstance(node.get("loss"), list):
        return {}
    known: dict[str, list[Any]] = {}
    for term in node["loss"]:
        for key, value in settings_of("loss", term).items():
            known.setdefault(key, []).append(value)
    out = []
    for item in node["watch"]:
        unset = [k for k, v in settings_of("watch", item).items() if v is inspect.Parameter.empty]
        taken = {k: known[k][0] for k in unset if len(known.get(k, [])) == 1}
        out.append({**({"name": item} if isinstance(item, str) else item), **taken} if taken else item)
    return {"watch": out}


def settings_of(group: str, node: Any) -> dict[str, Any]:
    """The hyperparameters of a shipped component as the node sets them, or its defaults; empty where it is not known."""
    given = {"name": node} if isinstance(node, str) else dict(node) if isinstance(node, Mapping) else {}
    if given.get("name") not in CATALOGUE[group]:
        return {}
    module, _, attr = CATALOGUE[group][given["name"]].partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), attr)).parameters.values()
    return {p.name: given.get(p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def bind_objective(binder: Binder, text: Any, stages: Mapping[str, Any], where: str = "objective") -> tuple[str, str]:
    """`rl/eval/accuracy` -> (rl, eval/accuracy). What is measured is known here; what training logs shows in the run."""
    if not isinstance(text, str):
        return "", ""
    name, _, metric = text.partition("/")
    if name not in stages:
        binder.errors.append(f"{where}: {text!r} names no stage of the recipe; write stage/metric{hint(name, stages)}")
        return "", ""
    stage = stages[name]
    if stage is None:  # its own mistakes are reported
        return name, metric
    measured = [f"eval/{m.name}" for m in getattr(getattr(stage, "eval", None), "metrics", [])]
    if policies := getattr(stage, "policies", None):
        measured = [f"{policy}/{m.name}" for policy in policies for m in stage.metrics]
    if not metric or (metric not in measured and (policies or metric.startswith("eval/"))):
        known = [f"{name}/{m}" for m in measured] or [f"{name}/loss"]
        binder.errors.append(f"{where}: stage {name!r} measures no {metric!r}; write stage/metric{hint(text, known)}")
    return name, metric


def stage_refs(node: Any) -> list[str]:
    """The stages that a stage takes weights from."""
    refs = [r for _, r in located(node, "") if not r.startswith("@task/") and r != "@model"]
    return list(dict.fromkeys(stage_of(r) for r in refs))


def stage_of(ref: str) -> str:
    """The stage of `@rl`, `@rl:best` or `@rl/critic:step=80`."""
    return ref[1:].partition(":")[0].partition("/")[0]


def check_refs(binder: Binder, nodes: Mapping[str, Any], task: TaskSource | None, *, no_task: bool) -> None:
    """Every reference names a stage of the recipe or a split of its task (None also for a task with a mistake)."""
    for path, ref in located(nodes, "stages"):
        if ref.startswith("@task/"):
            split = ref.removeprefix("@task/")
            if no_task:
                binder.errors.append(f"{path}: {ref!r} needs a task, and the recipe has none; give task=NAME")
            elif task is not None and split not in task.splits:
                binder.errors.append(f"{path}: the task has no split {split!r}{hint(split, task.splits)}")
        elif ref != "@model" and (stage := stage_of(ref)) not in nodes:
            binder.errors.append(f"{path}: {ref!r} refers to no stage of the recipe{hint(stage, nodes)}")


def located(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every `@...` string below a node, with its dotted path."""
    if isinstance(node, str) and node.startswith("@"):
        yield path, node
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield from located(value, f"{path}.{key}")


def in_order(binder: Binder, inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """Stages after what they refer to, otherwise as the file has them."""
    order: list[str] = []
    waiting = list(inputs)
    while waiting:
        ready = [n for n in waiting if all(i in order or i not in inputs for i in inputs[n])]
        if not ready:
            binder.errors.append(
                f"stages: {' -> '.join(cycle(inputs, waiting))}: each starts from the next, so none can run first"
            )
            return [*order, *waiting]
        order.append(ready[0])
        waiting.remove(ready[0])
    return order


def cycle(inputs: Mapping[str, Sequence[str]], waiting: Sequence[str]) -> list[str]:
    """Stages that wait for one another: from one of them back to itself."""
    path = [waiting[0]]
    while path[-1] not in path[:-1]:
        path.append(next(i for i in inputs[path[-1]] if i in waiting))
    return path[path.index(path[-1]) :]
