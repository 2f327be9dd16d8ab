"""The engine samples what the model says, scores it as the training forward does, and no draw depends on its company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import CONFIGS, ids, model

from rlx.models.language import LanguageModel
from rlx.models.load import tiny
from rlx.rollout.draws import cut, draw
from rlx.rollout.native import generate
from rlx.rollout.noise import key, uniforms
from rlx.rollout.samplers import plain
from rlx.rollout.samples import Job, Samples
from rlx.types import ConfigError, Ended, Env, Episode, Ids, Message, Play, Reply, Sampling, Status, Task, Turn, View

PROMPTS = [View(ids(3, 60, 61, 4)), View(ids(3, 70, 4)), View(ids(3, 60, 61, 62, 63, 64, 65, 66, 4))]


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    return model("qwen2")


def keys(*numbers: int) -> list[list[int]]:
    return [[key(i, j) for j in range(n)] for i, n in enumerate(numbers)]


def tokens(played: list[list[Turn]]) -> list[list[list[int]]]:
    return [[t.did.tolist() for t in row] for row in played]


# --------------------------------------------------------------------------- exactness
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logp_is_the_training_forward(name: str, temperature: float) -> None:
    policy = model(name)
    policy.end_ids = [1, *range(6, 30)]  # rows finish at different times and leave the batch
    played = generate(policy, PROMPTS, keys(5, 4, 3), Sampling(14, temperature))
    turns = [t for row in played for t in row]
    assert len({len(t.did) for t in turns}) > 3
    episodes = [Episode(Task(()), 0, [t]) for t in turns]
    batch = policy.collate(episodes)
    with torch.no_grad():
        logp = policy.forward(batch, {"logp"}, temperature)["logp"]
    gap = ((logp - batch["rollout_logp"]) * batch["mask"]).abs().max()
    assert float(gap) < 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_greedy_decoding_of_transformers(name: str) -> None:
    policy = model(name)
    played = generate(policy, PROMPTS, keys(1, 1, 1), Sampling(12, temperature=0.0))
    for prompt, (turn,) in zip([view.ids for view in PROMPTS], played, strict=True):
        out = policy.module.generate(
            torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0
        )
        assert turn.did.tolist() == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_draws_do_not_depend_on_company_order_or_chunks(rows: int) -> None:
    small = model("qwen2")
    small.end_ids = [1, *range(6, 30)]  # rows finish at different times and leave the batch
    together = generate(small, PROMPTS, keys(4, 2, 3), Sampling(10))
    assert len({str(t) for t in tokens(together)[0]}) == 4  # samples of a prompt differ
    split = generate(small, PROMPTS, keys(4, 2, 3), Sampling(10, rows=rows))
    assert tokens(split) == tokens(together)
    backwards = generate(small, PROMPTS[::-1], [k[::-1] for k in keys(4, 2, 3)[::-1]], Sampling(10, rows=rows))
    assert [row[::-1] for row in tokens(backwards)[::-1]] == tokens(together)
    alone = [
        [generate(small, [p], [[k]], Sampling(10))[0][0] for k in ks] for p, ks in zip(PROMPTS, keys(4, 2, 3), strict=True)
    ]
    assert tokens(alone) == tokens(together)


def test_a_prompt_may_have_no_sample_while_another_has_two(small: LanguageModel) -> None:
    played = generate(small, PROMPTS[:2], [[], [key(1, 0), key(1, 1)]], Sampling(6))
    assert tokens(played) == [[], tokens(generate(small, PROMPTS[:2], keys(1, 2), Sampling(6)))[1]]


def test_turns_hold_prompt_text_and_whether_the_limit_cut_them(small: LanguageModel) -> None:
    small.end_ids = [1, *range(100, 262)]
    played = [t for row in generate(small, PROMPTS, keys(8, 8, 8), Sampling(3)) for t in row]
    small.end_ids = [1]
    assert {bool(t.info["truncated"]) for t in played} == {True, False}
    for turn in played:
        ends = [i in [1, *range(100, 262)] for i in turn.did.tolist()]
        assert turn.info["truncated"] == (not ends[-1])
        assert not any(ends[:-1])
        assert len(turn.did) == len(turn.logp) <= 3
        assert turn.said == Message("assistant", small.decode(turn.did))
        assert any(turn.seen is view.ids for view in PROMPTS)


def test_answer_that_does_not_fit_the_context_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        generate(model("gpt2"), [View(ids(*range(60)))], [[0]], Sampling(5))
    assert str(error.value) == "model 'gpt2': a prompt of 60 tokens and max_new_tokens=5 exceed its context of 64"


# --------------------------------------------------------------------------- one draw
LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
PROBS = torch.softmax(LOGITS, -1)  # .6439 .0871 .2369 .0321


def drawn(u: float, **sampling: float) -> tuple[int, float]:
    settings = Sampling(1, **sampling)  # type: ignore[arg-type]
    token, logp = draw(LOGITS, torch.tensor([u], dtype=torch.float64), settings)
    return int(token), float(logp)


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 0), (0.64, 0), (0.65, 1), (0.73, 1), (0.74, 2), (0.967, 2), (0.969, 3), (1 - 2**-53, 3)]
)
def test_draw_inverts_the_cumulative_distribution(u: float, token: int) -> None:
    assert drawn(u) == (token, pytest.approx(float(PROBS[0, token].log()), abs=1e-6))


def test_draw_never_takes_a_token_that_was_cut() -> None:
    token, _ = draw(torch.tensor([[-1.0, 2.0]]), torch.zeros(1, dtype=torch.float64), Sampling(1, top_k=1))
    assert token.tolist() == [1]


def test_temperature_flattens_and_is_scored() -> None:
    hot = torch.softmax(LOGITS / 2, -1)[0]
    assert drawn(0.45, temperature=2.0) == (0, pytest.approx(float(hot[0].log()), abs=1e-6))
    assert drawn(0.46, temperature=2.0) == (1, pytest.approx(float(hot[1].log()), abs=1e-6))
    assert drawn(0.99, temperature=0.0) == (0, pytest.approx(float(PROBS[0, 0].log()), abs=1e-6))


def test_top_k_and_top_p_cut_the_tail_and_leave_the_score() -> None:
    assert cut(PROBS, Sampling(1, top_k=2)).gt(0).tolist() == [[True, False, True, False]]
    assert cut(PROBS, Sampling(1, top_k=9)).gt(0).all()
    assert cut(PROBS, Sampling(1, top_p=0.64)).gt(0).tolist() == [[True, False, False, False]]
    assert cut(PROBS, Sampling(1, top_p=0.65)).gt(0).tolist() == [[True, False, True, False]]
    assert cut(PROBS, Sampling(1, top_p=0.9)).gt(0).tolist() == [[True, True, True, False]]
    assert drawn(0.9999, top_k=2) == (2, pytest.approx(float(PROBS[0, 2].log()), abs=1e-6))


def test_min_p_keeps_what_is_a_share_of_the_likeliest_as_likely() -> None:
    assert cut(PROBS, Sampling(1, min_p=0.13)).gt(0).tolist() == [[True, True, True, False]]  # 0.13 x .6439 = .0837
    assert cut(PROBS, Sampling(1, min_p=0.14)).gt(0).tolist() == [[True, False, True, False]]  # .0901
    score = [float(p.log()) for p in PROBS[0]]  # of the whole distribution; drawn from .6439 / .8808 = .7311 and the rest
    assert drawn(0.730, min_p=0.14) == (0, pytest.approx(score[0], abs=1e-6))
    assert drawn(0.732, min_p=0.14) == (2, pytest.approx(score[2], abs=1e-6))
    hot = Sampling(1, temperature=4.0, min_p=0.14)  # the share is of the scaled distribution: nothing is cut here
    assert int(draw(LOGITS, torch.tensor([0.99], dtype=torch.float64), hot)[0]) == 3


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        ([0, 1, 2, 0], 2),  # begins in the middle of one id and ends in the middle of the next
        ([3, 4, 5], 2),
        ([3, 4, 0, 5], None),
        ([6, 0], 0),  # whole within an id
        ([0] * 9 + [3, 4, 5], 11),
    ],
)
def test_a_stop_string_is_found_across_ids(ids: list[int], ends: int | None) -> None:
    pieces = ["ab", "c<e", "nd>x", "<", "end", ">", "a<end>b"]

    class Policy:
        class tokenizer:
            @staticmethod
            def batch_decode(rows: list[list[int]]) -> list[str]:
                return ["".join(pieces[i] for i in row) for row in rows]

    sampling = Sampling(20, stop=("<end>", "never"))
    state = Samples.of([Job(View(np.zeros(1, np.int64)), [1])], [np.zeros(0, np.int64)], sampling, torch.device("cpu"))
    found = [
        bool(state.stopped(Policy, torch.tensor([0]), torch.tensor([i]), torch.tensor([True]), sampling.stop)) for i in ids
    ]
    assert (found.index(True) if True in found else None) == ends


def test_frequencies_are_those_of_the_softmax() -> None:
    """20 000 seeded draws from 6 tokens: chi-square with 5 degrees of freedom, below its 99.9 % point."""
    logits = torch.tensor([[0.3, -1.0, 1.2, 0.0, -2.5, 0.7]])
    n = 20_000
    noise = torch.from_numpy(uniforms([key(0, 1, i) for i in range(n)], 1)[:, 0])
    token, _ = draw(logits.expand(n, -1), noise, Sampling(1))
    expected = torch.softmax(logits[0].double(), -1) * n
    chi2 = ((torch.bincount(token, minlength=6) - expected) ** 2 / expected).sum()
    assert float(chi2) < 20.5


# --------------------------------------------------------------------------- sampler
class Scripted:
    """An engine that says what it is told to, by turn: the contract of `generate`."""

    def __init__(self, *said: list[int]) -> None:
        self.said = list(said)
        self.views: list[list[int]] = []
        self.keys: list[list[list[int]]] = []

    def __call__(
        self, policy: LanguageModel, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended | None = None
    ) -> list[list[Turn]]:
        did = self.said[len(self.keys)]
        self.views += [view.ids.tolist() for view in views]
        self.keys.append(keys)
        return [[self.turn(policy, view.ids, did) for _ in row] for view, row in zip(views, keys, strict=True)]

    def turn(self, policy: LanguageModel, view: Ids, did: list[int]) -> Turn:
        logp = -np.arange(1, len(did) + 1, dtype=np.float32) / 4
        return Turn(
            view, ids(*did), logp, said=Message("assistant", policy.decode(ids(*did))), info={"truncated": did[-1] != 1}
        )


class Chat:
    """Replies `ok` until it has heard three messages."""

    def reset(self, task: Task) -> tuple[Message, ...]:
        self.heard = 0
        return task.prompt

    def step(self, said: Message) -> Reply:
        self.heard += 1
        return Reply(done=self.heard == 3, messages=() if self.heard == 3 else (Message("user", "ok"),))


def bytes_of(text: str) -> list[int]:
    return [int(i) for i in tiny().tokenizer.encode(text, add_special_tokens=False)]


def play(
    engine: Scripted, make_env: type[Env] = Chat, prompt: tuple[Message, ...] = (Message("user", "hi"),), n: int = 1
) -> list[Episode]:
    policy = tiny(layers=1, hidden=8, heads=1, kv_heads=1, ffn=8)
    policy.engine = engine
    return plain(Play(policy, make_env, Sampling(8), (0,)), [Episode(Task(prompt), 5)], n)


def test_a_conversation_is_never_tokenized_twice() -> None:
    """The first answer holds bytes that are no text and a role's token: rendering it again would give other ids."""
    odd = [bytes_of("a")[0], 250, 3, 1]
    engine = Scripted(odd, [*bytes_of("b"), 1], [*bytes_of("c"), 1])
    (played,) = play(engine)
    opening, reply = bytes_of("<|user|>hi<|assistant|>"), bytes_of("<|user|>ok<|assistant|>")
    b, c = [*bytes_of("b"), 1], [*bytes_of("c"), 1]
    assert engine.views == [opening, opening + odd + reply, opening + odd + reply + b + reply]
    assert [(t.seen.tolist(), t.did.tolist()) for t in played.turns] == [(opening, odd), (reply, b), (reply, c)]
    assert played.status is Status.FINISHED
    batch = tiny(layers=1, hidden=8, heads=1, kv_heads=1, ffn=8).collate([played])
    assert batch.inputs[0].ids.tolist() == opening + odd + reply + b + reply + c
    quiet = [False] * len(reply)
    assert batch["mask"].tolist() == [[True] * 4 + quiet + [True] * 2 + quiet + [True] * 2]
    zero = [0.0] * len(reply)
    assert batch["rollout_logp"].tolist() == [[-0.25, -0.5, -0.75, -1.0, *zero, -0.25, -0.5, *zero, -0.25, -0.5]]


