"""Frozen models in the host's memory: brought for what asks them, with equal bits, and dropped before anything is trained.

There is no second device here, so a model on its device is known by its storage: a copy of the one in the host's memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model, random_episodes
from test_stages import SIZES, by_sample, context, online, record
from torch import Tensor

from rlx import offload
from rlx.cli import by_path
from rlx.compose import compose
from rlx.launch import launch_of
from rlx.llm.local import load, local
from rlx.models.language import LanguageModel
from rlx.models.load import tiny
from rlx.models.mixture import Mixture
from rlx.offload import bring, here, homes, keep, present
from rlx.plan import plan
from rlx.rewards.learned import model_score
from rlx.rollout.native import generate
from rlx.rollout.samplers import plain
from rlx.run import run
from rlx.stages.models import ModelSpec, Refresh, unchanging
from rlx.tensors import inside
from rlx.types import Batch, Component, Ended, Episode, Message, ModelName, Play, Sampling, Turn, View
from rlx.units import computed

FIELDS = {"logp", "entropy", "value"}


@contextlib.contextmanager
def switched_on() -> Iterator[None]:
    """As `launch.offload_frozen` has it."""
    offload.enabled = True
    try:
        yield
    finally:
        offload.enabled = False
    assert not here


@pytest.fixture
def enabled() -> Iterator[None]:
    with switched_on():
        yield


def critic(seed: int = 3) -> Any:
    """A small model with tied embeddings, buffers and a head."""
    return tiny(**SIZES, seed=seed).with_heads({"value": "token"}, 5)  # type: ignore[arg-type]


def tensors(policy: Any) -> list[Tensor]:
    """Each weight and buffer, those of heads as well."""
    modules = [policy.module, *([policy.heads] if policy.heads is not None else [])]
    return [x for module in modules for x in [*module.parameters(), *module.buffers()]]


def places(policy: Any) -> list[int]:
    return [x.data_ptr() for x in tensors(policy)]


def test_what_it_computes_is_equal_bit_for_bit_each_time(enabled: None) -> None:
    stays, moves = critic(), critic()
    batch = stays.collate(random_episodes(4))
    want = computed(stays, batch, FIELDS, 1000)
    keep(moves)
    for _ in range(2):
        for name, x in computed(moves, batch, FIELDS, 1000).items():
            assert torch.equal(x, want[name])


def test_it_is_in_another_storage_while_it_is_present_and_in_the_hosts_again_afterwards(enabled: None) -> None:
    policy = critic()
    values, objects = [x.clone() for x in tensors(policy)], [id(x) for x in tensors(policy)]
    keep(policy)
    host = places(policy)
    with present(policy):
        device = places(policy)
        assert all(torch.equal(x, y) for x, y in zip(tensors(policy), values, strict=True))
        policy.module.get_output_embeddings().weight.data.zero_()  # what is on the device is never copied back
    assert places(policy) == host
    assert all(torch.equal(x, y) for x, y in zip(tensors(policy), values, strict=True))
    assert not set(host) & set(device)
    assert [id(x) for x in tensors(policy)] == objects
    kinds = {type(x) for x in tensors(policy)}
    assert kinds == {torch.nn.Parameter, Tensor}  # the frequencies of rotary embeddings are a buffer


def test_tied_weights_stay_tied_and_are_copied_once(enabled: None) -> None:
    policy = critic()
    keep(policy)
    embedding, head = policy.module.get_input_embeddings(), policy.module.get_output_embeddings()
    for scope in (present(), present(policy), present()):
        with scope:
            assert embedding.weight is head.weight
    assert len({id(x) for x in homes[policy.module].tensors}) == len(homes[policy.module].tensors) == len(tensors(policy))


def test_a_scope_drops_what_came_within_it_also_after_an_error(enabled: None) -> None:
    first, second = critic(), critic()
    keep(first)
    keep(second)
    at_home = places(first), places(second)
    with present(first):
        there = places(first)
        with pytest.raises(ZeroDivisionError), present(first, second):
            1 / len(set(places(first)) - set(there))  # it is not brought again
        assert (places(first), places(second)) == (there, at_home[1])
        bring(second)
    assert (places(first), places(second)) == at_home


def test_a_model_that_is_not_kept_stays_where_it_is(enabled: None) -> None:
    policy = critic()
    before = places(policy)
    with present(policy):
        assert places(policy) == before
    offload.enabled = False
    keep(policy)
    assert (places(policy), policy.module in homes) == (before, False)


def test_memory_is_freed_with_the_model(enabled: None) -> None:
    import gc

    gc.collect()
    before = len(homes)
    policy = critic()
    keep(policy)
    assert len(homes) == before + 1
    del policy
    gc.collect()
    assert len(homes) == before


def test_a_mixture_brings_its_parts(enabled: None) -> None:
    stays, moves = model("llama", 0), model("llama", 1)
    made = Mixture([(stays, 0.5), (moves, 0.5)])
    batch = made.collate(random_episodes(3))
    want = computed(made, batch, {"logp"}, 1000)["logp"]
    keep(moves)
    before = places(stays), places(moves)
    with present(made):
        assert places(stays) == before[0]
        assert not set(places(moves)) & set(before[1])
    assert torch.equal(computed(made, batch, {"logp"}, 1000)["logp"], want)


# --------------------------------------------------------------------------- stages
def test_which_models_are_kept() -> None:
    specs = {
        "policy": ModelSpec(),
        "critic": ModelSpec(),
        "target": ModelSpec(ema="critic"),
        "reference": ModelSpec(),
        "rm": ModelSpec(),
        "old": ModelSpec(refresh=Refresh(every=2)),
        "mixed": ModelSpec(mix={"policy": 0.5, "reference": 0.5}),
        "followed": ModelSpec(),
        "follower": ModelSpec(ema="followed"),
    }
    assert unchanging(specs, ["critic"]) == {"reference", "rm"}


class Asked(LanguageModel):
    """Notes whether it is on its device when it is asked."""

    seen: dict[str, set[int]]

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        self.seen.setdefault("forward", set()).add(id(homes.get(self.module)) in here)
        return super().forward(batch, want, temperature)

    def act(self, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended | None = None) -> list[list[Turn]]:
        self.seen.setdefault("act", set()).add(id(homes.get(self.module)) in here)
        return super().act(views, keys, sampling, ended)


def frozen(seen: dict[str, set[int]], seed: int) -> Any:
    made: Any = tiny(**SIZES, seed=seed)
    made.__class__, made.seen = Asked, seen
    return made


def stage(seen: dict[str, set[int]]) -> Any:
    """A stage with six frozen models, each asked in another way; `seen`: how many are on their device where what is asked."""

    def note(what: str) -> None:
        seen.setdefault(what, set()).add(len(here))

    def scored(episodes: list[Episode], *, model: Any) -> list[float]:
        note("reward")
        return [a + b for a, b in zip(model_score(episodes, model=model), by_sample(episodes), strict=True)]

    def judged(episodes: list[Episode], *, llm: Component[Any]) -> list[float]:
        return [float(len(text)) for (text,) in llm.call([e.task.prompt for e in episodes])]

    def guided(play: Play, rows: list[Episode], n: int, *, guide: Any) -> list[Episode]:
        note("sampler")
        for writer in (guide, play.models["teacher"]):
            writer.act([View(writer.render(rows[0].task.prompt))], [[0]], Sampling(2))
        note("sampler that has looked one up")
        return plain(play, rows, n)

    def kept(episodes: list[Episode], *, model: Any) -> list[Episode]:
        note("filter")
        return [e for e in episodes if model_score([e], model=model)[0] > -100]

    def penalised(logp: Tensor, adv: Tensor, mask: Tensor, *others: Tensor) -> Tensor:
        note("loss")
        return inside(-logp * adv + sum(0.1 * (logp - other) ** 2 for other in others), mask)

    reads = ("logp", "adv", "mask", "ref_logp", "teacher_logp", "opponent_logp")
    judge = Component("local", partial(local, max_new_tokens=3), settings={"model": ModelName("judge")})
    made = online(by_sample, steps=3, loss=[Component("penalised", penalised, reads)])
    made.reward = [
        Component("scored", scored, settings={"model": ModelName("rm")}),
        Component("judged", judged, settings={"llm": judge}),
    ]
    made.sampler = Component("guided", guided, settings={"guide": ModelName("guide")})
    made.keep = [Component("kept", kept, settings={"model": ModelName("rm")})]
    for seed, name in enumerate(("reference", "rm", "guide", "judge", "teacher"), 11):
        model = Component("frozen", partial(frozen, seen, seed), settings={"seed": seed})
        made.models[name] = ModelSpec(model=model, heads={"score": "last"} if name == "rm" else {})
    made.models["old"] = ModelSpec(model=Component("tiny", partial(tiny, **{**SIZES, "seed": 10}), settings={"seed": 10}))
    made.models["opponent"] = ModelSpec(mix={"policy": 0.5, "old": 0.5})
    return made


def test_a_stage_is_the_same_and_trains_with_none_of_them_on_the_device(tmp_path: Path) -> None:
    """Sampler, rewards, filters and fields have theirs, and no others; an evaluation has none."""
    found: list[dict[str, set[int]]] = [{}, {}]
    stage(found[0]).run(context(tmp_path / "stays", "rl"))
    with switched_on():
        stage(found[1]).run(context(tmp_path / "moves", "rl"))
    assert record(tmp_path / "moves", "rl") == record(tmp_path / "stays", "rl")
    assert set.union(*found[0].values()) == {0}
    within = {"sampler": {1}, "sampler that has looked one up": {2}, "reward": {2}, "filter": {1}, "loss": {0}}
    assert found[1] == {**within, "forward": {True}, "act": {True}}


def test_a_model_of_a_path_is_brought_by_who_asks_it_and_dropped_with_the_others(enabled: None, tmp_path: Path) -> None:
    policy = tiny(**SIZES, seed=3)
    policy.engine = generate
    policy.save(tmp_path / "model")
    settings: dict[str, Any] = {"n": 2, "temperature": 1.0, "max_new_tokens": 6}
    talk = [[Message("user", "two")]]
    with present():
        assert local(talk, path=str(tmp_path / "model"), **settings) == local(talk, model=policy, **settings)
        assert len(here) == 1
    assert not here
    load.cache_clear()


@pytest.mark.parametrize(("name", "on"), [("local", False), ("zero0", False), ("zero2", False), ("zero3", True)])
def test_it_is_for_any_launch_and_what_zero3_does(name: str, on: bool) -> None:
    several = ["launch.gpus=2"] if name != "local" else []
    words = ["dpo", f"launch={name}", *several]
    assert launch_of(compose(words).config).offload_frozen is on
    assert launch_of(compose([*words, f"launch.offload_frozen={str(not on).lower()}"]).config).offload_frozen is not on


RECIPE = """\
purpose: "a stage with a reference"
model: {name: tiny, layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32}
task: {name: arithmetic, digits: 2}
stages:
  sft: {kind: fit, reference: "@model", data: "@task/demos", loss: [nll], watch: [ref_kl], rows_per_step: 4, steps: 3, lr: 1e-2,
        log_every: 1}
"""


def test_one_process_does_it_as_well(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    with switched_on():  # until `run` says otherwise
        for offloaded in (False, True):
            composed = compose(
                *by_path([str(tmp_path / "small.yaml"), f"launch.offload_frozen={str(offloaded).lower()}"], None)
            )
            run(plan(composed.config, swapped=composed.swapped, given=composed.given), tmp_path / str(offloaded))
            assert offload.enabled is offloaded
    assert record(tmp_path / "True", "sft") == record(tmp_path / "False", "sft")
    assert any(row["ref_kl"] > 0 for row in record(tmp_path / "True", "sft"))
