"""The models of a stage: where each comes from, what it offers, and how targets follow."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rlx.build import hint, model_offers
from rlx.models.lora import Lora
from rlx.types import HEADS, Component, ConfigError, Model, ModelName, ModelRef, Policy

# The reference policy's fields go by the name that the field knows them by.
PREFIX = {"reference": "ref"}


@dataclass(kw_only=True)
class Refresh:
    """Give a frozen model the weights of another, every so many steps."""

    every: int
    to: str = "policy"


@dataclass(kw_only=True)
class ModelSpec:
    """One model of a stage: `from` a reference, made by `model`, following another as its `ema`, or a `mix` of others.

    `heads` maps names to what they read (HEADS in rlx/types.py). An ema target is p <- decay p + (1 - decay) q after each
    update of the model that it follows. `mix` maps models to their weights in a geometric mixture, token by token.
    `bias` is what heads that no checkpoint has begin with: about the mean return, where 0 would be far from it.
    `freeze` names parts that are not trained, such as `vision_tower`: words of the weights' dotted names.
    """

    from_: ModelRef | None = None
    model: Component[Model] | None = None
    heads: dict[str, str] = field(default_factory=dict)
    bias: float = 0.0
    lora: Lora | None = None
    add_tokens: list[str] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)
    ema: str = ""
    mix: dict[str, float] = field(default_factory=dict)
    decay: float = 0.995
    refresh: Refresh | None = None


def as_spec(given: ModelRef | ModelSpec | None) -> ModelSpec:
    """`@sft` is short for `{from: "@sft"}`."""
    return given if isinstance(given, ModelSpec) else ModelSpec(from_=given)


def spec_problems(specs: Mapping[str, ModelSpec]) -> list[str]:
    """What is wrong with the models of a stage taken together."""
    found = []
    for name, spec in specs.items():
        at = f"models.{name}"
        if sum([spec.from_ is not None, spec.model is not None, bool(spec.ema), bool(spec.mix)]) > 1:
            found.append(f"{at}: takes one of from, model, ema and mix")
        for head, read in spec.heads.items():
            if read not in HEADS:
                found.append(f"{at}.heads.{head}: no head reads {read!r}{hint(read, HEADS)}")
        for key, other in (("ema", spec.ema), ("refresh.to", spec.refresh.to if spec.refresh else "")):
            if other and other not in specs:
                found.append(f"{at}.{key}: the stage has no model {other!r}{hint(other, specs)}")
        if spec.ema in specs and (specs[spec.ema].ema or specs[spec.ema].mix):
            found.append(f"{at}.ema: {spec.ema!r} follows others itself; a target follows a model with weights of its own")
        for other in spec.mix:
            if other not in specs or specs[other].ema or specs[other].mix:
                plain = [n for n, s in specs.items() if not s.ema and not s.mix]
                found.append(f"{at}.mix: {other!r} is none of the models to be mixed{hint(other, plain)}")
        if not 0 <= spec.decay <= 1:
            found.append(f"{at}.decay: expected 0 to 1, got {spec.decay}")
    return found


def offers(name: str, specs: Mapping[str, ModelSpec], base: frozenset[str]) -> set[str]:
    """The fields that a model computes, known before it is loaded; `base` are those of the recipe's model."""
    spec = specs[name]
    if spec.ema in specs:
        return offers(spec.ema, specs, base)
    made = model_offers(spec.model) if spec.model is not None else base
    return {*made, *spec.heads}


def prefix(name: str) -> str:
    """What a model's fields begin with."""
    return PREFIX.get(name, name)


def named(components: Iterable[Component[Any]]) -> Iterator[tuple[Component[Any], str, ModelName]]:
    """(component, key, model) for each setting that names a model of the stage, in nested components as well."""
    for component in components:
        for key, value in component.settings.items():
            if isinstance(value, ModelName):
                yield component, key, value
            elif isinstance(value, Component):
                yield from ((component, f"{key}.{k}", m) for _, k, m in named([value]))


def with_models(component: Component[Any], models: Mapping[str, Policy]) -> Component[Any]:
    """The component with the models that its settings name in the names' place."""
    given: dict[str, Any] = {}
    for key, value in component.settings.items():
        if isinstance(value, ModelName):
            given[key] = models[value]
        elif isinstance(value, Component) and any(named([value])):
            given[key] = with_models(value, models)
    if not given:
        return component
    settings = {**component.settings, **given}
    return Component(**{**vars(component), "call": functools.partial(component.call, **given), "settings": settings})


def random_heads(models: Mapping[str, Any], specs: Mapping[str, ModelSpec], trained: Collection[str]) -> list[str]:
    """One line for each head that was drawn at random on a model that is not trained; an ema target follows one that is."""
    return [
        f"models.{name}: the weights of its head {head!r} are random, because none were saved with the model, and this stage "
        "does not train them"
        for name, model in models.items()
        if name not in trained and not specs[name].ema and getattr(model, "heads", None) is not None
        for head in sorted(model.heads.drawn)
    ]


def padded(models: Mapping[str, Any], trained: Collection[str]) -> list[str]:
    """One line for each language model in training whose sequences cannot be packed."""
    return [
        f"models.{name}: its forward pads sequences and reads a prompt once for each answer, because the architecture "
        "cannot be packed; updates take longer"
        for name, model in models.items()
        if name in trained and not getattr(model, "packs", True)
    ]


@torch.no_grad()
def follow(models: Mapping[str, Policy], specs: Mapping[str, ModelSpec], trained: str) -> None:
    """Move the ema targets of a model that has just been updated."""
    for name, spec in specs.items():
        if spec.ema == trained and name in models:
            for target, source in zip(weights(models[name]), weights(models[trained]), strict=True):
                target.lerp_(source.to(target.dtype), 1 - spec.decay)  # under ZeRO, bf16 weights are kept in bfloat16


@torch.no_grad()
def refresh(models: Mapping[str, Policy], specs: Mapping[str, ModelSpec], step: int) -> None:
    """Renew the frozen models whose turn it is after this step."""
    for name, spec in specs.items():
        if spec.refresh is not None and name in models and step % spec.refresh.every == 0:
            for target, source in zip(weights(models[name]), weights(models[spec.refresh.to]), strict=True):
                target.copy_(source)


def weights(policy: Policy) -> list[torch.Tensor]:
    """Every weight of a model, heads included, trained or not."""
    return list(named_weights(policy).values())


def named_weights(policy: Any) -> dict[str, torch.Tensor]:
    """Every weight of a model and its heads by name; tied ones once."""
    heads = getattr(policy, "heads", None)
    own = dict(policy.module.named_parameters())
    return own | ({f"heads.{name}": x for name, x in heads.named_parameters()} if heads is not None else {})


def freeze(policy: Policy, parts: Iterable[str], where: str) -> None:
    """Train all but some parts of a model. Raises ConfigError where it has no such part."""
    for part in parts:
        found = [p for name, p in policy.module.named_parameters() if f".{part}." in f".{name}."]
        if not found:
            known = dict.fromkeys(word for name, _ in policy.module.named_parameters() for word in name.split(".")[:-1])
            raise ConfigError(f"{where}: freeze: the model has no part {part!r}{hint(part, known)}")
        for weight in found:
            weight.requires_grad_(False)


def target_of(policy: Any) -> Any:
    """A copy that is never trained: an ema target's start."""
    made = copy.copy(policy)
    made.module = copy.deepcopy(policy.module).requires_grad_(False)
    if getattr(policy, "heads", None) is not None:
        made.heads = copy.deepcopy(policy.heads).requires_grad_(False)
    return made
