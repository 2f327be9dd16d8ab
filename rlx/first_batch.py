"""`rlx check --first-batch`: the batch that each stage draws first, seen through a model of two layers and random weights."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlx import memory, probes
from rlx.launch import launch_of, num_ranks
from rlx.memory import Sizes
from rlx.models.language import LanguageModel
from rlx.models.load import outline, pretrained, shrunken
from rlx.plan import Plan
from rlx.rewards.score import score as pay
from rlx.rollout.native import generate
from rlx.stages.collect import Collect
from rlx.stages.context import Sources
from rlx.stages.evaluate import Evaluate
from rlx.stages.fields import reads
from rlx.stages.fit import Fit
from rlx.stages.merge import Merge
from rlx.stages.models import ModelSpec, with_models
from rlx.stages.online import Online
from rlx.stages.prepare import columns as add_columns
from rlx.stages.prepare import credit, fill
from rlx.stages.rows import Shuffled, tokenized, with_columns
from rlx.stages.summary import average
from rlx.terms import mask_of, reduced, step_counts
from rlx.types import Component, ConfigError, DataError, Episode, Model, ModelRef, Play, Sampling
from rlx.units import units

ROWS = 4  # rows of a fit, or prompts of an online stage, that go through the model
NEW_TOKENS = 64  # the longest rollout
BUDGET = 1024  # padded tokens of one forward: a large vocabulary's logits have to fit into a laptop's memory


@dataclass
class Models:
    """What stands for the weights of a reference: a shrunken model to compute with, and the sizes of the real one."""

    plan: Plan
    made: dict[str, tuple[LanguageModel, Sizes]] = field(default_factory=dict)

    def get(self, ref: ModelRef | None) -> tuple[LanguageModel, Sizes]:
        """Of the directory or hub id that a reference begins with, followed through the stages; without one, of `model`."""
        while ref is not None and ref.stage:
            source = self.plan.stages.get(ref.stage)
            specs = source.specs() if isinstance(source, Fit | Online | Merge) else {}
            ref = specs[next(iter(source.terms)) if isinstance(source, Merge) else "policy"].from_ if specs else None
        name = ref.path if ref is not None else ""
        if name not in self.made:
            model = self.plan.model if ref is None else at_path(self.plan.model.settings, ref.path)
            small = shrunken(model)
            small.engine = generate
            self.made[name] = small, memory.sizes(outline(model))
        return self.made[name]

    def of(self, specs: Mapping[str, ModelSpec]) -> dict[str, Any]:
        """A shrunken model, with its heads, for each model of a stage."""
        found = {}
        for name, spec in specs.items():
            start = specs.get(spec.ema, spec)
            made = copy.copy(self.get(start.from_)[0])
            found[name] = made.with_heads(start.heads, 0) if start.heads else made
        return found


def at_path(settings: Mapping[str, Any], path: str) -> Component[Model]:
    """The model of a directory or hub id, with those of the recipe's settings that any pretrained model takes."""
    shared = {k: v for k, v in settings.items() if k in inspect.signature(pretrained).parameters}
    given = {**shared, "path": path}
    return Component("pretrained", functools.partial(pretrained, **given), settings=given)


def look(plan: Plan) -> Iterator[str]:
    """Lines to print, stage by stage. Raises ConfigError at the end, with what is wrong in any stage."""
    wrong: list[str] = []
    rows: dict[str, list[Episode]] = {}
    models = Models(plan)
    for name, stage in plan.stages.items():
        at = Sources(run_dir=Path(), name=name, seed=plan.config["seed"], model=plan.model, task=plan.task, rows=rows)
        yield f"\n{name}"
        try:
            if writer := getattr(getattr(stage, "data", None), "stage", ""):
                yield f"  its rows are written by stage {writer!r} in the run; there is nothing to look at before"
            elif isinstance(stage, Fit | Online):
                lines = fit(stage, at, models) if isinstance(stage, Fit) else online(stage, at, models)
                yield from (f"  {line}" for line in lines)
            elif isinstance(stage, Collect):
                yield f"  {columns(at.data(stage.data, stage.limit))}; it writes {stage.describe()}"
            tested = stage if isinstance(stage, Evaluate) else getattr(stage, "eval", None)
            if tested is not None and not tested.data.stage:
                yield f"  evaluates on {columns(at.data(tested.data, tested.limit))}"
        except ConfigError as error:
            wrong.append(str(error) if str(error).startswith("stages.") else f"stages.{name}: {error}")
    yield f"\nthis machine: {memory.machine()}"
    if wrong:
        raise ConfigError("\n".join(wrong))


