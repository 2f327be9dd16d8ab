"""What is wrong with the settings of an `online` stage taken together, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlx.build import hint
from rlx.stages.buffers import BufferSpec
from rlx.stages.drawing import stop_problems
from rlx.stages.fields import DRAWN, PLAYED, misnamed, reads, taken
from rlx.stages.fields import problems as field_problems
from rlx.stages.models import ModelSpec, offers, spec_problems
from rlx.stages.updates import UpdateSpec
from rlx.types import Component, Sampler

if TYPE_CHECKING:
    from rlx.stages.online import Online


def online_problems(stage: Online, base: frozenset[str]) -> list[str]:
    """One line for each mistake; `base` are the fields that the recipe's model computes."""
    specs, updates = stage.specs(), stage.all_updates()
    trained = [update.train for update in updates.values()]
    found = stop_problems(stage.stop) + spec_problems(specs)
    found += misnamed(specs, reward=stage.reward, keep=stage.keep, sampler=[stage.sampler])
    if stage.updates and stage.loss:
        found.append("loss: with `updates`, each update has its own; leave it out")
    for key in ("policy", "reference", "value"):
        if getattr(stage, key) is not None and {"value": "critic"}.get(key, key) in stage.models:
            found.append(f"{key}: given twice, here and in models")
    found += taken(stage.columns, streams(stage.sampler)) + shared(specs, base, updates)
    for name, update in updates.items():
        at = f"updates.{name}." if name else ""
        if update.train not in specs:
            found.append(f"{at}train: the stage has no model {update.train!r}{hint(update.train, specs)}")
        if update.on not in ("kept", *stage.buffers):
            found.append(f"{at}on: no buffer is called {update.on!r}{hint(update.on, ['kept', *stage.buffers])}")
        if update.on in stage.buffers:
            found += [at + line for line in unknown(update, stage.buffers[update.on])]
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


def unknown(update: UpdateSpec, buffer: BufferSpec) -> list[str]:
    """One line if an update reads what is not known of all episodes of its buffer."""
    absent = {*DRAWN, *PLAYED} if buffer.start is not None else set(DRAWN) if buffer.as_ == "demonstration" else set()
    wanted = reads(update.loss, update.watch)
    wanted |= reads(update.advantage or []) if "adv" in wanted else set()
    for derive in reversed(update.derive or []):
        wanted |= set(derive.reads) if derive.into in wanted else set()
    names = ", ".join(sorted(wanted & absent))
    why = "the rows of its `start` were not played" if buffer.start is not None else "it keeps demonstrations"
    return [f"on: the update reads {names}, which buffer {update.on!r} does not have: {why}"] if names else []


def shared(specs: Mapping[str, ModelSpec], base: frozenset[str], updates: Mapping[str, UpdateSpec]) -> list[str]:
    """One line for each `old_x` that is read where several trained models compute an x of that name."""
    trained = [name for name in dict.fromkeys(u.train for u in updates.values()) if name in specs]
    found = []
    for old in sorted({name for u in updates.values() for name in u.reads if name.startswith("old_")} - {"old_logp"}):
        x = old.removeprefix("old_")
        models = [name for name in trained if x in offers(name, specs, base)]
        if len(models) > 1:
            found.append(
                f"updates: {old} could be of {' or '.join(models)}, which are all trained and compute {x}; give their heads "
                f"different names (heads: {{{x}_2: ...}}) and rename what is read (read: {{{x}: {x}_2, {old}: old_{x}_2}})"
            )
    return found


def streams(sampler: Component[Sampler]) -> list[str]:
    """The fields that a sampler's turns carry besides (`Turn.token`), as its function's attribute `streams` says."""
    return list(getattr(getattr(sampler.call, "func", sampler.call), "streams", ()))
