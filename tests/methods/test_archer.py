"""ArCHer: hand values, identities, gradients and masks of its losses; exact tokens of a scripted conversation."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from rlx.check import components
from rlx.compose import compose
from rlx.data.text_games import twenty_questions
from rlx.envs.twenty_questions import TwentyQuestions
from rlx.losses.likelihood import nll
from rlx.losses.policy import advantage_weighted, policy_gradient
from rlx.methods.archer import turn_returns, utterance_advantage, utterance_td, value_of_fresh
from rlx.models.language import LanguageModel
from rlx.models.load import tiny
from rlx.plan import plan
from rlx.reduce import seq_sum
from rlx.rewards.env import played_out
from rlx.rewards.score import score
from rlx.rollout.native import generate
from rlx.rollout.samplers import plain, resampled
from rlx.stages.models import ModelSpec, follow, target_of, weights
from rlx.types import Component, Counts, Ended, Episode, Message, Play, Sampling, Turn, View

# A stored episode of three turns, one of a turn that was cut, and a fresh utterance at the second turn of the first.
TURN_MASK = torch.tensor([[True, True, True], [True, False, False], [False, True, False]])
FRESH = torch.tensor([False, False, True])
REWARD = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
DONE = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
V = torch.tensor([[-2.0, -1.0, -0.5], [-3.0, 7.0, 7.0], [7.0, -1.0, 7.0]])
Q = torch.tensor([[-2.5, -1.5, 1.0], [0.0, 7.0, 7.0], [7.0, -4.0, 7.0]])


def td(q: torch.Tensor = Q, v: torch.Tensor = V, gamma: float = 0.5, mask: torch.Tensor = TURN_MASK) -> torch.Tensor:
    return utterance_td(q, v, REWARD, DONE, FRESH, mask, gamma=gamma)


# --------------------------------------------------------------------------- values by hand
def test_td_by_hand() -> None:
    """Targets -1 + 0.5 * -1 = -1.5, -1 + 0.5 * -0.5 = -1.25, 0; and -1 where nothing follows."""
    expected = torch.tensor([[1.0, 0.0625, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(td(), expected)


def test_with_gamma_0_the_target_is_the_reward() -> None:
    torch.testing.assert_close(td(q=REWARD, gamma=0.0), torch.zeros(3, 3))


def test_v_follows_the_target_of_the_fresh_utterance_alone() -> None:
    expected = torch.zeros(3, 3)
    expected[2, 1] = 9.0
    torch.testing.assert_close(value_of_fresh(V, Q, FRESH, TURN_MASK), expected)


TURN = torch.tensor([[0, 0, -1, 1, -1, 2], [0, -1, -1, -1, -1, -1], [-1, -1, -1, 1, 1, -1]])


def test_the_advantage_of_an_utterance_is_that_of_each_of_its_tokens() -> None:
    other = torch.full((3, 3), -5.0)
    adv = utterance_advantage(Q, other, V, V + 1, FRESH, TURN, TURN_MASK, TURN >= 0)
    expected = torch.zeros(3, 6)
    expected[2, 3:5] = -5.0 - -1.0  # min(-4, -5) - min(-1, 0)
    torch.testing.assert_close(adv, expected)


def test_centered_advantages_of_fresh_utterances_have_a_mean_of_0() -> None:
    fresh, turn = torch.tensor([False, True, True]), torch.tensor([[0, 1, 2], [0, 0, -1], [-1, 1, -1]])
    adv = utterance_advantage(Q, Q, V, V, fresh, turn, TURN_MASK, turn >= 0, center=True)
    # Q - V is 3 at the fresh utterance of two tokens and -3 at that of one: their mean is 0 before, and after a shift of Q
    torch.testing.assert_close(adv, torch.tensor([[0.0, 0, 0], [3, 3, 0], [0, -3, 0]]))
    torch.testing.assert_close(utterance_advantage(Q - 5, Q - 5, V, V, fresh, turn, TURN_MASK, turn >= 0, center=True), adv)


def test_turn_returns_by_hand() -> None:
    """Returns -2, -1, 0 and -1; baselines of the first turn -1.5, of the others their own."""
    adv = turn_returns(REWARD[:2], TURN_MASK[:2], TURN[:2], TURN[:2] >= 0)
    expected = torch.tensor([[-0.5, -0.5, 0, 0, 0, 0], [0.5, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(adv, expected)
    plain_ = turn_returns(REWARD[:2], TURN_MASK[:2], TURN[:2], TURN[:2] >= 0, baseline=False)
    torch.testing.assert_close(plain_[0], torch.tensor([-2.0, -2.0, 0, -1.0, 0, 0]))


# --------------------------------------------------------------------------- identities
def test_on_a_chain_td_and_v_find_the_values_of_dynamic_programming() -> None:
    """Two states, reward 1 for each step, the second ends: V = 1 + gamma, 1. 1000 steps with a target network."""
    turn_mask, fresh = torch.tensor([[True, True], [True, False], [False, True]]), torch.tensor([False, True, True])
    reward, done = torch.ones(3, 2), torch.tensor([[0.0, 1.0]] * 3)
    q, v = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    target_q, target_v = torch.zeros(2), torch.zeros(2)
    optimizer = torch.optim.Adam([q, v], lr=0.01)
    for _ in range(1000):
        loss = utterance_td(q.expand(3, 2), target_v.expand(3, 2), reward, done, fresh, turn_mask, gamma=0.5).sum()
        (loss + value_of_fresh(v.expand(3, 2), target_q.expand(3, 2), fresh, turn_mask).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        target_q.lerp_(q.detach(), 0.1)
        target_v.lerp_(v.detach(), 0.1)
    torch.testing.assert_close(q.detach(), torch.tensor([1.5, 1.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(v.detach(), torch.tensor([1.5, 1.0]), atol=0.05, rtol=0)


def test_the_mean_advantage_is_0_where_v_is_the_mean_of_q() -> None:
    probs, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([-1.0, -2.0, -4.0])
    v = (probs * q).sum().expand(3, 1)
    turn = torch.zeros(3, 1, dtype=torch.long)
    mask = turn == 0
    adv = utterance_advantage(q[:, None], q[:, None], v, v, torch.ones(3, dtype=torch.bool), turn, mask, mask)
    assert float((probs[:, None] * adv).sum()) == pytest.approx(0.0, abs=1e-6)


def test_with_tau_1_a_target_is_a_copy_and_with_0_it_stays(policy: LanguageModel) -> None:
    """tau = 1 - decay."""
    critic = target_of(policy).with_heads({"q": "after_turn", "v": "before_turn"}, 0)
    models = {"critic": critic, "copied": target_of(critic), "kept": target_of(critic)}
    with torch.no_grad():
        for weight in weights(critic):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    specs = {"copied": ModelSpec(ema="critic", decay=0.0), "kept": ModelSpec(ema="critic", decay=1.0)}
    follow(models, specs, "critic")
    for now, copied, kept in zip(weights(critic), weights(models["copied"]), weights(models["kept"]), strict=True):
        assert torch.equal(copied, now)
        assert not torch.equal(kept, now)


# --------------------------------------------------------------------------- gradients and masks
def test_q_moves_towards_its_target_and_v_towards_q() -> None:
    q, v = Q.clone().requires_grad_(), V.clone().requires_grad_()
    td(q=q).sum().backward()
    value_of_fresh(v, Q, FRESH, TURN_MASK).sum().backward()
    assert q.grad is not None
    assert v.grad is not None
    assert q.grad.sign().tolist() == [[-1, -1, 1], [1, 0, 0], [0, 0, 0]]
    assert v.grad.sign().tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_turns_outside_the_mask_change_nothing() -> None:
    nan = float("nan")
    q, v = torch.where(TURN_MASK, Q, nan), torch.where(TURN_MASK, V, nan).requires_grad_()
    torch.testing.assert_close(td(q=q, v=v.detach()), td())
    torch.testing.assert_close(value_of_fresh(v, q, FRESH, TURN_MASK), value_of_fresh(V, Q, FRESH, TURN_MASK))
    value_of_fresh(v, q, FRESH, TURN_MASK).sum().backward()
    assert v.grad is not None
    assert torch.isfinite(v.grad).all()
    adv = utterance_advantage(q, q, v.detach(), v.detach(), FRESH, TURN, TURN_MASK, TURN >= 0)
    torch.testing.assert_close(adv, utterance_advantage(Q, Q, V, V, FRESH, TURN, TURN_MASK, TURN >= 0))


def test_the_actors_loss_is_a_sum_over_the_tokens_of_an_utterance() -> None:
    x = torch.full((1, 4), -0.5)
    mask = torch.tensor([[True, True, True, False]])
    assert float(seq_sum(x, mask, Counts(3.0, 1.0))) == -1.5


def test_the_actors_gradient_is_linear_in_the_advantage(policy: LanguageModel) -> None:
    batch = policy.collate(play(policy))

    def gradient(times: float) -> torch.Tensor:
        adv = times * turn_returns(batch["turn_reward"], batch["turn_mask"], batch["turn"], batch["mask"], baseline=False)
        policy.module.zero_grad()
        loss = policy_gradient(policy.forward(batch, {"logp"})["logp"], adv, batch["mask"])
        seq_sum(loss, batch["mask"], Counts(1.0, 1.0)).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    once = gradient(1.0)
    assert float(once.abs().max()) > 1e-3
    for times in (3.0, -0.5, 0.0):
        torch.testing.assert_close(gradient(times), times * once, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------- offline
def test_offline_the_advantage_is_that_of_the_stored_utterances() -> None:
    adv = utterance_advantage(Q, Q, V, V, FRESH, TURN, TURN_MASK, TURN >= 0, of="stored")
    expected = torch.zeros(3, 6)
    expected[0, :2], expected[0, 3], expected[0, 5], expected[1, 1] = -0.5, -0.5, 1.5, 0.0
    expected[1, 0] = 3.0
    torch.testing.assert_close(adv, expected)
    fresh = utterance_advantage(Q, Q, V, V, FRESH, TURN, TURN_MASK, TURN >= 0)
    torch.testing.assert_close(adv + fresh, utterance_advantage(Q, Q, V, V, FRESH | True, TURN, TURN_MASK, TURN >= 0))


def test_offline_utterances_are_imitated_by_the_advantage_of_the_whole() -> None:
    """Weights exp(lambda A) = exp(-1), exp(3) and exp(6) on every token of an utterance; with lambda 0, plain BC."""
    adv = utterance_advantage(Q, Q, V, V, FRESH, TURN, TURN_MASK, TURN >= 0, of="stored")[:2]
    logp, mask = torch.full((2, 6), -1.0), TURN[:2] >= 0
    expected = torch.zeros(2, 6)
    expected[0, :2], expected[0, 3], expected[0, 5], expected[1, 0] = math.exp(-1), math.exp(-1), math.exp(3), math.exp(6)
    torch.testing.assert_close(advantage_weighted(logp, adv, mask, inverse_temperature=2.0), expected)
    torch.testing.assert_close(advantage_weighted(logp, adv, mask, inverse_temperature=0.0), nll(logp, mask))


def test_the_offline_losses_bind_by_turn_and_work_on_a_generated_batch() -> None:
    config = compose(["archer"]).config
    rl = config["stages"]["rl"]
    rl["buffers"] = {"played": {"keep": [{"name": "top_returns", "quantile": 0.9}]}}
    value = {"name": "expectile_value", "expectile": 0.9, "read": {"value": "v", "returns": "target_q", "mask": "turn_mask"}}
    rl["updates"]["critic"]["loss"] = [{"name": "utterance_td", "gamma": 0.99}, value]
    actor = rl["updates"]["actor"]
    actor["advantage"], actor["loss"] = [{"name": "utterance_advantage", "of": "stored"}], [{"name": "advantage_weighted"}]
    assert components(plan(config)) == []


# --------------------------------------------------------------------------- the recipe
@pytest.mark.parametrize("name", ["archer", "paper/archer"])
def test_the_critic_is_warmed_up_before_the_actor_moves(name: str) -> None:
    """Near 0 where each step costs 1, a critic is an optimist: the actor waits until it has seen some returns."""
    updates = plan(compose([name]).config).stages["rl"].all_updates()
    first = {k: next(step for step in range(1, 100) if u.due(step, 1)) for k, u in updates.items()}
    assert first["critic"] == 1
    assert first["actor"] > 5


# --------------------------------------------------------------------------- exact tokens of a conversation
SAID = ["Is it alive?", "Is it gold?", "Is it a cow?"]


def scripted(
    policy: LanguageModel, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended | None = None
) -> list[list[Turn]]:
    """Says SAID in turn, each token with a log-probability of -1/4 times its place; the contract of the engine."""
    played = []
    for view, row in zip(views, keys, strict=True):
        k = policy.decode(view.ids).count("?")
        did = np.array([*policy.tokenizer.encode(SAID[k]), policy.end_ids[0]], np.int64)
        logp = -np.arange(1, len(did) + 1, dtype=np.float32) / 4
        said = Message("assistant", SAID[k])
        played += [[Turn(view.ids, did, logp, said, info={"truncated": False}) for _ in row]]
    return played


@pytest.fixture(scope="module")
def policy() -> LanguageModel:
    return tiny(layers=1, hidden=16, heads=2, kv_heads=2, ffn=16)


def play(policy: LanguageModel, n: int = 1) -> list[Episode]:
    policy.engine = scripted
    source = twenty_questions()
    rows = [e for e in source.splits["dev"]() if e.task.answer == "cow"][:1]
    episodes = plain(Play(policy, source.make_env, Sampling(24), (0,)), rows, n)
    score(episodes, [Component("verifier", partial(played_out, horizon=12))], "here")
    return episodes


def test_ids_masks_and_log_probs_of_a_scripted_conversation(policy: LanguageModel) -> None:
    """Written out by hand: the roles' tokens, a token a byte, and what the environment said between the turns."""
    (episode,) = play(policy)
    batch = policy.collate([episode])
    pieces = ["<|user|>", *"Questions:", "<|assistant|>"]
    assert policy.pieces(batch.inputs[0].ids[: batch.inputs[0].prompt]) == pieces
    told = [["<|user|>", *"Yes.", "<|assistant|>"], ["<|user|>", *"No.", "<|assistant|>"]]
    expected: list[tuple[str, bool, int, float]] = []
    for k, said in enumerate(SAID):
        own = [*said, "<|end|>"]
        expected += [(piece, True, k, -(i + 1) / 4) for i, piece in enumerate(own)]
        expected += [(piece, False, -1, 0.0) for piece in (told[k] if k < 2 else [])]
    ids = batch.inputs[0].ids[batch.inputs[0].prompt :]
    columns = (batch[name][0].tolist() for name in ("mask", "turn", "rollout_logp"))
    assert list(zip(policy.pieces(ids), *columns, strict=True)) == expected
    assert batch["turn_reward"].tolist() == [[-1.0, -1.0, 0.0]]
    assert batch["turn_done"].tolist() == [[0.0, 0.0, 1.0]]