# --------------------------------------------------------------------------- the stages
def fit(stage: Fit, at: Sources, models: Models) -> Iterator[str]:
    """Rows, mask, lengths, loss and memory of a `fit` stage."""
    where = f"stages.{at.name}"
    rows = with_columns(at.data(stage.data), stage.columns, f"{where}.columns: {stage.data}")
    yield f"{columns(rows)}"
    model, real = models.get(stage.policy)
    made = tokenized(rows, model, stage.max_length, f"{where}.data")
    if len(made) < len(rows) and (masked := sum(not model.tokenize(row).num_tokens for row in rows)):
        raise DataError(f"{where}.data: {masked} of {len(rows)} rows have no token that is trained on (see `rlx data show`)")
    first = next(Shuffled(made, stage.rows_per_step, at.seeds(), f"{where}.rows_per_step"))
    lengths = [num_tokens(row) for row in first]
    trained = sum(row.num_tokens for row in first) / sum(lengths)
    yield f"first batch: {len(first)} rows of {spread(lengths)} tokens; {trained:.1%} of the positions are trained on"
    longest = max(num_tokens(row) for row in made)
    yield f"longest row: {longest} tokens; max_length {stage.max_length or 'not set'}, the model's context {real.context}"
    if real.context is not None and longest > real.context:
        raise ConfigError(f"{where}.max_length: a row has {longest} tokens and the model's context {real.context}; set it")
    yield from losses(stage, models, first[:ROWS], where)
    prompt = max(len(row.turns[0].seen) for row in made)
    answer = max(num_tokens(row) - len(row.turns[0].seen) for row in made)
    reference = models.get(stage.reference)[1] if "ref_logp" in reads(stage.loss, stage.watch, stage.derive) else None
    yield from memory.estimate(
        real,
        reference,
        rows=stage.rows_per_step,
        prompt=prompt,
        answer=answer,
        budget=stage.token_budget,
        packs=model.packs,
        together=max(Counter(row.group for row in first).values()) if "group" in reads(stage.loss, stage.watch) else 1,
        offloaded=launch_of(models.plan.config).offload_frozen,
    )
    yield from ranks(models, real, reference)


def online(stage: Online, at: Sources, models: Models) -> Iterator[str]:
    """Prompts, rewards on completions made by hand and on rollouts, loss and memory of an `online` stage."""
    where = f"stages.{at.name}"
    rows = with_columns(at.data(stage.data), stage.columns, f"{where}.columns: {stage.data}")
    yield f"{columns(rows)}"
    specs = stage.specs()
    model, real = models.get(specs["policy"].from_)
    first = next(Shuffled(rows, stage.prompts_per_step, at.seeds(), f"{where}.prompts_per_step"))
    limit, speaks = at.max_new_tokens(stage.max_new_tokens), hasattr(model, "render")
    prompts = [len(model.render(at.make_env().reset(row.task))) if speaks else 0 for row in first]
    longest = max(prompts)
    asked = f"prompts of {spread(prompts)} tokens; answers of at most {limit}" if speaks else f"tasks of at most {limit} steps"
    yield f"first batch: {len(first)} {asked}"
    if real.context is not None and longest + limit > real.context:
        raise ConfigError(
            f"{where}.max_new_tokens: {limit} after a prompt of {longest} tokens exceed the model's context of {real.context}"
        )
    cut = min(limit, NEW_TOKENS)
    loaded = models.of(specs)
    rewards = [with_models(reward, loaded) for reward in stage.reward]
    play = Play(
        policy=loaded["policy"],
        make_env=at.make_env,
        sampling=Sampling(cut, stage.temperature, stop=tuple(stage.stop)),
        seed=at.seeds(1, 0),
        make_vec=at.make_vec,
        models=loaded,
        score=functools.partial(pay, rewards=rewards, where=f"{where}.reward"),
        pools={name: [] for name in stage.buffers},
    )
    played = with_models(stage.sampler, loaded).call(play, first[:ROWS], stage.group_size)
    for episode in played:
        episode.info["max_new_tokens"] = limit  # what a reward is told, whatever they are cut at here
    pay(played, rewards, f"{where}.reward")
    made = probes.completions(first[0], model, limit) if speaks else {}
    pay(list(made.values()), rewards, f"{where}.reward")
    label = f"rollouts, mean of {len(played)}" + (f", cut at {cut} {'tokens' if speaks else 'steps'}" if cut < limit else "")
    yield from probes.table(stage.reward, made, played, label)
    scored = [e for e in played if not math.isnan(e.reward) and e.num_tokens]
    if len(scored) < len(played):
        yield f"reward failures: {len(played) - len(scored)} of {len(played)} rollouts could not be scored"
    if not scored:
        raise ConfigError(f"{where}.reward: none of {len(played)} rollouts could be scored")
    yield from losses(stage, models, scored, where)
    wanted = {name for u in stage.all_updates().values() for name in reads(u.loss, u.derive or [], u.watch)}
    reference = models.get(stage.reference)[1] if "ref_logp" in wanted else None
    episodes = stage.prompts_per_step * stage.group_size
    yield from memory.estimate(
        real,
        reference,
        rows=math.ceil(episodes / stage.minibatches),
        prompt=longest,
        answer=limit,
        budget=stage.token_budget,
        packs=speaks and model.packs,
        decoded=min(episodes, Sampling(limit).rows),
        together=stage.group_size if any("group" in reads(u.loss, u.watch) for u in stage.all_updates().values()) else 1,
        offloaded=launch_of(models.plan.config).offload_frozen,
    )
    yield from ranks(models, real, reference)


