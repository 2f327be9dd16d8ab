"""What the native engine does not compute: steps of finished rows, prompts once a row, conversations from their start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CONFIGS, ODD, model

from rlx.models import shared
from rlx.models.cache import FAR, kept
from rlx.models.cascade import by_products, part
from rlx.models.graph import Frame, sizes
from rlx.models.language import LanguageModel
from rlx.models.mixture import Mixture
from rlx.models.reader import DynamicReader, remembering
from rlx.models.shared import SharedReader, units
from rlx.rollout.draws import cut, inverse_cdf
from rlx.rollout.native import generate
from rlx.rollout.noise import key, uniforms
from rlx.types import Episode, Ids, Message, Sampling, Task, Turn, View

PLAIN = ["qwen2", "llama", "qwen3"]


def prompts(*lengths: int, seed: int = 0) -> list[View]:
    rng = np.random.default_rng(seed)
    return [View(rng.integers(2, 262, n)) for n in lengths]


def keys(*numbers: int) -> list[list[int]]:
    return [[key(i, j) for j in range(n)] for i, n in enumerate(numbers)]


def tokens(played: list[list[Turn]]) -> list[list[list[int]]]:
    return [[t.did.tolist() for t in row] for row in played]


def eager_to_end(name: str, seed: int = 0) -> LanguageModel:
    """A model of whose ids many end an answer, so that rows finish at different times."""
    policy = model(name, seed)
    policy.end_ids = [1, *range(6, 26)]
    return policy


@contextmanager
def counted(policy: LanguageModel) -> Iterator[list[tuple[int, int]]]:
    """The shapes of the ids that the model's decoder reads."""
    seen: list[tuple[int, int]] = []

    def note(module: Any, args: Any, settings: dict[str, Any]) -> None:
        seen.append(tuple(settings["input_ids"].shape if "input_ids" in settings else args[0].shape))

    handle = policy.backbone.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def gap(policy: LanguageModel, turns: list[Turn], temperature: float = 1.0) -> float:
    """The largest difference of the sampled log-probs to those of the training forward."""
    batch = policy.collate([Episode(Task(()), 0, [t]) for t in turns])
    with torch.no_grad():
        logp = policy.forward(batch, {"logp"}, temperature)["logp"]
    return float(((logp - batch["rollout_logp"]) * batch["mask"]).abs().max())


# --------------------------------------------------------------------------- prompts stored once
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("lengths", [(140, 1, 133), (9, 5, 30)], ids=["apart", "in_rows"])
def test_sampled_logp_is_the_training_forward(name: str, lengths: tuple[int, ...]) -> None:
    policy = eager_to_end(name)
    played = generate(policy, prompts(*lengths), keys(5, 1, 6), Sampling(70, 0.8))
    assert gap(policy, [t for row in played for t in row], 0.8) < 1e-5


@pytest.mark.parametrize("name", ODD)
def test_what_is_sampled_is_what_is_trained_on_also_where_a_model_cannot_share(name: str) -> None:
    policy = eager_to_end(name)
    assert policy.packs == (name == "jetmoe_of_one")
    played = generate(policy, prompts(140, 1, 133), keys(3, 1, 3), Sampling(20, 0.8))
    assert gap(policy, [t for row in played for t in row], 0.8) < 1e-5


@pytest.mark.parametrize("name", PLAIN)
def test_greedy_after_long_prompts_is_that_of_transformers(name: str) -> None:
    policy, views = model(name), prompts(150, 130)
    played = generate(policy, views, keys(2, 2), Sampling(12, temperature=0.0))
    for view, turns in zip(views, played, strict=True):
        out = policy.module.generate(
            torch.from_numpy(view.ids)[None], do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0
        )
        assert [t.did.tolist() for t in turns] == [out[0, len(view.ids) :].tolist()] * 2


def test_which_models_share() -> None:
    readers = {name: type(model(name).reader(prompts(3), [1], 2)) for name in CONFIGS}
    assert readers == dict.fromkeys([*PLAIN, "gpt2"], SharedReader) | {"gemma2": DynamicReader}


def test_bfloat16_is_read_with_float32_scores() -> None:
    policy = eager_to_end("qwen2")
    with torch.no_grad():
        for parameter in policy.module.parameters():  # as far from uniform as a model of the usual initialisation
            parameter.div_(4.0 if parameter.dim() > 1 else 1.0)
    policy.bf16 = True
    played = generate(policy, prompts(140, 133), keys(4, 4), Sampling(20))
    assert gap(policy, [t for row in played for t in row]) < 0.05


