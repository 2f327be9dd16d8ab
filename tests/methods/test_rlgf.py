"""RLGF: who wrote what, what each of the masks holds, and the schemes that are one another's special cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlx.advantages import gae
from rlx.derive import lambda_returns, paid_at_end
from rlx.envs.single import SingleTurn
from rlx.losses.policy import clipped_surrogate
from rlx.methods.rlgf import guided, head, spliced, switch, value_in_use
from rlx.models.language import LanguageModel
from rlx.models.load import tiny, tiny_t5
from rlx.models.tokenizer import byte_tokenizer
from rlx.rollout.native import generate
from rlx.rollout.noise import key, uniforms
from rlx.rollout.samplers import plain
from rlx.types import ConfigError, Episode, Message, Play, Reply, Sampling, Status, Task, Turn

ENDS = [1, *range(6, 30)]  # many ids end an answer, so that lengths differ


def model(kind: str, seed: int) -> LanguageModel:
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 16, "seed": seed}
    policy = tiny_t5(**sizes) if kind == "t5" else tiny(**sizes, kv_heads=2)  # type: ignore[arg-type]
    policy.engine, policy.end_ids = generate, ENDS
    return policy


POLICY, GUIDE = model("t5", 0), model("t5", 1)
ROWS = [Episode(Task((Message("user", letter),)), group) for group, letter in enumerate("abc")]


def play(policy: LanguageModel = POLICY, step: int = 1, longest: int = 12) -> Play:
    return Play(policy, SingleTurn, Sampling(longest), (0, step), step=step)


def sampled(
    n: int = 8, step: int = 1, policy: LanguageModel = POLICY, guide: LanguageModel = GUIDE, **settings: object
) -> list[Episode]:
    return guided(play(policy, step), ROWS, n, guide=guide, **settings)  # type: ignore[arg-type]


def written(episodes: list[Episode]) -> list[tuple[list[int], list[bool]]]:
    """The ids of each answer, and which of them are the guide's."""
    return [(e.turns[0].did.tolist(), e.turns[0].token["by_guide"].tolist()) for e in episodes]


# --------------------------------------------------------------------------- who wrote what
@pytest.mark.parametrize("kind", ["t5", "causal"])
@pytest.mark.parametrize("scheme", ["ppo_plus_plus", "aggrevated"])
def test_every_id_has_the_log_prob_of_the_model_that_is_said_to_have_written_it(kind: str, scheme: str) -> None:
    policy, guide = model(kind, 0), model(kind, 1)
    episodes = sampled(policy=policy, guide=guide, scheme=scheme)
    batch = policy.collate(episodes)
    with torch.no_grad():
        by = {m: m.forward(batch, {"logp"})["logp"] for m in (policy, guide)}
    gap = {m: (x - batch["rollout_logp"]).abs() for m, x in by.items()}
    whole, own = batch["string_mask"].bool(), batch["by_guide"].bool()
    assert float(gap[guide][own & whole].max()) < 1e-5
    assert float(gap[policy][~own & whole].max()) < 1e-5
    assert float(gap[policy][own & whole].min()) > 1e-4  # and not of the other one
    assert int((own & whole).sum()) > 20
    assert int((~own & whole).sum()) > 20


@pytest.mark.parametrize("scheme", ["ppo_plus_plus", "aggrevated"])
def test_an_answer_changes_hands_once_at_the_switch_and_the_prompt_is_seen_as_ever(scheme: str) -> None:
    for episode in sampled(scheme=scheme):
        (turn,) = episode.turns
        begins, ends = (True, False) if scheme == "ppo_plus_plus" else (False, True)
        at = episode.info["switch"]
        assert turn.token["by_guide"].tolist() == [begins] * at + [ends] * (len(turn.did) - at)
        assert at < len(turn.did) <= 12
        assert turn.seen.tolist() == POLICY.render(episode.task.prompt).tolist()
        assert turn.said == Message("assistant", POLICY.decode(turn.did))
        assert not set(turn.did[:-1].tolist()) & set(ENDS)  # a roll-in is cut before it ends
        assert (episode.status is Status.TRUNCATED) == (int(turn.did[-1]) not in ENDS)


def test_masks_by_hand() -> None:
    """Two ids of a roll-in, three of a roll-out."""
    ids = np.arange(5)
    one = Turn(ids[:0], ids[:4], np.zeros(4, np.float32))
    rest = Turn(ids[:0], ids[2:], np.zeros(3, np.float32), info={"truncated": False})
    restart = spliced(POLICY, ids[:1], head(one, 2), rest, guide_first=True).token
    improve = spliced(POLICY, ids[:1], head(one, 2), rest, guide_first=False).token
    begin, end, none = [True] * 2 + [False] * 3, [False] * 2 + [True] * 3, [False] * 5
    expected = {
        "trained": (end, begin),
        "by_guide": (begin, end),
        "critic_mask": (end, none),
        "guide_critic_mask": (none, end),
        "string_mask": ([True] * 5, [True] * 5),
    }
    assert {name: (restart[name].tolist(), improve[name].tolist()) for name in restart} == expected


