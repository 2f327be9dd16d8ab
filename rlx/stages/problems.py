"""What is wrong with the settings of an `online` stage taken together, said before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlx.build import hint
from rlx.stages.fields import misnamed
from rlx.stages.fields import problems as field_problems
from rlx.stages.models import spec_problems
from rlx.types import Component, Sampler

if TYPE_CHECKING:
    from rlx.stages.online import Online


def online_problems(stage: Online, base: frozenset[str]) -> list[str]:
    """One line for each mistake; `base` are the fields that the recipe's model computes."""
    specs, updates = stage.specs(), stage.all_updates()
    trained = [update.train for update in updates.values()]
    found = spec_problems(specs) + misnamed(specs, reward=stage.reward, keep=stage.keep, sampler=[stage.sampler])
    if stage.updates and stage.loss:
        found.append("loss: with `updates`, each update has its own; leave it out")
    for key in ("policy", "reference", "value"):
        if getattr(stage, key) is not None and {"value": "critic"}.get(key, key) in stage.models:
            found.append(f"{key}: given twice, here and in models")
    for name, update in updates.items():
        at = f"updates.{name}." if name else ""
        if update.train not in specs:
            found.append(f"{at}train: the stage has no model {update.train!r}{hint(update.train, specs)}")
        if update.on not in ("kept", *stage.buffers):
            found.append(f"{at}on: no buffer is called {update.on!r}{hint(update.on, ['kept', *stage.buffers])}")
        if not update.loss:
            found.append(f"{at}loss: required; a stage without a loss trains nothing")
        if update.lr is None:
            found.append(f"{at}lr: required, not given")
        made = field_problems(
            specs=specs,
            base=base,
            train=update.train,
            trained=trained,
            loss=update.loss,
            advantage=update.advantage or [],
            derive=update.derive or [],
            watch=update.watch,
            absent=("label",) if update.on == "kept" else (),
            extra=stage.columns + streams(stage.sampler),
        )
        found += [at + line if at and line.startswith(("loss", "watch")) else line for line in made]
        grouped = [a.name for a in update.advantage or [] if "group" in a.reads]
        if grouped and stage.group_size < 2:
            found.append(f"group_size: advantage {grouped[0]!r} compares the samples of a prompt; 2 or more are needed")
    for name, buffer in stage.buffers.items():
        if buffer.resample and buffer.resample not in specs:
            found.append(f"buffers.{name}.resample: the stage has no model {buffer.resample!r}{hint(buffer.resample, specs)}")
    found += [f"eval.{line}" for line in (stage.eval.problems() if stage.eval is not None else ())]
    return list(dict.fromkeys(found))


def streams(sampler: Component[Sampler]) -> list[str]:
    """The fields that a sampler's turns carry besides (`Turn.token`), as its function's attribute `streams` says."""
    return list(getattr(getattr(sampler.call, "func", sampler.call), "streams", ()))