def test_a_part_of_attention_is_the_same_by_products() -> None:
    torch.manual_seed(0)
    query, keys_, values = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., 2:] = FAR
    mask[1] = FAR  # attends to nothing: no NaN, and a weight of 0 in a merge
    for a, b in zip(part(query, keys_, values, mask, 0.3), by_products(query, keys_, values, mask, 0.3), strict=True):
        torch.testing.assert_close(a[0], b[0])
        assert a.isfinite().all()
        assert b.isfinite().all()
    assert part(query, keys_, values, mask, 0.3)[1][1].max() < 0.9 * FAR


@pytest.mark.parametrize("lengths", [(140, 131), (7, 3)], ids=["apart", "in_rows"])
def test_a_step_of_fixed_shapes_is_the_step(lengths: tuple[int, ...]) -> None:
    """What a CUDA graph replays, run without one: more rows, columns, prompts and samples than there are change nothing."""
    policy = model("qwen2")
    with torch.inference_mode():
        reader = SharedReader(policy, prompts(*lengths), [3, 2], 20)
        for ids in ([5, 6, 7, 8, 9], [30, 31, 32, 33]):
            if len(ids) < 5:
                reader.keep(np.array([0, 1, 2, 4]))
                reader.keep(np.array([0, 1, 2, 3]))
            read = torch.tensor(ids)[:, None]
            shape = sizes(reader.cache)
            assert shape.rows > len(ids)
            frame = Frame(policy, reader.cache, shape)
            frame.fill(reader.cache, read, reader.cache.settings(1))
            framed = frame.run()[: len(ids)]
            reader.read(read[:, 0])
            torch.testing.assert_close(framed, reader.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apart", [False, True])
def test_a_graph_is_good_for_the_memory_that_it_was_captured_with(apart: bool) -> None:
    reader = SharedReader(model("qwen2"), prompts(20, 9), [3, 2], 20, apart)
    before = sizes(reader.cache)
    assert sizes(reader.cache) == before
    for layers in (reader.cache.own, *([reader.cache.prompts] if apart else [])):
        key, value = layers[-1]
        layers[-1] = (key, value.clone())
        assert sizes(reader.cache).memory != before.memory
        layers[-1] = (key, value)
    assert sizes(reader.cache) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a graph can be captured")
def test_where_no_graph_can_be_captured_steps_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Begun, joined or resumed, what is read once is read without a graph."""
    policy, views, asked = eager_to_end("qwen2"), prompts(20, 9, 5), keys(3, 2, 4)
    plain = generate(policy, views, asked, Sampling(12, rows=6))
    policy.replays = True
    reader = SharedReader(policy, views[:1], [2], 12)
    reader.join(views[1:2], [1])
    assert policy.replays
    assert tokens(generate(policy, views, asked, Sampling(12, rows=6))) == tokens(plain)
    assert not policy.replays
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("! model 'qwen2': no CUDA graph could be captured, it decodes without (")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu_draw_what_the_cpu_scores() -> None:
    policy = eager_to_end("qwen2")
    policy.module.to("cuda")
    policy.device, policy.replays = torch.device("cuda"), True
    played = generate(policy, prompts(140, 12, 131, 9), keys(4, 3, 3, 5), Sampling(60, rows=8))
    assert gap(policy, [t for row in played for t in row]) < 1e-3


# --------------------------------------------------------------------------- rows leave, others come
@pytest.mark.parametrize("lengths", [(140, 131, 150, 2, 145), (7, 3, 30, 1, 12)], ids=["apart", "in_rows"])
@pytest.mark.parametrize("rows", [5, 8])
def test_rows_that_wait_take_free_places_and_draw_the_same(lengths: tuple[int, ...], rows: int) -> None:
    policy, views, asked = eager_to_end("qwen2"), prompts(*lengths), keys(4, 5, 3, 2, 4)
    at_once = generate(policy, views, asked, Sampling(30))
    with counted(policy) as seen:
        refilled = generate(policy, views, asked, Sampling(30, rows=rows))
    assert tokens(refilled) == tokens(at_once)
    assert max(n for n, length in seen if length == 1) <= rows
    assert gap(policy, [t for row in refilled for t in row]) < 2e-5


def test_a_group_does_not_wait_for_the_longest_row_before_it() -> None:
    policy, views = eager_to_end("qwen2"), prompts(7, 3, 30, 1, 12)
    with counted(policy) as seen:
        played = generate(policy, views, keys(4, 4, 4, 4, 4), Sampling(40, rows=8))
    longest = [max(len(t.did) for t in row) for row in played]
    in_turn = max(longest[:2]) + max(longest[2:4]) + longest[4]
    assert sum(length == 1 for _, length in seen) < in_turn


def test_nothing_is_computed_for_a_row_that_has_finished() -> None:
    policy, views = eager_to_end("qwen2"), prompts(20, 20)
    with counted(policy) as seen:
        played = generate(policy, views, keys(6, 6), Sampling(40))
    drawn = [len(t.did) for row in played for t in row]
    assert len(set(drawn)) > 4
    assert seen[0] == (2, 19)
    assert sum(n for n, _ in seen[1:]) == 2 + sum(n - 1 for n in drawn)  # the prompts' last ids, and what was drawn but last


@pytest.mark.parametrize("rows", [4, 64])
def test_who_listens_is_told_of_each_turn_when_it_ends(rows: int) -> None:
    policy, heard = eager_to_end("qwen2"), []
    with counted(policy) as seen:
        played = generate(
            policy,
            prompts(20, 9, 3),
            keys(3, 6, 2),
            Sampling(40, rows=rows),
            lambda i, turn: heard.append((i, turn, len(seen))),
        )
    turns = [turn for row in played for turn in row]
    assert sorted(i for i, _, _ in heard) == list(range(11))
    assert all(turn is turns[i] for i, turn, _ in heard)
    steps = [step for _, _, step in heard]
    assert steps == sorted(steps)
    assert len(set(steps)) > 4  # not all at the end
    if rows == 64:
        assert [len(turn.did) for _, turn, _ in heard] == sorted(len(turn.did) for turn in turns)


def test_a_prompt_with_more_samples_than_rows_is_played_in_parts() -> None:
    policy, views = eager_to_end("qwen2"), prompts(9, 4)
    whole = generate(policy, views, keys(11, 2), Sampling(12))
    with counted(policy) as seen:
        assert tokens(generate(policy, views, keys(11, 2), Sampling(12, rows=4))) == tokens(whole)
    assert max(n for n, _ in seen) <= 4


def test_prompts_are_read_in_units_of_like_length() -> None:
    assert list(units([5, 1, 4, 2], 8)) == [[1, 3], [2], [0]]
    assert list(units([9, 9], 8)) == [[0], [1]]


def test_rows_that_stay_move_as_little_as_they_can() -> None:
    assert kept(np.array([True, False, True, False, True, True])).tolist() == [0, 4, 2, 5]
    assert kept(np.zeros(3, bool)).tolist() == []


@pytest.mark.parametrize("rows", [6, 1024])
def test_a_mixture_is_refilled_as_well(rows: int) -> None:
    made = Mixture([(eager_to_end("qwen2"), 0.5), (eager_to_end("qwen2", 1), 0.5)])
    made.end_ids = [1, *range(6, 26)]
    together = generate(made, prompts(140, 12, 131), keys(4, 3, 3), Sampling(20, rows=rows))
    alone = [
        generate(made, [view], [own], Sampling(20))[0] for view, own in zip(prompts(140, 12, 131), keys(4, 3, 3), strict=True)
    ]
    assert tokens(together) == tokens(alone)


# --------------------------------------------------------------------------- turn after turn
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize(("longest", "at_once"), [(8, 7), (140, 8192)])
def test_a_conversation_goes_on_from_what_was_read(
    name: str, longest: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies of 1 to 5 ids, two samples that share all they have said, a prefix in the last turn: as if read anew."""
    monkeypatch.setattr(shared, "PREFILL", at_once)
    policy = eager_to_end(name)
    longest = min(longest, 12) if name == "gpt2" else longest  # its context has 64 positions
    views, asked = prompts(longest, longest - 3), [[0, 0, 7], [3, 4]]
    fresh: list[list[list[list[int]]]] = []
    for remembered in (False, True):
        said, told = [], views
        now = asked
        with remembering(policy) if remembered else counted(policy), counted(policy) as seen:
            for turn in range(3):
                before = len(seen)
                played = generate(policy, told, now, Sampling(9))
                said.append(tokens(played))
                longer: dict[bytes, tuple[View, list[int]]] = {}
                for view, row in zip(told, played, strict=True):
                    for j, t in enumerate(row):
                        reply = np.arange(2, 3 + (j + turn) % 5)
                        ids = np.concatenate([view.ids, view.prefix, t.did, reply])
                        prefix = np.array([40, 41] if turn == 1 and j == 1 else [], np.int64)
                        longer.setdefault(ids.tobytes(), (View(ids, prefix=prefix), []))[1].append(key(turn, j, len(longer)))
                told, now = [view for view, _ in longer.values()], [own for _, own in longer.values()]
                if remembered and turn and policy.packs:
                    widths = [length for _, length in seen[before:]]
                    assert max(widths) <= 1 + 5 + 2  # the id that was drawn last, the reply, the prefix
        fresh.append(said)
    assert fresh[0] == fresh[1]
    assert policy.memory is None


def test_conversations_that_were_not_read_are_read() -> None:
    policy = eager_to_end("qwen2")
    first, other = prompts(9, 5)
    with remembering(policy):
        ((turn,),) = generate(policy, [first], [[1]], Sampling(4))
        longer = View(np.concatenate([first.ids, turn.did, [5]]))
        played = generate(policy, [longer, other], [[2], [3]], Sampling(4))
    assert tokens(played) == tokens(generate(policy, [longer, other], [[2], [3]], Sampling(4)))


# --------------------------------------------------------------------------- what is drawn
@pytest.mark.parametrize("ids", [5, 128, 129, 385, 1000])
def test_a_block_at_a_time_inverts_the_cumulative_distribution(ids: int) -> None:
    torch.manual_seed(0)
    weights = torch.rand(400, ids) ** 8
    weights[:, ::3] = 0.0
    noise = torch.from_numpy(uniforms(list(range(400)), 1)[:, 0])
    noise[:2] = torch.tensor([0.0, 1 - 2**-53])
    drawn = inverse_cdf(weights, noise)
    sums = weights.double().cumsum(-1)
    expected = torch.searchsorted(sums, noise[:, None] * sums[:, -1:], right=True)[:, 0]
    expected[1] = weights[1].nonzero().max()  # nothing is drawn past the last weight, however close to 1 the uniform
    assert drawn.tolist() == expected.tolist()
    assert (weights.gather(1, drawn[:, None]) > 0).all()
    even = torch.where(weights > 0, torch.rand(weights.shape) + 1, 0.0)  # none so small that it is rounded away
    ends = inverse_cdf(even, torch.full_like(noise, 1 - 2**-53))
    assert ends.tolist() == [int(row.nonzero().max()) for row in even]


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.8}, {"top_k": 30, "top_p": 0.9, "min_p": 0.05}],
)
def test_what_is_cut_is_what_transformers_cuts(sampling: dict[str, Any]) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(1)
    logits = 2.0 * torch.randn(50, 60)
    scores = logits
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in sampling:
            scores = warper(sampling[name])(None, scores)
    assert torch.equal(cut(logits.softmax(-1), Sampling(1, **sampling)) > 0, scores.isfinite())