# --------------------------------------------------------------------------- what they print
def ranks(models: Models, real: Sizes, reference: Sizes | None) -> list[str]:
    """The memory of each rank, where there are several."""
    launch = launch_of(models.plan.config)
    if launch.stage is None:
        return []
    return memory.in_ranks(real, reference, launch.stage, num_ranks(launch), offloaded=launch.offload_frozen)


def columns(rows: list[Episode]) -> str:
    """How many rows there are, and what they have."""
    has = {
        "completion": any(row.turns for row in rows),
        "label": any(row.label not in (None, 1.0) for row in rows),
        "answer": any(row.task.answer is not None for row in rows),
    }
    others = dict.fromkeys(key for row in rows for key in row.task.meta)
    names = ["prompt", *(name for name, found in has.items() if found), *others]
    return f"{len(rows)} rows: {', '.join(names)}"


@torch.no_grad()
def losses(stage: Fit | Online, models: Models, episodes: list[Episode], where: str) -> Iterator[str]:
    """The loss terms of a batch for each update, reduced as the learner does it. Raises ConfigError where one is not finite."""
    temperature = stage.temperature if isinstance(stage, Online) else 1.0
    loaded = models.of(stage.specs())
    updates: dict[str, Any] = stage.all_updates() if isinstance(stage, Online) else {"": stage}
    owners = {x: loaded[n] for n in [getattr(u, "train", "policy") for u in updates.values()] for x in loaded[n].offers}
    for name, u in updates.items():
        if getattr(u, "on", "kept") != "kept":
            continue
        model = loaded[getattr(u, "train", "policy")]
        derive, advantage = u.derive or [], getattr(u, "advantage", None) or []
        batch = model.collate(episodes)
        add_columns(batch, stage.columns, episodes)
        fill(batch, reads(u.loss, derive, advantage), loaded, owners, BUDGET, temperature)
        credit(batch, derive, advantage)
        counts = step_counts(batch, u.loss)
        values = {term.name: 0.0 for term in u.loss}
        for unit in units(model, batch, BUDGET, whole_groups=True):
            fields = {**unit, **model.forward(unit, (reads(u.loss) | {"logp"}) & model.offers, temperature)}
            for term in u.loss:
                values[term.name] += float(reduced(term, fields, u.reduce, counts[mask_of(term)]))
        at = f"{where}.updates.{name}" if name else where
        if bad := {key: value for key, value in values.items() if not math.isfinite(value)}:
            raise ConfigError("\n".join(f"{at}.loss: {key!r} is {value} on the first batch" for key, value in bad.items()))
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        flat = " (all advantages are 0: equal rewards teach nothing)" if "adv" in batch and not batch["adv"].any() else ""
        yield f"loss of {len(batch.inputs)} rows with random weights: {shown}{flat}" + (f" ({name})" if name else "")


def spread(counts: list[int]) -> str:
    """The least, the mean and the most."""
    return f"{min(counts)} to {max(counts)} (mean {average([float(n) for n in counts]):.1f})"


def num_tokens(row: Episode) -> int:
    """All tokens of a row, prompt included."""
    return sum(len(t.seen) + len(t.did) for t in row.turns)
