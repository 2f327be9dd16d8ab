"""Activation checkpointing: the same fields and gradients, bit for bit, from less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from architectures import model, random_episodes
from torch import Tensor

from rlx.models.load import read, tiny, tiny_t5
from rlx.models.recompute import recompute
from rlx.models.tiny_vlm import tiny_vlm
from rlx.rollout.native import generate
from rlx.types import ConfigError, Episode, Image, Message, Sampling, Task, Turn, View

SIZES: dict[str, Any] = {"layers": 3, "hidden": 32, "heads": 4, "ffn": 64}
LORA: Any = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def padded(name: str) -> Any:
    policy = model(name)
    policy.packs = False
    return policy


def headed() -> Any:
    return padded("qwen3").with_heads({"value": "token", "score": "last"}, seed=3)


MODELS: dict[str, Callable[[], Any]] = {
    "packed": lambda: model("qwen2"),
    "padded": lambda: padded("gpt2"),
    "two kinds of layers": lambda: model("gemma2"),
    "heads": headed,
    "adapter": lambda: tiny(**SIZES, kv_heads=2, lora=LORA),
    "bf16": lambda: tiny(**SIZES, kv_heads=2, dtype="bf16"),
    "encoder and decoder": lambda: tiny_t5(**SIZES),
    "images": lambda: tiny_vlm(**SIZES),
}


def demonstrations(policy: Any) -> list[Episode]:
    """Random tokens; for a model that sees, answers about random pictures."""
    if not hasattr(policy, "encode"):
        return random_episodes(6)
    rng, none = np.random.default_rng(0), np.zeros(0, np.int64)
    said = [Message("assistant", "a" * n) for n in (3, 9)]
    images = [Image(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in said]
    tasks = [Task((Message("user", (image, "What?")),)) for image in images]
    turns = [Turn(none, none, np.zeros(0, np.float32), answer) for answer in said]
    return [policy.tokenize(Episode(task, i, [turn])) for i, (task, turn) in enumerate(zip(tasks, turns, strict=True))]


def differentiated(policy: Any) -> tuple[dict[str, Tensor], list[Tensor], int]:
    """Fields, the gradient of a sum of them, and the bytes that the forward keeps for it."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(0)
    with policy.autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        fields = policy.forward(policy.collate(demonstrations(policy)), policy.offers)
        total = torch.stack([x.square().mean() for x in fields.values()]).sum()
        before = torch.get_rng_state()
        found = torch.autograd.grad(total, policy.parameters(), allow_unused=True)
    assert bool((torch.get_rng_state() == before).all())
    return {name: x.detach() for name, x in fields.items()}, [x for x in found if x is not None], sum(kept.values())


def compared(policy: Any) -> tuple[int, int]:
    """The bytes that are kept without and with; the numbers are the same."""
    fields, gradient, kept = differentiated(policy)
    recompute(policy.module, "small")
    again, same, fewer = differentiated(policy)
    assert all(bool((again[name] == x).all()) for name, x in fields.items())
    assert len(same) == len(gradient)
    assert all(bool((x == y).all()) for x, y in zip(gradient, same, strict=True))
    assert any(float(x.abs().max()) > 0 for x in gradient)
    return kept, fewer


@pytest.mark.parametrize("kind", MODELS)
def test_fields_and_gradients_are_the_same_from_less(kind: str) -> None:
    policy = MODELS[kind]()
    assert policy.packs == (kind in ("packed", "adapter", "bf16"))
    kept, fewer = compared(policy)
    assert fewer < 0.8 * kept


def test_dropout_draws_the_same_again() -> None:
    """rlx trains in eval mode; an architecture may draw in it all the same."""
    policy = padded("gpt2")
    policy.module.train()
    assert not torch.equal(differentiated(policy)[0]["logp"], differentiated(padded("gpt2"))[0]["logp"])
    compared(policy)


def test_a_copy_computes_its_own_layers() -> None:
    policy = tiny(**SIZES, kv_heads=2, activation_checkpointing=True)
    other = copy.deepcopy(policy.module)
    other.model(input_ids=torch.ones(1, 5, dtype=torch.long), use_cache=False).last_hidden_state.sum().backward()
    assert all(p.grad is None for p in policy.module.parameters())
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("make", [tiny, tiny_t5])
def test_rollouts_are_those_of_any_other_model(make: Any) -> None:
    sampled = []
    for setting in (False, True):
        policy = make(**SIZES, activation_checkpointing=setting)
        policy.engine = generate
        (turns,) = policy.act([View(np.arange(2, 9))], [[0, 1, 2]], Sampling(6))
        sampled.append([(turn.did.tolist(), turn.logp.tolist()) for turn in turns])
    assert sampled[0] == sampled[1]
    assert policy.recomputes


def test_the_setting_goes_with_a_checkpoint(tmp_path: Any) -> None:
    tiny(**SIZES, kv_heads=2).save(tmp_path / "out")
    with_it, without = (read(str(tmp_path / "out"), {"activation_checkpointing": x}, 0) for x in (True, False))
    assert (with_it.recomputes, without.recomputes) == (True, False)
    assert differentiated(with_it)[2] < 0.8 * differentiated(without)[2]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.activation_checkpointing: model 'own' has no layers that"):
        recompute(torch.nn.Linear(2, 2), "own")