def test_at_the_same_switch_the_two_schemes_train_on_complements() -> None:
    """Of the string, whatever its length and switch; at switch 0, ppo_plus_plus has it all."""
    for length in range(1, 8):
        ids = np.arange(length)
        whole = Turn(ids[:0], ids, np.zeros(length, np.float32), info={"truncated": False})
        for at in range(length):
            rest = replace(whole, did=ids[at:], logp=whole.logp[at:])
            restart, improve = (spliced(POLICY, ids[:0], head(whole, at), rest, guide_first=g).token for g in (True, False))
            assert (restart["trained"] ^ improve["trained"]).all()
            assert improve["trained"].sum() == at
            assert (restart["critic_mask"] == improve["guide_critic_mask"]).all()


def test_without_a_roll_in_aggrevated_trains_the_guides_critic_alone() -> None:
    batch = POLICY.collate(sampled(scheme="aggrevated", beta=0.0))
    assert not batch["mask"].any()
    assert torch.equal(batch["guide_critic_mask"], batch["string_mask"])
    assert not batch["critic_mask"].any()


# --------------------------------------------------------------------------- schemes
def test_ppo_plus_plus_without_a_roll_in_is_ppo() -> None:
    ppo = plain(play(), ROWS, 8)
    same = sampled(beta=0.0)
    assert [e.turns[0].did.tolist() for e in same] == [e.turns[0].did.tolist() for e in ppo]
    for a, b in zip(same, ppo, strict=True):
        np.testing.assert_array_equal(a.turns[0].logp, b.turns[0].logp)
        assert a.turns[0].token["trained"].all()
        assert a.turns[0].token["critic_mask"].all()
        assert (a.status, a.group, a.info["max_new_tokens"]) == (b.status, b.group, b.info["max_new_tokens"])


def test_lols_and_d2lols_are_the_two_schemes_at_their_ends() -> None:
    for step in (1, 2, 5):
        restart, improve = (written(sampled(step=step, scheme=s)) for s in ("ppo_plus_plus", "aggrevated"))
        assert restart != improve
        assert written(sampled(step=step, scheme="lols", tau=1.0)) == restart
        assert written(sampled(step=step, scheme="lols", tau=0.0)) == improve
        assert written(sampled(step=step, scheme="d2lols", tau=0)) == restart
        assert written(sampled(step=step, scheme="d2lols", tau=5)) == improve
        assert written(sampled(step=step, scheme="d2lols", tau=2)) == (improve if step <= 2 else restart)


def test_a_step_of_lols_is_ppo_plus_plus_with_probability_tau() -> None:
    restarts = [sampled(n=1, step=s, scheme="lols", tau=0.7, beta=1.0)[0].turns[0].token["by_guide"][0] for s in range(100)]
    assert abs(np.mean(restarts) - 0.7) < 4 * (0.7 * 0.3 / 100) ** 0.5


def test_the_switch_is_uniform_and_as_frequent_as_beta_says() -> None:
    """10 000 draws as the sampler makes them, roll-ins of 9 ids: chi-square with 7 degrees below its 99.9 % point."""
    coins = uniforms([key(0, 1, 2, group, sample) for group in range(100) for sample in range(100)], 2)
    at = [switch(9, v) if u < 0.8 else 0 for u, v in coins]
    share = float(np.mean([x >= 1 for x in at]))
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / 10_000) ** 0.5
    counts = np.bincount(at, minlength=9)[1:]
    assert len(counts) == 8
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 24.3
    assert [switch(n, u) for n, u in ((0, 0.5), (1, 0.5), (2, 0.0), (2, 0.999), (3, 0.999))] == [0, 0, 1, 1, 2]


def test_where_an_answer_is_cut_does_not_depend_on_whether_it_is() -> None:
    cut = [e.info["switch"] for e in sampled(n=64, beta=0.2) if e.info["switch"]]
    assert 20 < len(cut) < 64
    assert max(cut) > 6


@pytest.mark.parametrize("scheme", ["ppo_plus_plus", "aggrevated"])
def test_answers_of_a_fixed_length_go_on_after_an_end_token(scheme: str) -> None:
    """Where it stands among the ids before the switch, it is trained on if it is the policy's."""
    episodes = sampled(n=32, scheme=scheme, beta=1.0, fixed_length=True)
    turns = [e.turns[0] for e in episodes]
    assert {len(turn.did) for turn in turns} == {12}
    assert {e.status for e in episodes} == {Status.TRUNCATED}
    assert {e.info["switch"] for e in episodes} == set(range(1, 12))
    assert any(np.isin(turn.did, ENDS)[turn.token["trained"]][:-1].any() for turn in turns)


