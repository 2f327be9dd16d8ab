"""`kind: repeat`: rounds of stages, written out as plain stages before anything is bound.

A round's stages are ordinary ones: each has its folder, its DONE, its place in the graph of a claim, its seed by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlx.build import Binder, hint


@dataclass(kw_only=True)
class Repeat:
    """`stages`, `times` times over. `carry` names what a round starts from, `next` what the round after it starts from.

        loop:
          kind: repeat
          times: 3
          carry: {policy: "@sft"}
          stages:
            rows: {kind: collect, policy: "@policy", ...}
            dpo: {kind: fit, policy: "@policy", data: "@rows", ...}
          next: {policy: "@dpo"}

    Round 2 of `dpo` is the stage `loop-2-dpo`. After the loop, `@loop` is what a further round would start from: the policy,
    or the only thing carried; `@loop/NAME` is any other.
    """

    times: int
    stages: dict[str, Any]
    carry: dict[str, str] = field(default_factory=dict)
    next: dict[str, str] = field(default_factory=dict)


def unrolled(stages: Mapping[str, Any], binder: Binder) -> dict[str, Any]:
    """The stages with the rounds of each repeat in its place; what is wrong with one is in the binder's errors."""
    found: dict[str, Any] = {}
    outputs: dict[str, str] = {}
    for name, node in stages.items():
        if not is_repeat(node):
            found[name] = node
            continue
        settings = {key: value for key, value in node.items() if key != "kind"}
        loop = binder.record(Repeat, "stage kind 'repeat'", settings, f"stages.{name}")
        if loop is None:
            continue
        wrong = problems(name, loop, stages)
        binder.errors += [f"stages.{name}.{line}" for line in wrong]
        if wrong:
            continue
        carried = dict(loop.carry)
        for i in range(1, loop.times + 1):
            own = {stage: f"@{name}-{i}-{stage}" for stage, inner in loop.stages.items() if inner is not None}
            here = {**own, **carried}
            found |= {own[stage][1:]: renamed(loop.stages[stage], here) for stage in own}
            carried = {key: renamed(ref, here) for key, ref in loop.next.items()}
        outputs |= {f"{name}/{key}": ref for key, ref in carried.items()}
        if main := carried.get("policy") or (next(iter(carried.values())) if len(carried) == 1 else ""):
            outputs[name] = main
    return {name: renamed(node, outputs) for name, node in found.items()}


def is_repeat(node: Any) -> bool:
    """Whether a stage's node is a repeat."""
    return isinstance(node, Mapping) and node.get("kind") == "repeat"


def problems(name: str, loop: Repeat, stages: Mapping[str, Any]) -> list[str]:
    """What is wrong with a repeat's settings taken together."""
    found = [] if loop.times > 0 else [f"times: expected at least 1, got {loop.times}"]
    if not any(node is not None for node in loop.stages.values()):
        found.append("stages: a round needs at least one stage")
    for key in {**loop.stages, **loop.carry}:
        if key in stages or key in ("model", "task"):
            found.append(
                f"{'stages' if key in loop.stages else 'carry'}.{key}: @{key} already means something outside; rename it"
            )
        elif key in loop.stages and key in loop.carry:
            found.append(f"carry.{key}: a stage of the round has that name, too")
    for key, node in loop.stages.items():
        if is_repeat(node):
            found.append(f"stages.{key}: a repeat within a repeat; write the inner rounds as stages")
    for key in dict.fromkeys([*loop.carry, *loop.next]):
        if key not in loop.next:
            found.append(f"next.{key}: required, because {key!r} is carried; what does the next round start from?")
        elif key not in loop.carry:
            found.append(f"carry.{key}: required, because `next` names {key!r}{hint(key, loop.carry)}")
    return found


def renamed(node: Any, names: Mapping[str, str]) -> Any:
    """A copy of a node in which `@x` of `names`, with what follows it (`:best`, `/critic`), stands for the reference named."""
    if isinstance(node, str) and node.startswith("@"):
        known = (k for k in sorted(names, key=len, reverse=True) if node[1:] == k or node[1:].startswith((k + ":", k + "/")))
        name = next(known, None)
        return node if name is None else names[name] + node[1 + len(name) :]
    if isinstance(node, Mapping):
        return {key: renamed(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [renamed(value, names) for value in node]
    return node


def moved(paths: Iterable[str], stages: Mapping[str, Any]) -> frozenset[str]:
    """Dotted paths of a config, those inside a repeat as the paths of every round."""
    found = set()
    for path in paths:
        top, *rest = path.split(".")
        node = stages.get(rest[0]) if top == "stages" and len(rest) > 2 and rest[1] == "stages" else None
        times = node.get("times") if isinstance(node, Mapping) and is_repeat(node) else 0
        if isinstance(times, int) and times > 0:
            found |= {".".join([top, f"{rest[0]}-{i}-{rest[2]}", *rest[3:]]) for i in range(1, times + 1)}
        else:
            found.add(path)
    return frozenset(found)
