"""Multi-Agent Evolve: rewards by hand, tags of any text, whitening by role, and the sampler with a policy that is a script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlx.advantages import role_whitened
from rlx.compose import compose
from rlx.data.clock_doubles import clock_doubles, clock_judge, clock_level, level, right, solution
from rlx.data.files import jsonl
from rlx.data.roles import LETTERS, RUBRIC, form, score, tagged
from rlx.data.rows import write
from rlx.filters import roles
from rlx.losses.policy import policy_gradient
from rlx.methods.multi_agent_evolve import (
    difficulty,
    for_pool,
    mean_score,
    multi_agent_evolve,
    proposer_reward,
    solver_reward,
)
from rlx.plan import plan
from rlx.types import Component, ConfigError, Episode, Message, Play, Sampling, Task, Turn, View

HOSTILE = [
    "",
    "<q>",
    "</q><q>",
    "<q></q>",
    "<q>{0}{x}%s\\1</q>",
    "<q><q>a</q>",
    "</a>" * 50,
    "<s>" + "9" * 500 + "</s>",
    "\x00é漢<s>٣</s>",
]


# --------------------------------------------------------------------------- rewards
def test_rewards_by_hand() -> None:
    assert proposer_reward(0.8, difficulty([0.0, 0.5]), 1.0) == pytest.approx((0.8 + 0.75 + 1) / 3) == pytest.approx(0.85)
    assert proposer_reward(0.6, 0.75, 1.0) == pytest.approx(0.53333333)
    assert proposer_reward(0.7, 0.3, 0.5) == pytest.approx(0.5)
    assert solver_reward(0.5, 1.0) == 0.75


def test_below_the_gate_difficulty_is_worth_nothing() -> None:
    assert proposer_reward(0.69, 1.0, 1.0) == proposer_reward(0.69, 0.0, 1.0)
    assert proposer_reward(0.69, 1.0, 1.0, gate=0.5) == pytest.approx(proposer_reward(0.69, 0.0, 1.0) + 1 / 3)


def test_learnable_difficulty_is_nothing_at_both_ends() -> None:
    assert [difficulty(x, learnable=True) for x in ([0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.25])] == [0.0, 0.0, 0.5, 0.75]
    assert [difficulty(x) for x in ([0.0, 0.0], [1.0, 1.0], [0.0, 1.0])] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("<s>10</s>", 1.0),
        ("<s>1</s>", 0.0),
        ("<s>12</s>", 1.0),
        ("<s>0</s>", 0.0),
        ("<s>7/10</s>", 6 / 9),
        ("<s>3 / 5</s>", 5 / 9),
        ("I think <s> 5.5 </s>", 0.5),
        ("<s>7/0</s>", None),
        ("<s>good</s>", None),
        ("7", None),
        ("<s>7", None),
    ],
)
def test_a_mark_is_read_by_rule(text: str, mark: float | None) -> None:
    assert score(text, "s") == (mark if mark is None else pytest.approx(mark))


def test_marks_that_cannot_be_read_are_skipped_and_none_is_a_half() -> None:
    assert mean_score(["<s>10</s>", "?", "<s>1</s>"], "s") == 0.5
    assert mean_score(["<s>10</s>", "?"], "s") == 1.0
    assert mean_score(["?", "<s></s>"], "s") == 0.5


def test_form_counts_tags() -> None:
    texts = ["<q>1</q>", "a <q>1</q> b", "<q>1</q><q>2</q>", "<q>1", "<q>1</q></q>", "1</q><q>", "<q> </q>", ""]
    assert [form(text, "q") for text in texts] == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_raises(text: str) -> None:
    for tag in ("q", "a", "s"):
        tagged(text, tag), form(text, tag), score(text, tag)
    level(text), right(text, text), level(tagged(text, "q"))
    for words in (LETTERS, RUBRIC):
        filled = words.rate_answer.format(question=text, answer=text)
        assert filled.count(text) >= 2
        assert clock_judge([[Message("user", filled)]], n=2) == [["<s>2</s>"] * 2]


# --------------------------------------------------------------------------- advantage
MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, False]])
AGENT = torch.tensor([0, 0, 1, 1])
REWARD = torch.tensor([[0.0, 0.0, 1.0], [0.25, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.75, 0.0]])


def test_each_role_has_mean_0_and_deviation_1_over_its_own_tokens() -> None:
    adv = role_whitened(REWARD, AGENT, MASK)
    for role in (0, 1):
        own = adv[role == AGENT][MASK[role == AGENT]]
        assert own.mean().item() == pytest.approx(0.0, abs=1e-6)
        assert own.std().item() == pytest.approx(1.0, rel=1e-6)


def test_whitening_by_hand() -> None:
    half = math.sqrt(0.75)  # 0.5, 0.5, 0.75, 0.75: mean 0.625, deviation 0.125 sqrt(4/3)
    adv = role_whitened(REWARD, AGENT, MASK)
    torch.testing.assert_close(adv[2:, :2], torch.tensor([[-half, -half], [half, half]]))
    torch.testing.assert_close(adv[0], torch.full((3,), 0.5))  # 1, 1, 1, 0.25: mean 0.8125, deviation 0.375
    torch.testing.assert_close(adv[1], torch.tensor([-1.5, 0.0, 0.0]))


def test_100_more_for_one_role_changes_nothing() -> None:
    more = REWARD + 100 * (AGENT == 1)[:, None] * torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
    torch.testing.assert_close(role_whitened(more, AGENT, MASK), role_whitened(REWARD, AGENT, MASK), atol=1e-3, rtol=0)


def test_with_one_role_the_roles_do_not_matter_and_with_two_they_do() -> None:
    one = role_whitened(REWARD, torch.zeros(4, dtype=torch.long), MASK)
    torch.testing.assert_close(one, role_whitened(REWARD, torch.full((4,), 7), MASK))
    assert not torch.allclose(one, role_whitened(REWARD, AGENT, MASK))


def test_masked_positions_change_nothing_and_the_unscored_count_nowhere() -> None:
    dirty = torch.where(MASK, REWARD, torch.tensor(float("nan")))
    torch.testing.assert_close(role_whitened(dirty, AGENT, MASK), role_whitened(REWARD, AGENT, MASK))
    unscored = torch.cat([REWARD, torch.tensor([[float("nan"), 0.0, 0.0]])])
    mask = torch.cat([MASK, torch.tensor([[True, True, True]])])
    adv = role_whitened(unscored, torch.tensor([0, 0, 1, 1, 0]), mask)
    torch.testing.assert_close(adv[:4], role_whitened(REWARD, AGENT, MASK))
    assert adv[4].tolist() == [0.0, 0.0, 0.0]


def test_equal_rewards_of_a_role_are_exactly_0() -> None:
    flat = torch.tensor([[0.0, 0.0, 0.1], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.1, 0.0]])
    assert role_whitened(flat, AGENT, MASK).tolist() == torch.zeros(4, 3).tolist()


def test_the_gradient_raises_what_a_role_is_paid_more_for_than_its_own_mean() -> None:
    logp = torch.full((4, 3), -1.0, requires_grad=True)
    policy_gradient(logp, role_whitened(REWARD, AGENT, MASK), MASK).sum().backward()
    sign = [[-1, -1, -1], [1, 0, 0], [1, 1, 0], [-1, -1, 0]]  # of the loss: 1 is more than 0.25, 0.75 more than 0.5
    assert logp.grad is not None
    assert logp.grad.sign().tolist() == sign


# --------------------------------------------------------------------------- the questions
def test_questions_and_answers_by_hand() -> None:
    assert solution("348.....") == "686"
    assert [level(q) for q in ("3.......", "348.....", "12345678")] == [1, 3, 8]
    none = ("........", "3.4.....", ".34.....", "34", "34.......", "3a......", "", None, "3\u0664......")
    assert [level(q) for q in none] == [None] * len(none)
    assert right("348.....", "686")
    assert not any(right(q, a) for q, a in (("348.....", "68"), ("3.8.....", "66"), ("34......", None)))


def test_the_exact_checker_marks_as_a_judge_would() -> None:
    def marks(*prompts: str) -> list[str]:
        return [texts[0] for texts in clock_judge([[Message("user", prompt)] for prompt in prompts])]

    assert marks("Q:34......", "Q:3.4.....", "J:34......=68", "J:34......=69", "J:3.4.....=68", "Q:34......=68") == [
        "<s>9</s>", "<s>2</s>", "<s>9</s>", "<s>2</s>", "<s>2</s>", "<s>2</s>"
    ]  # fmt: skip


def test_splits_do_not_overlap_and_demonstrations_are_as_said() -> None:
    source = clock_doubles(demos=2000, dev=50, test=100)
    rows = {name: split() for name, split in source.splits.items()}
    tests = {e.task.meta["question"] for name in ("dev", "test") for e in rows[name]}
    assert len(tests) == 150
    assert {level(q) for q in tests} == {4, 5, 6}
    solved = [e for e in rows["demos"] if e.task.meta["role"] == "solver"]
    assert not tests & {e.task.meta["question"] for e in (*solved, *rows["train"])}
    by = {steps: [e for e in solved if level(e.task.meta["question"]) == steps] for steps in range(1, 9)}
    good = {steps: np.mean([right(e.task.meta["question"], tagged(e.completion, "a")) for e in of]) for steps, of in by.items()}
    assert [good[steps] for steps in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert good[4] > good[6] > good[8] > 0.0
    proposed = [e for e in rows["demos"] if e.task.meta["role"] == "proposer"]
    assert np.mean(source.verifier(proposed)) == pytest.approx(0.6, abs=0.06)
    assert np.nanmean(clock_level(proposed)) == pytest.approx(4.5, abs=0.4)
    judged = [e for e in rows["demos"] if e.task.meta["role"] == "judge"]
    assert 0.4 < np.mean(["<s>9</s>" in e.completion for e in judged]) < 0.6


# --------------------------------------------------------------------------- the sampler
class Script:
    """A policy that says what a function says, one id a character."""

    def __init__(self, say: Any) -> None:
        self.say, self.asked = say, []

    def render(self, messages: Sequence[Message]) -> Any:
        return np.frombuffer(messages[-1].text.encode() or b" ", np.uint8).astype(np.int64)

    def act(self, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Any = None) -> list[list[Turn]]:
        played = []
        for view, row in zip(views, keys, strict=True):
            prompt = bytes(view.ids.astype(np.uint8)).decode()
            self.asked += [(prompt, tuple(np.ravel(k))) for k in row]
            texts = [self.say(prompt) for _ in row]
            played.append([
                Turn(view.ids, np.frombuffer(t.encode(), np.uint8).astype(np.int64), np.zeros(len(t.encode()), np.float32),
                     Message("assistant", t), info={"truncated": False}) for t in texts
            ])  # fmt: skip
        return played


def script(question: str = "123.....", solves: bool = True) -> Any:
    def say(prompt: str) -> str:
        role, rest = prompt[0], prompt[2:]
        if role == "P":
            return f"<q>{question}</q>"
        if role == "S":
            return f"<a>{solution(rest) if solves and level(rest) else 0}</a>"
        return clock_judge([[Message("user", prompt)]])[0][0]

    return say


def rows(count: int = 3) -> list[Episode]:
    return clock_doubles(seeds=count).splits["train"]()


def play(policy: Any, pools: dict[str, list[Episode]] | None = None) -> Play:
    pools = pools if pools is not None else {"questions": [], "pairs": []}
    return Play(policy, None, Sampling(28), (0, 1), pools=pools)  # type: ignore[arg-type]


def by_role(episodes: list[Episode]) -> dict[str, list[Episode]]:
    return {role: roles(episodes, of=[role]) for role in ("proposer", "solver", "judge")}


JUDGE: Component[Any] = Component("clock_judge", clock_judge)
EASY: dict[str, Any] = {"judge": JUDGE, "wording": "letters", "answers": 2, "verdicts": 1, "reference": 0.0}


def test_three_roles_in_groups_of_their_own_and_rewards_by_hand() -> None:
    out = multi_agent_evolve(play(Script(script())), rows(), 2, **EASY)
    assert [e.agent for e in out] == ["proposer"] * 6 + ["solver"] * 6 + ["judge"] * 6
    groups = [g for g, _ in itertools.groupby(e.group for e in out)]
    assert len(groups) == len(set(groups)) == 9
    assert all(len(e.turns) == 1 and e.num_tokens for e in out)
    high = 8 / 9
    for e in by_role(out)["proposer"]:
        assert e.turns[0].reward == pytest.approx((high + (1 - high) + 1) / 3)
        assert e.rewards == pytest.approx({"quality": high, "difficulty": 1 - high, "format": 1.0})
    assert [e.turns[0].reward for e in by_role(out)["solver"]] == pytest.approx([(high + 1) / 2] * 6)
    assert [e.turns[0].reward for e in by_role(out)["judge"]] == [1.0] * 6


def test_what_the_judge_finds_poor_is_not_in_the_pool_and_its_difficulty_does_not_pay() -> None:
    out = multi_agent_evolve(play(Script(script("1.3....."))), rows(), 1, **EASY)
    proposals = by_role(out)["proposer"]
    assert [e.turns[0].reward for e in proposals] == pytest.approx([(1 / 9 + 1) / 3] * 3)
    assert for_pool(out, pool="questions") == []
    asked = {q for e in by_role(out)["solver"] for q in [e.info["question"]]}
    assert asked <= {e.task.meta["question"] for e in rows()}
    ungated = multi_agent_evolve(play(Script(script("1.3....."))), rows(), 1, gate=0.0, **EASY)
    assert by_role(ungated)["proposer"][0].turns[0].reward == pytest.approx((1 / 9 + 8 / 9 + 1) / 3)
    unjudged = multi_agent_evolve(play(Script(script("1.3....."))), rows(), 1, quality=False, **EASY)
    assert by_role(unjudged)["proposer"][0].turns[0].reward == pytest.approx((8 / 9 + 1) / 2)
    assert len(for_pool(unjudged, pool="questions")) == 1


def test_a_proposal_without_a_tag_earns_nothing_and_asks_for_no_more() -> None:
    policy = Script(lambda prompt: "no tag")
    out = multi_agent_evolve(play(policy), rows(), 2, **EASY)
    assert {e.agent for e in out} == {"proposer", "solver"}  # without an answer there is nothing to judge
    assert {e.turns[0].reward for e in out} == {0.0}
    assert not any(e.info.get("pool") for e in out)
    assert len(policy.asked) == 12


def test_a_question_joins_the_pool_once_and_the_pool_is_used() -> None:
    policy = Script(script("999....."))
    out = multi_agent_evolve(play(policy), rows(), 2, **EASY)
    (stored,) = for_pool(out, pool="questions")
    pairs = for_pool(out, pool="pairs")
    assert len(pairs) == 6
    again = Script(script("999....."))
    later = multi_agent_evolve(play(again, {"questions": [stored], "pairs": pairs}), rows(), 2, **EASY | {"reference": 1.0})
    assert for_pool(later, pool="questions") == []  # it is there
    assert {prompt for prompt, _ in again.asked if prompt[0] == "P"} == {"P:999....."}
    assert {e.info["question"] for e in by_role(later)["solver"]} == {"999....."}


@pytest.mark.parametrize("name", ["multi_agent_evolve", "paper/multi_agent_evolve"])
def test_both_pools_are_part_of_every_checkpoint(name: str) -> None:
    buffers = plan(compose([name]).config).stages["rl"].buffers
    assert {pool for pool, spec in buffers.items() if spec.save} == {"questions", "pairs"}


def test_pools_that_are_read_back_lead_to_the_same_curriculum(tmp_path: Path) -> None:
    """As a checkpoint writes them: questions and pairs of three steps, then a step from them and one from what was read."""
    pools: dict[str, list[Episode]] = {"questions": [], "pairs": []}
    for question in ("999.....", "12......", "5......."):
        out = multi_agent_evolve(play(Script(script(question)), pools), rows(), 2, **EASY)
        pools = {pool: [*kept, *for_pool(out, pool=pool)] for pool, kept in pools.items()}  # type: ignore[arg-type]
    read = {}
    for pool, episodes in pools.items():
        write(tmp_path / f"{pool}.jsonl", episodes)
        read[pool] = jsonl(path=str(tmp_path / f"{pool}.jsonl"))

    def step(pools: dict[str, list[Episode]]) -> tuple[list[Any], list[float], int]:
        policy = Script(script("12......"))
        out = multi_agent_evolve(play(policy, pools), rows(), 2, **EASY | {"reference": 1.0})
        return policy.asked, [e.turns[0].reward for e in out], len(for_pool(out, pool="questions"))

    assert [len(read[pool]) for pool in pools] == [3, 18]
    assert step(read) == step(pools)
    assert step(read)[2] == 0  # the question is known
    assert step(read) != step({"questions": [], "pairs": []})


def test_a_stored_row_is_read_as_it_was() -> None:
    row = Episode(Task((Message("user", "P:"),), meta={"question": "99......", "answer": "88"}), 0)
    policy = Script(lambda prompt: "<q>11......</q>")  # no answer of its own, so that the stored pair is the only one
    multi_agent_evolve(play(policy, {"questions": [row], "pairs": [row]}), rows(), 1, **EASY | {"reference": 1.0})
    assert {prompt for prompt, _ in policy.asked} == {"P:99......", "S:99......", "S:11......", "J:99......=88"}


def test_the_policy_judges_where_nobody_else_is_asked_and_draws_are_never_shared() -> None:
    policy = Script(script())
    out = multi_agent_evolve(play(policy), rows(), 2, **EASY | {"judge": None, "verdicts": 3})
    assert len(policy.asked) == 6 + 12 + 12 * 3 + 6 * 3 + 6 + 6 * 3 + 6
    draws = [k for _, k in policy.asked]
    assert len(set(draws)) == len(draws)
    same = multi_agent_evolve(play(Script(script())), rows(), 2, **EASY)
    assert [e.turns[0].reward for e in out] == [e.turns[0].reward for e in same]


def test_another_judge_is_given_seeds_of_31_bits_each_its_own() -> None:
    seeds: list[int] = []

    def counting(talks: Sequence[Sequence[Message]], *, seed: int, **settings: Any) -> list[list[str]]:
        seeds.append(seed)
        return clock_judge(talks, **settings)

    for step in range(16):
        at = replace(play(Script(script())), seed=(0, step))
        multi_agent_evolve(at, rows(), 2, **{**EASY, "judge": Component("counting", counting)})
    assert len(set(seeds)) == len(seeds) == 48
    assert 2**29 < max(seeds) < 2**31


def test_another_model_proposes() -> None:
    policy, frozen = Script(script()), Script(script("55......"))
    out = multi_agent_evolve(play(policy), rows(), 1, proposer=frozen, **EASY)  # type: ignore[arg-type]
    assert {e.info["question"] for e in by_role(out)["proposer"]} == {"55......"}
    assert {prompt[0] for prompt, _ in policy.asked} == {"S", "J"}


@pytest.mark.parametrize("text", HOSTILE)
def test_no_completion_raises(text: str) -> None:
    out = multi_agent_evolve(play(Script(lambda prompt: text)), rows(), 2, **EASY)
    assert all(0.0 <= e.turns[0].reward <= 1.0 for e in out)
    multi_agent_evolve(play(Script(lambda prompt: text)), rows(), 1, verdicts=2, answers=2)


def test_a_stage_without_the_pools_is_told() -> None:
    with pytest.raises(ConfigError, match="no buffer 'pairs'"):
        multi_agent_evolve(play(Script(script()), {"questions": []}), rows(), 1, **EASY)