def test_what_comes_before_the_switch_and_after_it_are_different_draws() -> None:
    alone, both = (written(sampled(guide=POLICY, beta=beta)) for beta in (0.0, 1.0))
    assert sum(a[0] == b[0] for a, b in zip(alone, both, strict=True)) < 8


def test_the_guide_decodes_by_its_own_settings() -> None:
    """With top_k 1 the guide has no choice: its roll-ins of a prompt begin alike, whatever the policy does."""
    begun = [e.turns[0].did[: e.info["switch"]].tolist() for e in sampled(beta=1.0, guide_top_k=1)]
    for start in range(0, len(begun), 8):
        assert len({x[0] for x in begun[start : start + 8] if x}) == 1
    assert len({e.turns[0].did[0] for e in sampled(beta=0.0, guide_top_k=1)}) > 3
    assert written(sampled(beta=1.0, guide_top_p=1e-6)) == written(sampled(beta=1.0, guide_top_k=1))


# --------------------------------------------------------------------------- fields
def test_the_policy_loss_has_no_gradient_at_the_guides_ids() -> None:
    batch = POLICY.collate(sampled())
    logp = batch["rollout_logp"].clone().requires_grad_()
    adv = torch.ones_like(logp)
    clipped_surrogate(logp, batch["rollout_logp"], adv, batch["mask"]).sum().backward()
    assert logp.grad is not None
    own = batch["by_guide"].bool()
    assert bool((logp.grad[own] == 0).all())
    assert bool((logp.grad[~own & batch["string_mask"].bool()] == -1).all())


def test_the_value_in_use_is_that_of_who_rolls_out() -> None:
    old, guides = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    mask = torch.tensor([[False, False], [False, True]])
    assert value_in_use(old, guides, mask).tolist() == [[1.0, 2.0], [7.0, 8.0]]


def test_the_reward_is_paid_on_the_last_id_whoever_wrote_it() -> None:
    whole = torch.tensor([[True, True, True], [True, True, False]])
    assert paid_at_end(torch.tensor([2.0, 3.0]), whole).tolist() == [[0.0, 0.0, 2.0], [0.0, 3.0, 0.0]]


def test_credit_crosses_the_switch_by_hand() -> None:
    """AggreVaTeD, one id of the policy's and two of the guide's, V^guide = (1, 2, 4), reward 8 at the end, gamma = lam = 1/2.

    d = (0 + 2/2 - 1, 0 + 4/2 - 2, 8 - 4) = (0, 0, 4); A = (1/4, 1, 4) by A_t = d_t + A_{t+1} / 4; returns A + V.
    """
    policy, whole = torch.tensor([[True, False, False]]), torch.ones(1, 3, dtype=torch.bool)
    value = value_in_use(torch.full((1, 3), 9.0), torch.tensor([[1.0, 2.0, 4.0]]), whole & ~policy)
    paid = paid_at_end(torch.tensor([8.0]), whole)
    assert gae(paid, value, torch.zeros(1), whole, gamma=0.5, lam=0.5).tolist() == [[0.25, 1.0, 4.0]]
    assert lambda_returns(paid, value, torch.zeros(1), whole, gamma=0.5, lam=0.5).tolist() == [[1.25, 3.0, 8.0]]


# --------------------------------------------------------------------------- mistakes
class Chat(SingleTurn):
    """Never ends."""

    def step(self, said: Message) -> Reply:
        return Reply(messages=(said,), done=False)


def reversed_alphabet() -> PreTrainedTokenizerFast:
    """The byte tokenizer with its ids in the opposite order."""
    own = byte_tokenizer()
    words = [own.convert_ids_to_tokens(i) for i in range(len(own))]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words[::-1])}, merges=[]))
    core.pre_tokenizer = own.backend_tokenizer.pre_tokenizer
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=own.pad_token, eos_token=own.eos_token)
    made.chat_template = own.chat_template
    return made


def test_mistakes_are_said_plainly() -> None:
    with pytest.raises(ConfigError, match=r"probabilities from 0 to 1; got 1\.5 and 0\.8"):
        sampled(beta=1.5)
    with pytest.raises(ConfigError, match=r"probabilities from 0 to 1; got 0\.8 and 1\.5"):
        sampled(scheme="lols", tau=1.5)
    with pytest.raises(ConfigError, match="its episodes have to be of one turn"):
        guided(replace(play(), make_env=Chat), ROWS, 8, guide=GUIDE)
    other = model("t5", 1)
    other.tokenizer = reversed_alphabet()
    with pytest.raises(ConfigError, match="another vocabulary"):
        sampled(guide=other)
