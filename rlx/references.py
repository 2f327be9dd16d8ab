"""References of a recipe, before anything is bound: `@stage`, `@task/split`, `@model`; and the order of stages they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlx.build import Binder, hint
from rlx.types import TaskSource


def located(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every `@...` string below a node, with its dotted path."""
    if isinstance(node, str) and node.startswith("@"):
        yield path, node
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield from located(value, f"{path}.{key}")


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