def test_with_ignore_eos_an_end_token_is_an_id_like_any_other() -> None:
    """Every turn has the most ids that it may; up to the first end token, it is what it would have been."""
    policy, views = eager_to_end("qwen2"), prompts(6, 9)
    ended, whole = (generate(policy, views, keys(6, 6), Sampling(20, ignore_eos=on)) for on in (False, True))
    pairs = [(a, b) for x, y in zip(ended, whole, strict=True) for a, b in zip(x, y, strict=True)]
    assert any(len(a.did) < 20 for a, _ in pairs)
    for a, b in pairs:
        assert len(b.did) == 20
        assert b.info["truncated"]
        assert b.did[: len(a.did)].tolist() == a.did.tolist()


def test_a_stop_string_ends_a_turn_with_the_id_that_completes_it() -> None:
    policy, views = model("qwen2"), prompts(6, 9)
    policy.end_ids = []
    free = generate(policy, views, keys(6, 6), Sampling(40))
    stop = policy.decode(free[0][2].did[3:6])
    stopped = generate(policy, views, keys(6, 6), Sampling(40, stop=(stop, "never said")))
    assert stopped[0][2].did.tolist() == free[0][2].did[:6].tolist()
    for was, now in zip((t for row in free for t in row), (t for row in stopped for t in row), strict=True):
        assert was.did[: len(now.did)].tolist() == now.did.tolist()
        assert isinstance(now.said, Message)
        assert now.info["truncated"] == (stop not in policy.tokenizer.decode(now.did))
        assert stop not in policy.tokenizer.decode(now.did[:-1])
        if not now.info["truncated"]:
            assert policy.tokenizer.decode(now.did).endswith(stop)


def test_a_stop_string_of_a_prompt_or_prefix_ends_nothing() -> None:
    policy = model("qwen2")
    policy.end_ids = []
    ids: Ids = np.array(policy.tokenizer.encode("stop", add_special_tokens=False))
    (turns,) = generate(policy, [View(ids, prefix=ids)], [[1, 2]], Sampling(10, stop=("stop",)))
    assert [len(t.did) for t in turns] == [6, 6]
