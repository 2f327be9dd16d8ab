"""A composed config -> a plan: every component bound, every reference resolved, the stages in order; or every mistake."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx import relations
from rlx.build import Binder, hint, looks_local, model_offers
from rlx.catalogue import CATALOGUE
from rlx.paths import CONF
from rlx.references import check_refs, in_order, stage_refs
from rlx.resume import Save
from rlx.types import Component, ConfigError, Episode, Model, Rollout, Stage, TaskSource
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
    "rollout": Component[Rollout],
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
    rollout: Component[Rollout] | None = None


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
    relations.check(binder, config, stages, model)
    objective = bind_objective(binder, config.get("objective"), stages)
    if binder.errors:
        raise ConfigError("\n".join(dict.fromkeys(binder.errors)))
    return Plan(
        without(config, binder.dropped), model, stages, task, objective, inputs, binder.notices, save, bound.get("rollout")
    )


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

    verifier.means = task.verifier  # type: ignore[attr-defined]  # it may be one that worker processes compute
    return verifier


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