def test_a_cut_answer_ends_its_episode() -> None:
    (played,) = play(Scripted(bytes_of("abc")))
    assert played.status is Status.TRUNCATED
    assert len(played.turns) == 1


def test_equal_views_are_read_once_and_every_sample_has_its_own_key() -> None:
    engine = Scripted(*[[*bytes_of("b"), 1]] * 3)
    played = play(engine, n=3)
    assert [len(e.turns) for e in played] == [3, 3, 3]
    assert len(engine.views) == 3
    assert engine.keys == [[[key(0, turn, 5, sample) for sample in range(3)]] for turn in range(3)]


def test_an_unfinished_answer_is_continued_and_stays_one_message() -> None:
    engine = Scripted([*bytes_of("b"), 1], [*bytes_of("c"), 1], [*bytes_of("d"), 1])
    (played,) = play(engine, prompt=(Message("user", "hi"), Message("assistant", "It is ")))
    assert engine.views[0] == bytes_of("<|user|>hi<|assistant|>It is ")
    assert engine.views[1] == [*engine.views[0], *bytes_of("b"), 1, *bytes_of("<|user|>ok<|assistant|>")]
    assert played.completion == "bcd"


class Silent(Chat):
    """Never done, never says anything."""

    def step(self, said: Message) -> Reply:
        return Reply(done=False)


def test_a_reply_that_is_neither_done_nor_a_message_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        play(Scripted([*bytes_of("b"), 1]), Silent)
    assert str(error.value) == "environment Silent: its reply is neither done nor holds a message"


def test_a_group_of_several_rows_is_played_once() -> None:
    policy = tiny(layers=1, hidden=8, heads=1, kv_heads=1, ffn=8)
    policy.engine = Scripted([1], [1], [1])
    pair = [Episode(Task((Message("user", "hi"),)), 5), Episode(Task((Message("user", "hi"),)), 5)]
    assert [e.group for e in plain(Play(policy, Chat, Sampling(8), (0,)), pair, 2)] == [5, 5]
