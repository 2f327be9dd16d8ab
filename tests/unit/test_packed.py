"""The packed forward is the padded one: every field and every gradient, and no sequence sees another."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import GROUPED, LATENT, ids, kept_bytes, model
from architectures import episode as told
from torch import Tensor, nn

from rlx import memory
from rlx.models import layout, packed, padded
from rlx.models.attention import NAME
from rlx.models.language import LanguageModel
from rlx.models.layout import num_ids, pack, trees
from rlx.models.load import finish, read, tiny, tiny_t5
from rlx.models.packed import packable
from rlx.models.tokenizer import byte_tokenizer
from rlx.types import Batch, Episode
from rlx.units import computed, units

PACKED = ["qwen2", "qwen3", "llama", "gpt2"]
WHERE = {"value": "token", "score": "last", "v": "before_turn", "q": "after_turn"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "LEAST", 2)  # so that short prefixes are shared, too


def talks() -> list[Episode]:
    """Three answers to a prompt, one to another, and two conversations that part at their second turn."""
    rng = np.random.default_rng(0)

    def some(num: int) -> list[int]:
        return [int(i) for i in rng.integers(2, 262, size=num)]

    prompt, answer, reply = some(9), some(5), some(4)
    group = [told((prompt, some(n)), group=0) for n in (3, 12, 1)]
    other = [told((some(4), some(6)), group=1)]
    stored = told((prompt[:7], answer), (reply, some(5)), (some(2), some(1)), group=2)
    fresh = told((prompt[:7], answer), (reply, some(3)), group=2)
    return [*group, *other, stored, fresh]


def both(policy: LanguageModel, batch: Batch, want: set[str]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Fields and gradients of the padded and of the packed forward, for one random weighting of the fields."""
    found = []
    for forward in (padded.forward, packed.forward):
        weights = {name: p for part in (policy.module, policy.heads or nn.Module()) for name, p in part.named_parameters()}
        for p in weights.values():
            p.grad = None
        fields = forward(policy, batch, want, 0.7)
        draw = torch.Generator().manual_seed(0)
        masks = {"N,T": batch["mask"], "N,K": batch["turn_mask"]}
        shapes = {"v": "N,K", "q": "N,K", "score": "N"}
        total = torch.zeros(())
        for name in sorted(fields):
            x = fields[name] * masks.get(shapes.get(name, "N,T"), torch.tensor(1.0))
            fields[name] = x
            total = total + (torch.randn(x.shape, generator=draw) * x).sum()
        total.backward()  # type: ignore[no-untyped-call]
        found.append((fields, {name: p.grad for name, p in weights.items() if p.grad is not None}))
    return found


def check(policy: LanguageModel, batch: Batch, want: set[str]) -> None:
    (fields, gradients), (packed_fields, packed_gradients) = both(policy, batch, want)
    assert set(fields) == set(packed_fields) == want
    for name, x in fields.items():
        assert packed_fields[name].dtype == torch.float32
        torch.testing.assert_close(packed_fields[name], x, atol=1e-5, rtol=0)
    assert set(gradients) == set(packed_gradients)
    for name, x in gradients.items():
        size = float(x.abs().max())
        assert size > 0.0, name
        torch.testing.assert_close(packed_gradients[name], x, atol=1e-5 * size, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


# --------------------------------------------------------------------------- equal to the padded forward
@pytest.mark.parametrize("name", PACKED)
def test_fields_and_gradients_are_those_of_the_padded_forward(name: str) -> None:
    policy = model(name).with_heads(WHERE, seed=3)
    assert policy.packs
    check(policy, policy.collate(talks()), policy.offers)


@pytest.mark.parametrize("want", [{"logp"}, {"entropy"}, {"score"}, {"logp", "q"}])
def test_what_is_not_wanted_is_not_missed(want: set[str]) -> None:
    policy = model("qwen3").with_heads(WHERE, seed=3)
    fields = packed.forward(policy, policy.collate(talks()), want, 0.7)
    for name, x in padded.forward(policy, policy.collate(talks()), want, 0.7).items():
        torch.testing.assert_close(fields.pop(name), x, atol=1e-5, rtol=0)
    assert not fields


def test_an_adapter_is_trained_as_in_the_padded_forward() -> None:
    settings = {**GROUPED, "vocab_size": 262, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**settings))
    lora: Any = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    policy = finish(module, byte_tokenizer(), dtype="fp32", lora=lora, device="cpu", seed=0, source="llama")
    assert policy.packs
    check(policy, policy.collate(talks()), {"logp", "entropy"})


def test_bf16_computes_what_the_padded_forward_does() -> None:
    policy = tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, dtype="bf16")
    batch = policy.collate(talks())
    one, two = (forward(policy, batch, {"logp"}, 1.0)["logp"] for forward in (padded.forward, packed.forward))
    assert two.dtype == torch.float32
    torch.testing.assert_close(two, one, atol=0.05, rtol=0)
    exact = tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64).forward(batch, {"logp"})["logp"]
    assert float((two - exact).abs().max()) > 0.0  # it did compute in bfloat16


