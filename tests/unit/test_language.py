"""Episodes to tensors, and the log-probabilities of the forward against a plain model run on each sequence alone."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import CONFIGS, episode, model, random_episodes
from torch import Tensor

from rlx.models.language import LanguageModel
from rlx.models.load import tiny
from rlx.models.padded import token_fields
from rlx.types import Batch
from rlx.units import computed, units


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    return tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64)


@pytest.fixture(scope="module")
def padding(small: LanguageModel) -> LanguageModel:
    """The same model, as if it could not be packed."""
    made = copy.copy(small)
    made.packs = False
    return made


# --------------------------------------------------------------------------- collate
def test_collate_by_hand(small: LanguageModel) -> None:
    one = episode(([10, 11], [12, 13, 1]), group=4, reward=0.5, logp=-0.25)
    two = episode(([20], [21]), ([22, 23], [24, 1]), group=7, reward=2.0, logp=-0.5)
    two.label = -1.0
    batch = small.collate([one, two])
    assert [x.ids.tolist() for x in batch.inputs] == [[10, 11, 12, 13, 1], [20, 21, 22, 23, 24, 1]]
    assert [x.prompt for x in batch.inputs] == [2, 1]
    assert {name: value.tolist() for name, value in batch.items()} == {
        "mask": [[True, True, True, False, False], [True, False, False, True, True]],
        "rollout_logp": [[-0.25, -0.25, -0.25, 0.0, 0.0], [-0.5, 0.0, 0.0, -0.5, -0.5]],
        "reward": [[0.0, 0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 2.0]],
        "ret": [0.5, 2.0],
        "label": [0.0, -1.0],
        "group": [4, 7],
        "turn": [[0, 0, 0, -1, -1], [0, -1, -1, 1, 1]],
        "turn_mask": [[True, False], [True, True]],
        "turn_reward": [[0.5, 0.0], [0.0, 2.0]],
        "turn_done": [[1.0, 0.0], [0.0, 1.0]],
        "agent": [0, 0],
        "bootstrap": [0.0, 0.0],
        "fresh": [False, False],
    }
    types = {name: value.dtype for name, value in batch.items()}
    assert {name: types[name] for name in ("mask", "rollout_logp", "reward", "ret", "label", "group")} == {
        "mask": torch.bool,
        "rollout_logp": torch.float32,
        "reward": torch.float32,
        "ret": torch.float32,
        "label": torch.float32,
        "group": torch.int64,
    }


def test_collate_pays_on_the_last_trained_position(small: LanguageModel) -> None:
    batch = small.collate([episode(([10], [11]), ([12, 13], []), reward=3.0)])
    assert batch["mask"].tolist() == [[True, False, False]]
    assert batch["reward"].tolist() == [[3.0, 0.0, 0.0]]


def test_collate_of_an_episode_without_a_trained_token(small: LanguageModel) -> None:
    batch = small.collate([episode(([10], []), reward=3.0)])
    assert batch["mask"].shape == (1, 0)
    assert batch["ret"].tolist() == [3.0]


# --------------------------------------------------------------------------- forward
def dense(policy: LanguageModel, batch: Batch, temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """log-prob and entropy of each sequence's field positions, by a plain forward of that sequence alone."""
    logps, entropies = [], []
    for row, start in ((x.ids, x.prompt) for x in batch.inputs):
        ids = torch.from_numpy(row)
        with torch.no_grad():
            logits = policy.module(input_ids=ids[None]).logits[0].double() / temperature
        logp = torch.log_softmax(logits, -1)[start - 1 : -1]
        logps.append(logp.gather(-1, ids[start:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return logps, entropies


def close(found: Tensor, expected: list[Tensor], tolerance: float = 2e-5) -> None:
    for row, want in zip(found, expected, strict=True):
        torch.testing.assert_close(row[: len(want)].double(), want, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_is_a_plain_forward_of_each_sequence(name: str, temperature: float) -> None:
    policy = model(name)
    batch = policy.collate(random_episodes(8))
    out = policy.forward(batch, {"logp", "entropy"}, temperature)
    logp, entropy = dense(policy, batch, temperature)
    assert out["logp"].shape == out["entropy"].shape == batch["mask"].shape
    assert out["logp"].dtype == torch.float32
    assert float(torch.cat(logp).std()) > 0.5  # the distributions are worth telling apart
    close(out["logp"], logp)
    close(out["entropy"], entropy)


def test_forward_computes_what_is_wanted(small: LanguageModel) -> None:
    batch = small.collate(random_episodes(2))
    assert set(small.forward(batch, {"logp", "adv"})) == {"logp"}
    assert set(small.forward(batch, {"entropy"})) == {"entropy"}


@pytest.mark.parametrize("largest", [1, 3 * 7 * 2, 3 * 7 * 4])
def test_logits_taken_in_spans_give_the_same_values_and_gradients(largest: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (3, 5))
    start = torch.randn(3, 5, 7)
    found = []
    for limit in (3 * 5 * 7, largest):
        logits = start.clone().requires_grad_()
        out = token_fields(logits, ids, 0.7, entropy=True, largest=limit)
        (out["logp"].square().sum() + out["entropy"].sum()).backward()
        assert out["logp"].shape == out["entropy"].shape == (3, 5)
        found.append((out["logp"], out["entropy"], logits.grad))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
    assert set(token_fields(start, ids, 0.7, entropy=False, largest=largest)) == {"logp"}


def test_logits_taken_in_spans_keep_no_float32_copy_of_all() -> None:
    def kept(largest: int) -> int:
        sizes: list[int] = []
        logits = torch.randn(2, 8, 16, requires_grad=True) * 1.0
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            token_fields(logits, torch.zeros(2, 8, dtype=torch.long), 0.7, entropy=True, largest=largest)
        return sum(sizes)

    assert kept(2 * 8 * 16) >= 3 * 2 * 8 * 16
    assert kept(2 * 2 * 16) == 2 * 8 * (16 + 1)  # the logits and ids themselves


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_split_and_order_change_nothing(small: LanguageModel, budget: int) -> None:
    batch = small.collate(random_episodes(9))
    whole = computed(small, batch, {"logp"}, 10_000)["logp"]
    torch.testing.assert_close(
        computed(small, batch, {"logp"}, budget)["logp"] * batch["mask"], whole * batch["mask"], atol=1e-5, rtol=0
    )
    order = [3, 8, 0, 1, 7, 2, 6, 5, 4]
    mixed = computed(small, batch.take(order), {"logp"}, budget)["logp"]
    torch.testing.assert_close(mixed * batch["mask"][order], (whole * batch["mask"])[order], atol=1e-5, rtol=0)


def test_units_hold_the_budget_and_every_sequence_once(padding: LanguageModel) -> None:
    batch = padding.collate(random_episodes(20))
    batch["index"] = torch.arange(20)
    parts = list(units(padding, batch, 60))
    assert sorted(i for part in parts for i in part["index"].tolist()) == list(range(20))
    assert len(parts) > 3
    for part in parts:
        width = max(x.prompt for x in part.inputs) + max(x.length - x.prompt for x in part.inputs)
        assert len(part.inputs) == 1 or width * len(part.inputs) <= 60


@pytest.mark.parametrize("budget", [80, 100, 120, 140])
def test_units_of_whole_groups(padding: LanguageModel, budget: int) -> None:
    batch = padding.collate(random_episodes(20)).take([*range(0, 20, 2), *range(1, 20, 2)])
    batch["index"] = torch.arange(20)
    parts = list(units(padding, batch, budget, whole_groups=True))
    assert sorted(i for part in parts for i in part["index"].tolist()) == list(range(20))
    assert sorted(g for part in parts for g in set(part["group"].tolist())) == list(range(10))  # each in one part
    assert 3 < len(parts) < 10  # some hold several groups
    for part in parts:
        width = max(x.prompt for x in part.inputs) + max(x.length - x.prompt for x in part.inputs)
        assert len(set(part["group"].tolist())) == 1 or width * len(part.inputs) <= budget


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    policy = tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, dtype="bf16")
    exact = tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64)
    batch = policy.collate(random_episodes(4))
    found, want = (p.forward(batch, {"logp"})["logp"] * batch["mask"] for p in (policy, exact))
    assert found.dtype == torch.float32
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    assert 0.0 < float((found - want).abs().max()) < 0.05


# --------------------------------------------------------------------------- to disk
def test_save_replaces_a_folder_and_leaves_nothing_beside_it(small: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale").touch()
    small.save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "stale").exists()


def test_a_stream_that_some_turns_lack_keeps_its_values_whatever_the_order(small: LanguageModel) -> None:
    one, two = episode(([10], [11, 12])), episode(([10], [11, 12, 13]))
    two.turns[0].token = {"bonus": np.array([0.5, 0.25, 0.0], np.float32), "by_guide": np.array([True, False, True])}
    for order in ([one, two], [two, one]):
        batch = small.collate(order)
        row = int(order[1] is two)
        assert batch["bonus"][row].tolist() == [0.5, 0.25, 0.0]
        assert batch["by_guide"][row].tolist() == [True, False, True]
        assert not batch["bonus"][1 - row].any()
