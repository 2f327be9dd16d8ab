"""What a stage's components ask for by name, and whether it can be had: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlx.build import hint
from rlx.marks import marked
from rlx.stages.models import ModelSpec, named, offers, prefix
from rlx.types import FIELDS, Component

DRAWN = ("old_logp", "rollout_logp")  # known of tokens that a policy drew, and not of a demonstration's
PLAYED = ("reward", "ret", "bootstrap", "turn_reward", "turn_done")  # known of what was played and paid, not of rows of data


def reads(*groups: Sequence[Component[Any]]) -> set[str]:
    """Every field that some component reads."""
    return {name for group in groups for component in group for name in component.reads}


def available(
    specs: Mapping[str, ModelSpec], base: frozenset[str], trained: Sequence[str], derive: Sequence[Component[Any]] = ()
) -> set[str]:
    """The fields that a stage with these models can make, but for those of the model in training."""
    own = {name for name, field in FIELDS.items() if field.made_by == "collate"} | {"old_logp"} | {d.into for d in derive}
    others = {f"{prefix(name)}_{x}" for name in specs for x in offers(name, specs, base)}
    return own | others | {f"old_{x}" for name in trained if name in specs for x in offers(name, specs, base)}


def problems(
    *,
    specs: Mapping[str, ModelSpec],
    base: frozenset[str],
    train: str,
    trained: Sequence[str],
    loss: Sequence[Component[Any]],
    advantage: Sequence[Component[Any]] = (),
    derive: Sequence[Component[Any]] = (),
    watch: Sequence[Component[Any]] = (),
    absent: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> list[str]:
    """One line for each component that reads a field that this stage does not make.

    `base` is what the recipe's model computes, `train` the model in training, `absent` are the fields that the stage never
    makes, `extra` those of its data.
    """
    forward = offers(train, specs, base) if train in specs else set()
    before = (available(specs, base, trained, derive) | set(extra)) - set(absent)
    found = []
    for group, components in (("derive", derive), ("advantage", advantage), ("loss", loss), ("watch", watch)):
        states = {state[0] for c in components if (state := marked(c.call, "state"))}
        made = before | states | (forward | {"adv"} if group in ("loss", "watch") else set())
        for component in components:
            for name in component.reads:
                if name == "adv" and "adv" not in absent and not advantage and group in ("loss", "watch"):
                    found.append(f"advantage: required, because {group} {component.name!r} reads adv")
                elif name in made and not (name == "adv" and "adv" in absent):
                    continue
                elif name == "ref_logp":
                    found.append(f"reference: required, because {group} {component.name!r} reads ref_logp")
                elif (head := name.removeprefix("old_")) in ("value", "score"):
                    where = {"value": "{value: token}", "score": "{score: last}"}[head]
                    found.append(
                        f"models: {group} {component.name!r} reads {name}, which no model of the stage computes; "
                        f"give one heads: {where}"
                    )
                else:
                    found.append(
                        f"{group}: {component.name!r} reads {name!r}, which this stage does not make{hint(name, made)}"
                    )
    return list(dict.fromkeys(found))


def taken(columns: Sequence[str], streams: Sequence[str] = ()) -> list[str]:
    """One line for each column of the data, and each stream of a sampler, that is called like a field."""
    own = {*FIELDS, "index"}
    what = "is already a field of every batch"
    found = [f"columns.{i}: {x!r} {what}; rename the column of the data" for i, x in enumerate(columns) if x in own]
    return found + [f"sampler: its stream {x!r} {what}; the sampler has to rename it" for x in streams if x in own]


def misnamed(specs: Mapping[str, ModelSpec], **groups: Sequence[Component[Any]]) -> list[str]:
    """One line for each setting that names a model that the stage does not have."""
    return [
        f"{group}: {component.name!r} has {key}={model!r}; the stage has no such model{hint(model, specs)}"
        for group, components in groups.items()
        for component, key, model in named(components)
        if model not in specs
    ]


def needed(
    specs: Mapping[str, ModelSpec], wanted: set[str], trained: Sequence[str], components: Sequence[Component[Any]]
) -> dict[str, ModelSpec]:
    """The models that are to be loaded: all but a reference policy whose fields nobody reads."""
    followed = {name for spec in specs.values() for name in (spec.ema, *spec.mix)}
    used = {model for _, _, model in named(components)} | set(trained) | followed
    unread = "reference" not in used and not any(name.startswith("ref_") for name in wanted)
    return {name: spec for name, spec in specs.items() if name != "reference" or not unread}