def test_sequences_that_are_equal_or_have_no_answer() -> None:
    policy = model("llama").with_heads({"score": "last"}, seed=3)
    same = [told((list(range(2, 12)), [20, 21]), group=0) for _ in range(3)]
    batch = policy.collate([*same, told(([5], []), group=1), told((list(range(2, 12)), []), group=0)])
    for want in ({"logp"}, {"logp", "score"}):
        one, two = (forward(policy, batch, want, 1.0) for forward in (padded.forward, packed.forward))
        for name, x in one.items():
            torch.testing.assert_close(two[name], x, atol=1e-5, rtol=0)
    alone = policy.collate([told(([5], []))])
    assert packed.forward(policy, alone, {"logp"}, 1.0)["logp"].shape == (1, 0)


def test_what_the_environment_says_has_no_log_probability() -> None:
    policy = model("llama")
    batch = policy.collate([told(([4, 5], [6, 7]), ([8, 9, 10], [11]))])
    for forward in (padded.forward, packed.forward):
        for x in forward(policy, batch, {"logp", "entropy"}, 1.0).values():
            assert (x[0] != 0).tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("changed", range(6))
def test_a_branch_changes_nothing_in_another(changed: int) -> None:
    policy = model("qwen3").with_heads(WHERE, seed=3)
    before = policy.collate(talks())
    other = talks()
    other[changed].turns[-1].did = other[changed].turns[-1].did[::-1] // 2 + 3
    after = policy.collate(other)
    one, two = (packed.forward(policy, batch, policy.offers, 1.0) for batch in (before, after))
    rest = [i for i in range(6) if i != changed]
    for name, x in one.items():
        torch.testing.assert_close(two[name][rest], x[rest], atol=1e-5, rtol=0)
    assert (
        float((two["value"][changed] - one["value"][changed]).detach().abs().max()) > 1e-3
        or len(other[changed].turns[-1].did) == 1
    )


@pytest.mark.parametrize("largest", [1, 262 * 3, 262 * 20])
def test_logits_in_parts_give_the_same(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model("qwen2")
    batch = policy.collate(talks())
    sizes: list[int] = []
    head = policy.module.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    monkeypatch.setattr(packed, "LARGEST", largest)
    check(policy, batch, {"logp", "entropy"})
    hook.remove()
    assert sorted(sizes)[-2] <= max(262, largest)  # all but those of the padded forward
    assert len(sizes) > 3


# --------------------------------------------------------------------------- the row
def test_a_row_by_hand() -> None:
    rows = [ids(1, 2, 3, 9), ids(7, 8), ids(1, 2, 3, 4, 5)]
    assert trees(rows) == [([2, 0], 3), ([1], 2)]
    row = pack(rows, CPU)
    assert row.ids.tolist() == [[1, 2, 3, 4, 5, 9, 7, 8]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert [x.tolist() for x in row.places] == [[0, 1, 2, 5], [6, 7], [0, 1, 2, 3, 4]]
    assert num_ids(rows) == 8


def test_a_prefix_of_all_does_not_hide_the_longer_ones_of_some() -> None:
    begin, one, two = [1, 2, 3, 4], list(range(10, 30)), list(range(40, 60))
    rows = [ids(*begin, *middle, i) for i in range(100, 104) for middle in (one, two)]
    rows.append(ids(*begin, 70))
    assert sorted(prefix for _, prefix in trees(rows)) == [5, 24, 24]


@pytest.mark.parametrize("seed", range(5))
def test_trees_save_as_much_as_any_split_of_the_sorted_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 2, size=rng.integers(4, 9)).astype(np.int64) for _ in range(6)]
    order = sorted(rows, key=lambda x: [int(i) for i in x])
    best = 0
    for cuts in range(2**5):
        saved, start = 0, 0
        for end in range(1, 7):
            if end == 6 or cuts >> (end - 1) & 1:
                saved += (end - start - 1) * layout.shared_by(order, range(start, end)) - layout.LEAST * (end - start > 1)
                start = end
        best = max(best, saved)
    found = sum((len(members) - 1) * prefix - layout.LEAST * (len(members) > 1) for members, prefix in trees(rows))
    assert found == best


