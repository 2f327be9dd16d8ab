"""What bound stages ask of one another, of the task and of the launch: rows, weights, models, trust."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from rlx.build import Binder, hint, untrusted
from rlx.launch import launch_of, undivided
from rlx.types import Component, ConfigError, DataRef, ModelName, ModelRef


def check(binder: Binder, config: Mapping[str, Any], stages: Mapping[str, Any], model: Any) -> None:
    """Every mistake between bound stages; a stage with a mistake of its own is None."""
    check_rows(binder, stages)
    check_models(binder, stages)
    check_weights(binder, stages)
    if not binder.errors:  # references may go round in circles
        check_mixes(binder, stages, model)
    check_verifier(binder, stages, no_task=config.get("task") is None)
    if model is not None and model.settings.get("trust_remote_code"):
        check_trust(binder, stages)
    check_launch(binder, config, stages)


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


def check_verifier(binder: Binder, stages: Mapping[str, Any], *, no_task: bool) -> None:
    """The reward `verifier` (the catalogue's, not a function of the user's) needs a task."""
    for name, stage in stages.items():
        calls = [getattr(reward.call, "func", None) for reward in getattr(stage, "reward", []) if reward is not None]
        if no_task and any(call.__module__ == "rlx.rewards.rules" and call.__name__ == "verifier" for call in calls if call):
            binder.errors.append(f"stages.{name}.reward: the recipe has no task, so it has no verifier; give task=NAME")


def check_trust(binder: Binder, stages: Mapping[str, Any]) -> None:
    """Where the recipe's model brings code, each other directory or hub id that a stage loads brings its own."""
    for name, stage in stages.items():
        for path, ref in model_refs(stage, f"stages.{name}"):
            if ref.path and not binder.trusts(ref.path):
                binder.errors.append(f"{path}: with model.trust_remote_code this {untrusted(ref.path)}")


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