def test_what_the_environment_says_has_no_gradient(policy: LanguageModel) -> None:
    batch = policy.collate(play(policy))
    adv = turn_returns(batch["turn_reward"], batch["turn_mask"], batch["turn"], batch["mask"], baseline=False)
    assert (adv[~batch["mask"]] == 0).all()
    assert batch["mask"].sum() == sum(len(said) + 1 for said in SAID)


def test_a_continued_turn_is_never_tokenised_again(policy: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a policy sees in its last turn is, id by id, what it saw and did before; only the new reply is encoded."""
    encoded: list[str] = []
    ids_of = policy._ids

    def note(*texts: str) -> list[np.ndarray]:
        encoded.extend(texts)
        return ids_of(*texts)

    monkeypatch.setattr(policy, "_ids", note)
    (episode,) = play(policy)
    assert encoded == [
        "<|user|>Questions:<|assistant|>",
        "<|user|>Yes.<|assistant|>",
        "<|user|>No.<|assistant|>",
    ]
    whole = np.concatenate([ids for turn in episode.turns for ids in (turn.seen, turn.did)])
    assert policy.collate([episode]).inputs[0].ids.tolist() == whole.tolist()


# --------------------------------------------------------------------------- the pieces together
def test_a_fresh_utterance_stands_in_the_state_of_a_stored_turn(policy: LanguageModel) -> None:
    episodes = play(policy)
    policy.engine = generate
    fresh = resampled(policy, [(episodes[0], k) for k in range(3)], Sampling(6), (3,))
    batch = policy.collate([*episodes, *fresh])
    assert batch["fresh"].tolist() == [False, True, True, True]
    assert batch["turn_mask"].tolist() == [[True] * 3, [True, False, False], [False, True, False], [False, False, True]]
    for k, (stored, drawn) in enumerate(zip(episodes[0].turns, fresh, strict=True)):
        assert drawn.turns[k].seen.tolist() == stored.seen.tolist()
        assert [t.did.tolist() for t in drawn.turns[:k]] == [t.did.tolist() for t in episodes[0].turns[:k]]


def test_v_of_a_state_is_the_same_in_the_stored_and_in_the_fresh_episode(policy: LanguageModel) -> None:
    critic = target_of(policy).with_heads({"q": "after_turn", "v": "before_turn"}, 0)
    episodes = play(policy)
    policy.engine = generate
    batch = critic.collate([*episodes, *resampled(policy, [(episodes[0], k) for k in range(3)], Sampling(6), (3,))])
    with torch.no_grad():
        v = critic.forward(batch, {"v", "q"})["v"]
    for k in range(3):
        assert float(v[k + 1, k]) == pytest.approx(float(v[0, k]), abs=1e-5)


def test_a_group_plays_the_same_secret_and_repeats(policy: LanguageModel) -> None:
    first, second = (play(policy, n=2) for _ in range(2))
    assert [e.task.answer for e in first] == ["cow", "cow"]
    assert [[t.did.tolist() for t in e.turns] for e in first] == [[t.did.tolist() for t in e.turns] for e in second]
    assert TwentyQuestions("mini", 12).reset(first[0].task) == first[0].task.prompt
