"""An encoder-decoder behind the Policy protocol: what it samples is what it trains on, token by token."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ids

from rlx.memory import sizes
from rlx.models.heads import Heads
from rlx.models.load import outline, pretrained, read, shrunken, tiny, tiny_t5
from rlx.models.lora import Lora
from rlx.models.seq2seq import Pair, Seq2Seq
from rlx.rollout.native import generate
from rlx.rollout.noise import key
from rlx.types import Component, ConfigError, DataError, Episode, Ids, Message, Sampling, Status, Task, Turn, View

PROMPTS = [ids(3, 60, 61, 1), ids(3, 70, 1), ids(3, 60, 61, 62, 63, 64, 65, 66, 1)]
ENDS = [1, *range(6, 60)]  # many ids end an answer, so that rows finish at different times and leave the batch


@pytest.fixture(scope="module")
def small() -> Seq2Seq:
    return made()


def made(seed: int = 0) -> Seq2Seq:
    """A model whose distributions are far from uniform."""
    policy = tiny_t5(layers=2, hidden=32, ffn=64, seed=seed)
    assert isinstance(policy, Seq2Seq)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    policy.end_ids = ENDS
    policy.engine = generate
    return policy


def views(*prefixes: Ids) -> list[View]:
    """The prompts, with a prefix for each of the first."""
    return [View(prompt, prefix=prefix) for prompt, prefix in zip(PROMPTS, [*prefixes, *[ids()] * 3], strict=False)]


def keys(*numbers: int) -> list[list[int]]:
    return [[key(i, j) for j in range(n)] for i, n in enumerate(numbers)]


def tokens(played: list[list[Turn]]) -> list[list[list[int]]]:
    return [[t.did.tolist() for t in row] for row in played]


def whole(turn: Turn, prefix: Ids) -> Episode:
    """An episode of a turn that was forced to begin with a prefix."""
    did = np.concatenate([prefix, turn.did])
    trained = np.arange(len(did)) >= len(prefix)
    logp = np.concatenate([np.zeros(len(prefix), np.float32), turn.logp])
    return Episode(Task(()), 0, [Turn(turn.seen, did, logp, said=turn.said, token={"trained": trained})])


# --------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logp_is_the_training_forward_after_prefixes_of_any_length(small: Seq2Seq, temperature: float) -> None:
    prefixes = [ids(), ids(70, 71, 72), ids(80)]
    played = small.act(views(*prefixes), keys(5, 4, 3), Sampling(14, temperature))
    episodes = [whole(turn, prefix) for row, prefix in zip(played, prefixes, strict=True) for turn in row]
    assert len({e.num_tokens for e in episodes}) > 3
    batch = small.collate(episodes)
    with torch.no_grad():
        logp = small.forward(batch, {"logp"}, temperature)["logp"]
    assert float(((logp - batch["rollout_logp"]) * batch["mask"]).abs().max()) < 1e-5
    assert logp.shape == batch["mask"].shape


def test_greedy_is_the_greedy_decoding_of_transformers(small: Seq2Seq) -> None:
    played = small.act(views(), keys(1, 1, 1), Sampling(12, temperature=0.0))
    for prompt, (turn,) in zip(PROMPTS, played, strict=True):
        out = small.module.generate(
            torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=12, eos_token_id=ENDS, pad_token_id=0
        )
        assert turn.did.tolist() == out[0, 1:].tolist()


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_draws_do_not_depend_on_company_order_or_chunks(small: Seq2Seq, rows: int) -> None:
    prefixes = [ids(70), ids(), ids(80, 81)]
    asked, drawn = views(*prefixes), keys(4, 2, 3)
    together = small.act(asked, drawn, Sampling(10))
    assert len({str(t) for t in tokens(together)[0]}) == 4  # samples of a prompt differ
    assert tokens(small.act(asked, drawn, Sampling(10, rows=rows))) == tokens(together)
    backwards = small.act(asked[::-1], [k[::-1] for k in drawn[::-1]], Sampling(10, rows=rows))
    assert [row[::-1] for row in tokens(backwards)[::-1]] == tokens(together)
    alone = [[small.act([v], [[k]], Sampling(10))[0][0] for k in ks] for v, ks in zip(asked, drawn, strict=True)]
    assert tokens(alone) == tokens(together)
    np.testing.assert_allclose(alone[0][0].logp, together[0][0].logp, atol=1e-5)


@pytest.mark.parametrize("model", ["t5", "causal"])
def test_a_turn_that_is_forced_to_begin_as_it_did_goes_on_as_it_did(model: str) -> None:
    policy = made() if model == "t5" else tiny(layers=1, hidden=16, heads=1, kv_heads=1, ffn=16)
    policy.engine, policy.end_ids = generate, ENDS
    free = policy.act(views(), keys(1, 1, 1), Sampling(10))
    begun = [row[0].did[: len(row[0].did) // 2] for row in free]
    assert any(len(ids) for ids in begun)
    went_on = policy.act(views(*begun), keys(1, 1, 1), Sampling(10))
    assert [[*b, *row[0].did] for b, row in zip(begun, went_on, strict=True)] == [row[0].did.tolist() for row in free]
    for b, before, after in zip(begun, free, went_on, strict=True):
        np.testing.assert_allclose(after[0].logp, before[0].logp[len(b) :], atol=1e-5)
        assert after[0].seen.tolist() == before[0].seen.tolist()
        assert after[0].info == before[0].info


def test_a_prefix_counts_among_the_ids_of_the_turn(small: Seq2Seq) -> None:
    ((turn,),) = small.act([View(PROMPTS[0], prefix=ids(70, 71, 72))], keys(1), Sampling(4))
    assert len(turn.did) == 1
    with pytest.raises(ValueError, match="a turn of at most 3 ids cannot go on after a prefix of 3"):
        small.act([View(PROMPTS[0], prefix=ids(70, 71, 72))], keys(1), Sampling(3))


# --------------------------------------------------------------------------- messages, tensors, disk
def test_the_encoder_reads_the_prompt_and_the_end_and_the_decoder_writes_the_answer_and_the_end(small: Seq2Seq) -> None:
    prompt = (Message("user", "hi"),)
    row = Episode(Task(prompt), 3, [Turn(ids(), ids(), np.zeros(0, np.float32), Message("assistant", "yo"))], label=1.0)
    told = small.tokenize(row)
    (turn,) = told.turns
    assert "".join(small.pieces(turn.seen)) == "<|user|>hi<|assistant|><|end|>"
    assert "".join(small.pieces(turn.did)) == "yo<|end|>"
    assert small.render(prompt).tolist() == turn.seen.tolist()
    batch = small.collate([told])
    assert (batch.inputs[0].prompt, batch.inputs[0].length) == (5, 8)
    assert batch["mask"].tolist() == [[True] * 3]
    assert (batch["label"].tolist(), batch["group"].tolist()) == ([1.0], [3])


@pytest.mark.parametrize("model", ["t5", "causal"])
def test_a_demonstration_that_was_cut_goes_on(model: str) -> None:
    policy = tiny_t5() if model == "t5" else tiny(layers=1, hidden=16, heads=1, kv_heads=1, ffn=16)
    turn = Turn(ids(), ids(), np.zeros(0, np.float32), Message("assistant", "yo"))
    for status, said in ((Status.FINISHED, "yo<|end|>"), (Status.TRUNCATED, "yo")):
        told = policy.tokenize(Episode(Task((Message("user", "hi"),)), 0, [turn], status, label=1.0))
        assert "".join(policy.pieces(told.turns[0].did)) == said


def test_logp_and_entropy_are_those_of_the_model_itself(small: Seq2Seq) -> None:
    """Position t is what the decoder says after its start token and the t ids before it."""
    episodes = [whole(Turn(PROMPTS[0], ids(70, 71, 1), np.zeros(3, np.float32)), ids())]
    logits = small.module(
        input_ids=torch.from_numpy(PROMPTS[0])[None], decoder_input_ids=torch.tensor([[0, 70, 71]])
    ).logits.double()
    logs = logits.log_softmax(-1)
    expected = logs.gather(-1, torch.tensor([[[70], [71], [1]]]))[..., 0]
    found = small.forward(small.collate(episodes), {"logp", "entropy"})
    torch.testing.assert_close(found["logp"].double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["entropy"].double(), -(logs.exp() * logs).sum(-1), atol=1e-5, rtol=0)


def test_the_rest_of_the_batch_changes_nothing(small: Seq2Seq) -> None:
    short = whole(Turn(PROMPTS[1], ids(70, 1), np.zeros(2, np.float32)), ids())
    long = whole(Turn(PROMPTS[2], ids(80, 81, 82, 83, 1), np.zeros(5, np.float32)), ids())
    alone = small.forward(small.collate([short]), {"logp"})["logp"]
    batch = small.collate([short, long])
    both = small.forward(batch, {"logp"})["logp"]
    torch.testing.assert_close(both[0, :2], alone[0], atol=1e-5, rtol=0)
    part = small.forward(batch.take([0]), {"logp"})["logp"]
    assert part.shape == (1, 5)
    torch.testing.assert_close(part[0, :2], alone[0], atol=1e-5, rtol=0)


def test_a_head_reads_the_state_before_each_id() -> None:
    policy = made()
    policy.heads = Heads({"value": "token", "score": "last"}, 32, seed=0)
    assert policy.offers == {"logp", "entropy", "value", "score"}
    two = [
        whole(Turn(PROMPTS[0], ids(70, 71, 72, 1), np.zeros(4, np.float32)), ids()),
        whole(Turn(PROMPTS[0], ids(70, 71, 99), np.zeros(3, np.float32)), ids()),
    ]
    found = {name: x.detach() for name, x in policy.forward(policy.collate(two), policy.offers).items()}
    assert found["value"].shape == found["logp"].shape == (2, 4)
    torch.testing.assert_close(found["value"][0, :3], found["value"][1, :3])  # the third id itself is not read yet
    assert abs(float(found["value"][0, 2] - found["value"][0, 0])) > 1e-3
    assert abs(float(found["score"][0] - found["score"][1])) > 1e-3  # the last id is
    only = policy.forward(policy.collate(two), {"value"})
    assert set(only) == {"value"}
    torch.testing.assert_close(only["value"], found["value"])


def test_a_conversation_of_several_turns_is_refused(small: Seq2Seq) -> None:
    turn = Turn(ids(), ids(), np.zeros(0, np.float32), Message("assistant", "yo"), (Message("user", "and?"),))
    with pytest.raises(DataError, match="answers once, and a row has 2 assistant messages"):
        small.tokenize(Episode(Task((Message("user", "hi"),)), 0, [turn, turn]))
    with pytest.raises(ConfigError, match="plays one turn"):
        small.extension([Message("user", "hi")], 1)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q", "v"], "init_lora_weights": False}])
def test_a_saved_model_is_read_by_transformers_alone_and_by_pretrained(lora: Lora | None, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    policy = tiny_t5(hidden=32, ffn=64, lora=lora)
    policy.save(tmp_path / "out")
    pair = {"input_ids": torch.from_numpy(PROMPTS[0])[None], "decoder_input_ids": torch.tensor([[0, 70, 71]])}
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(plain(**pair).logits, policy.module(**pair).logits, atol=1e-5, rtol=0)
    again = pretrained(path=str(tmp_path / "out"))
    assert isinstance(again, Seq2Seq)
    batch = policy.collate([whole(Turn(PROMPTS[0], ids(70, 71, 1), np.zeros(3, np.float32)), ids())])
    torch.testing.assert_close(again.forward(batch, {"logp"}), policy.forward(batch, {"logp"}), atol=1e-5, rtol=0)


def test_a_critic_keeps_its_head_on_disk(tmp_path: Path) -> None:
    critic = tiny_t5(hidden=32, ffn=64).with_heads({"value": "token"}, seed=3)
    critic.save(tmp_path / "critic")
    again = read(str(tmp_path / "critic"), {}, seed=0, heads={"value": "token"})
    batch = critic.collate([whole(Turn(PROMPTS[0], ids(70, 71, 1), np.zeros(3, np.float32)), ids())])
    torch.testing.assert_close(again.forward(batch, {"value"}), critic.forward(batch, {"value"}), atol=1e-6, rtol=0)


def test_a_lora_adapter_is_all_that_is_trained() -> None:
    policy = tiny_t5(hidden=32, ffn=64, lora={"r": 2, "target_modules": ["q", "v"]})
    names = [name for name, p in policy.module.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


def test_a_shrunken_or_outlined_model_keeps_its_kind(tmp_path: Path) -> None:
    tiny_t5(layers=3, hidden=32, ffn=64).save(tmp_path / "out")
    for component in (
        Component("tiny_t5", functools.partial(tiny_t5, layers=3), settings={"layers": 3}),
        Component(
            "pretrained", functools.partial(pretrained, path=str(tmp_path / "out")), settings={"path": str(tmp_path / "out")}
        ),
    ):
        small, whole_size = shrunken(component), outline(component)
        assert isinstance(small, Seq2Seq)
        assert isinstance(whole_size, Seq2Seq)
        assert small.module.config.num_layers == 2
        assert whole_size.module.config.num_layers == 3
        assert sizes(whole_size).layers == 3


def test_the_weights_are_a_function_of_the_seed() -> None:
    one, again, other = (tiny_t5(seed=s).module.shared.weight for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert tiny_t5().module.config.dropout_rate == 0.0


def test_the_input_says_how_long_it_is() -> None:
    assert (Pair(ids(1, 2), ids(3)).prompt, Pair(ids(1, 2), ids(3)).length) == (2, 3)


def test_a_stop_string_that_begins_in_the_prefix_ends_nothing(small: Seq2Seq) -> None:
    """As for causal models, which read the prefix as they read the prompt."""
    asked = [View(PROMPTS[0], prefix=ids(70, 71, 72))]
    free = small.act(asked, keys(4), Sampling(12))
    longest = max(free[0], key=lambda turn: len(turn.did))
    assert len(longest.did) > 1
    stop = small.tokenizer.decode([71, 72, int(longest.did[0])])
    assert tokens(small.act(asked, keys(4), Sampling(12, stop=(stop,)))) == tokens(free)