def test_attention_of_a_row_is_that_of_each_sequence() -> None:
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, 50, 30)
    rows = [np.concatenate([prompt, rng.integers(0, 50, n)]) for n in (0, 1, 2, 40)] + [rng.integers(0, 50, n) for n in (1, 70)]
    row = pack(rows, CPU)
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, row.ids.shape[1], 8) for heads in (4, 2, 2))
    found = row.layout.attend(query, key, value, 0.3)
    for at in map(torch.from_numpy, row.places):
        own = [x[None, :, at] for x in (query, key, value)]
        want = nn.functional.scaled_dot_product_attention(*own, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[at], want[0].transpose(0, 1), atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------- units
def test_units_count_what_a_group_shares_once() -> None:
    policy = model("llama")
    groups = [told(([10 * g + 2 + i for i in range(9)], [100 + k] * (k + 1)), group=g) for g in range(5) for k in range(4)]
    batch = policy.collate(groups)
    batch["index"] = torch.arange(20)
    key = memory.of_key(memory.sizes(policy))
    for budget in (1, 21, 42, 63, 1000):
        parts = list(units(policy, batch, budget))
        assert sorted(i for part in parts for i in part["index"].tolist()) == list(range(20))
        sizes = [num_ids([x.ids for x in part.inputs], key) for part in parts]
        assert all(size <= budget or len(part.inputs) == 1 for size, part in zip(sizes, parts, strict=True))
        assert len(parts) == {1: 20, 21: 5, 42: 3, 63: 2, 1000: 1}[budget]
    whole = list(units(policy, batch, 1, whole_groups=True))
    assert [sorted(part["group"].tolist()) for part in whole] == [[g] * 4 for g in range(5)]


def test_a_unit_keeps_what_as_many_tokens_keep_however_long_the_prompt_is() -> None:
    """Of which each answer holds the keys."""
    policy = tiny(layers=3, hidden=64, heads=4, kv_heads=4, ffn=128)
    batch = policy.collate([told((list(range(2, 232)), [i, 1]), group=0) for i in range(2, 50)])
    for budget in (10_000, 700):
        for part in units(policy, batch, budget):
            row = pack([x.ids for x in part.inputs], policy.device)
            kept = kept_bytes(policy, lambda row=row: packed.states(policy.backbone, row))
            assert kept <= 1.15 * memory.activations(memory.sizes(policy), budget)


def test_the_split_changes_no_field() -> None:
    policy = model("qwen3").with_heads(WHERE, seed=3)
    batch = policy.collate(talks())
    whole = computed(policy, batch, policy.offers, 10_000)
    masks = {"score": torch.tensor(1.0), "v": batch["turn_mask"], "q": batch["turn_mask"]}
    for budget in (1, 25):
        for name, x in computed(policy, batch, policy.offers, budget).items():
            mask = masks.get(name, batch["mask"])
            torch.testing.assert_close(x * mask, whole[name] * mask, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------- who packs
def test_what_an_architecture_adds_is_not_packed_away() -> None:
    assert not model("gemma2").packs  # windows, soft-capped attention
    assert not tiny_t5().packs
    for kind, extra in (
        ("CohereConfig", {"logit_scale": 0.5}),
        ("MistralConfig", {"sliding_window": 4}),
        ("NanoChatConfig", {"final_logit_softcapping": 15.0}),  # which small logits hardly feel
        ("DeepseekV2Config", LATENT),  # values are narrower than keys: read alike, stored otherwise
        ("JetMoeConfig", {"num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 8}),  # keys repeated once stored
    ):
        settings = {**GROUPED, "vocab_size": 262, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, **extra}
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
        policy = finish(module, byte_tokenizer(), dtype="fp32", lora=None, device="cpu", seed=0, source=kind)
        assert not policy.packs, kind
        assert module.config._attn_implementation == "sdpa"


def test_a_model_whose_layers_take_no_layout_is_not_packed() -> None:
    policy = model("llama")
    layer = policy.module.model.layers[1].self_attn
    plain = layer.forward
    layer.forward = lambda *args, layout=None, **settings: plain(*args, **settings)
    assert not packable(policy)


def test_the_attention_is_written_nowhere(tmp_path: Any) -> None:
    policy = tiny(layers=1, hidden=32, heads=2, kv_heads=2, ffn=64)
    assert policy.module.config._attn_implementation == NAME
    policy.save(tmp_path / "out")
    assert NAME not in (tmp_path / "out" / "config.json").read_text()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config._attn_implementation == "sdpa"
    assert read(str(tmp_path / "out"), {}, 0).packs
    assert copy.copy(policy).packs


def test_log_probs_have_the_gradient_of_log_softmax() -> None:
    """Also where one state comes before several ids, equal ones among them, and where a state comes before none."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    of, said = torch.tensor([0, 0, 0, 2, 3]), torch.tensor([1, 1, 5, 0, 6])
    weights = torch.randn(5, generator=draw, dtype=torch.float64)
    expected = torch.log_softmax(logits, -1)[of, said]
    (wanted,) = torch.autograd.grad((weights * expected).sum(), logits)
    found = packed.LogProb.apply(logits, of, said)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)
    assert not wanted[1].any()
