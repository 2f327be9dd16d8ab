"""Rewards by rule, and the worker that compares formulas."""

import importlib
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from rlx.rewards import rules
from rlx.rewards.env import env
from rlx.rewards.score import pay, score, show
from rlx.types import Component, ConfigError, DataError, Episode, Failed, Message, Status, Task, Turn


def episode(completion: str = "", *, answer: object = "5", num_tokens: int = 0, **info: object) -> Episode:
    turn = Turn(
        np.zeros(0, np.int64), np.zeros(num_tokens, np.int64), np.zeros(0, np.float32), Message("assistant", completion)
    )
    return Episode(Task((Message("user", "2+3="),), answer), group=0, turns=[turn], info=dict(info))


def lengths(*num_tokens: int, **info: object) -> list[Episode]:
    return [episode(num_tokens=n, **info) for n in num_tokens]


# --------------------------------------------------------------------------- answer_match
def test_answer_match():
    group = [episode(text) for text in ["5", "#### 5.0", r"\boxed{6}", "The answer is 5.", "no idea at all", ""]]
    assert rules.answer_match(group) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert rules.answer_match(group, extract="hash") == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_answer_match_takes_numbers_and_worked_solutions_as_gold():
    assert rules.answer_match([episode("125", answer=125), episode("72", answer="24 + 48\n#### 72")]) == [1.0, 1.0]


@pytest.mark.parametrize("answer", [None, " "])
def test_a_task_without_answer_is_an_error(answer):
    with pytest.raises(DataError, match=r"answer_match: the task '2\+3=' \(group 0\) has no answer"):
        rules.answer_match([episode("5", answer=answer)])


def test_math_verify_survives_a_tower_of_powers():
    """The tower is nan or wrong within its time, and the samples before and after it are scored."""
    golds_and_texts = [(r"\frac{1}{2}", "0.5"), ("5", r"\boxed{9^{9^{9^{9}}}}"), ("x+1", r"\boxed{1+x}"), ("5", "6")]
    group = [episode(text, answer=gold) for gold, text in golds_and_texts]
    score(group, [Component("answer_match", partial(rules.answer_match, method="math_verify", timeout=3.0))], "x")
    half, tower, algebra, wrong = (e.reward for e in group)
    assert (half, algebra, wrong) == (1.0, 1.0, 0.0)
    assert math.isnan(tower) or tower == 0.0


def test_exact_asks_no_parser():
    assert rules.answer_match([episode("0.5", answer=r"\frac{1}{2}")]) == [0.0]


# --------------------------------------------------------------------------- format
def test_format_by_default_wants_the_answer_last():
    texts = [
        "2+3=5\n#### 5",
        "#### -1,000.5",
        r"so \boxed{x}.",
        "  #### 5 \n",
        "#### 5 it is",
        "5",
        "",
        "#### ",
        r"\boxed{}",
    ]
    assert rules.format([episode(text) for text in texts]) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_format_matches_all_of_the_completion():
    pattern = "<think>.*</think>.+"
    texts = ["<think>a\nb</think> 5", "<think></think>", "x<think></think>5"]
    assert rules.format([episode(text) for text in texts], pattern=pattern) == [1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="reward format: pattern '\\(' is no regular expression"):
        rules.format([episode("5")], pattern="(")


# --------------------------------------------------------------------------- lengths
def test_soft_overlong_by_hand():
    """L 20, c 4."""
    got = rules.soft_overlong(lengths(0, 16, 17, 18, 20, 21), limit=20, budget=4)
    np.testing.assert_allclose(got, [0.0, 0.0, -0.25, -0.5, -1.0, -1.0], rtol=0, atol=0)


def test_soft_overlong_takes_the_sampler_s_limit():
    assert rules.soft_overlong(lengths(18, max_new_tokens=20), budget=4) == [-0.5]
    with pytest.raises(DataError, match="soft_overlong: the episodes do not say"):
        rules.soft_overlong(lengths(18), budget=4)


@pytest.mark.parametrize("budget", [0, -1, 21])
def test_soft_overlong_refuses_a_budget_outside_the_limit(budget):
    with pytest.raises(ConfigError, match="budget has to be from 1 to the limit of 20 tokens"):
        rules.soft_overlong(lengths(18), limit=20, budget=budget)


def test_length():
    np.testing.assert_allclose(rules.length(lengths(0, 50)), [0.0, -0.5], rtol=0, atol=1e-12)
    np.testing.assert_allclose(rules.length(lengths(8, 13), target=10, scale=0.1), [-0.2, -0.3], rtol=0, atol=1e-12)


def test_constant_is_the_same_for_every_episode():
    assert rules.constant([episode("1"), episode("22")], value=5.0) == [5.0, 5.0]


# --------------------------------------------------------------------------- a reward that raises
def test_a_reward_that_raises_is_named_with_its_line_and_the_prompt(tmp_path, monkeypatch):
    """The line is that of the reward's file, also where a library raises."""
    (tmp_path / "a_reward.py").write_text(
        "import json\n\n\ndef score(episodes):\n    return [worth(e) for e in episodes]\n\n\n"
        "def worth(episode):\n    return json.loads(episode.completion)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = Component("score", importlib.import_module("a_reward").score)
    with pytest.raises(ConfigError) as caught:
        score([episode("five"), episode("six")], [reward], "stages.rl.reward")
    assert str(caught.value) == (
        "stages.rl.reward: reward 'score' raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) "
        "(a_reward.py line 9, on the prompt '2+3='); it raises on every episode"
    )


def dearer(episodes):
    """1 for each other episode of the group with fewer tokens; it fails on an episode without one."""
    return [sum(1 / e.num_tokens > 1 / other.num_tokens for other in episodes) for e in episodes]


def test_what_a_reward_raises_on_one_episode_is_that_episode_s_alone(capsys):
    """The others are paid as if it were not there, also by a reward that compares them; it is shown once."""
    for _ in range(2):
        group = lengths(3, 0, 1, 2)
        score(group, [Component("dearer", dearer), Component("length", rules.length)], "stages.rl.reward")
        assert [e.rewards["dearer"] for e in group] == [0.0, pytest.approx(math.nan, nan_ok=True), 2.0, 1.0]
        assert [math.isnan(e.reward) for e in group] == [False, True, False, False]
        assert math.isnan(group[1].paid[0])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "! stages.rl.reward: reward 'dearer' raised ZeroDivisionError: division by zero (test_rewards.py line "
    )
    assert first.endswith(", on the prompt '2+3='); such episodes are left out, and counted as failures")
    assert last == "ZeroDivisionError: division by zero"


def pairwise(episodes):
    """It compares two, and has no answer for more."""
    return [len(x.completion) // (len(episodes) < 3) for x in episodes]


def test_what_a_reward_raises_on_a_group_is_that_group_s(capsys):
    groups = [episode("1"), episode("22"), *(episode(text) for text in ("1", "22", "333"))]
    for e in groups[2:]:
        e.group = 1
    score(groups, [Component("pairwise", pairwise)], "x")
    assert [math.isnan(e.reward) for e in groups] == [False, False, True, True, True]
    assert capsys.readouterr().out.count("ZeroDivisionError") == 2


def test_a_failure_is_shown_with_its_cause_and_once(capsys):
    def number(episodes):
        try:
            return [float(e.completion) for e in episodes]
        except ValueError as error:
            raise LookupError("no number") from error

    score([episode("1"), episode("x")], [Component("number", number)], "causes")
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "Error: " in line and not line.startswith("!")] == [
        "ValueError: could not convert string to float: 'x'",
        "LookupError: no number",
    ]


def test_the_failure_of_a_reward_that_no_episode_alone_passes_is_the_group_s():
    """Two answers are compared, and one of them is no number."""

    def larger(episodes):
        first, second = (float(e.completion) for e in episodes)
        return [float(first > second), float(second > first)]

    with pytest.raises(ConfigError, match="raised ValueError: could not convert string to float: 'x'"):
        score([episode("1"), episode("x")], [Component("larger", larger)], "x")


def test_whether_a_reward_raises_on_all_is_decided_on_the_episodes_of_all_ranks(capsys):
    number = Component("number", lambda episodes: [float(e.completion) for e in episodes])
    shares = [[episode("1")], [episode("x")]]
    for share in shares:
        pay(share, [number], "x")
    both = pickle.loads(pickle.dumps([e for share in shares for e in share]))
    show(both, [number], "x")
    assert capsys.readouterr().out.startswith("! x: reward 'number' raised ValueError: could not convert string to float: 'x'")
    assert [e.info for e in both] == [{}, {}]
    with pytest.raises(ConfigError, match="raised ValueError"):
        show(shares[1], [number], "x")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried ..."), MemoryError()])
def test_a_lack_of_memory_is_no_episode_s(error):
    """Else the groups with long answers would be left out."""

    def hungry(episodes):
        if len(episodes) > 1:
            raise error
        return [0.0]

    with pytest.raises(Failed, match="x: reward 'hungry' ran out of memory on 2 episodes") as caught:
        score([episode("1"), episode("2")], [Component("hungry", hungry)], "x")
    assert caught.value.__cause__ is error


def test_a_long_prompt_is_shortened_and_a_wrong_answer_has_no_line():
    long = Episode(Task((Message("user", "1+" * 40),)), group=0)
    with pytest.raises(ConfigError) as caught:
        score([long], [Component("none", lambda episodes: None)], "stages.rl.reward")
    assert str(caught.value) == (
        "stages.rl.reward: reward 'none' raised TypeError: 'NoneType' object is not iterable (on the prompt "
        f"'{'1+' * 30}...'); it raises on every episode"
    )


# --------------------------------------------------------------------------- pay by turn
def three_turns(*paid: float) -> Episode:
    turns = [Turn(np.array([1]), np.array([2, 3]), np.zeros(2, np.float32), reward=x) for x in paid]
    return Episode(Task(()), 0, turns, Status.FINISHED)


def test_a_reward_may_pay_each_turn() -> None:
    episode = three_turns(1.0, 0.0, -2.0)
    by_env = Component("env", env, weight=0.5)
    total = Component("total", lambda episodes: [3.0 for _ in episodes], weight=2.0)
    score([episode], [by_env, total], "x")
    assert episode.rewards == {"env": -1.0, "total": 3.0}
    assert episode.paid == [0.5, 0.0, 5.0]
    assert episode.reward == sum(episode.paid) == 5.5


def test_the_pay_of_a_turn_may_be_one_number_for_each_step() -> None:
    episode = three_turns(9.0)
    episode.turns[0].token["reward"] = np.array([1.0, 2.0], np.float32)
    score([episode], [Component("env", env, weight=2.0)], "x")
    assert (episode.reward, episode.rewards["env"]) == (6.0, 3.0)
    assert np.asarray(episode.paid[0]).tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([[1.0, 2.0]], "x: reward 'mine' gave 2 numbers for an episode of 3 turns"),
        (
            [[1.0, float("inf"), 0.0]],
            "x: reward 'mine' gave inf; a finite number, or nan for 'could not be scored', is expected",
        ),
        ([1.0, 2.0], "x: reward 'mine' gave 2 numbers for 1 episodes; one each is expected"),
    ],
)
def test_pay_that_does_not_fit(said: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        score([three_turns(0.0, 0.0, 0.0)], [Component("mine", lambda episodes: said)], "x")
    assert str(error.value) == message


def test_a_turn_that_cannot_be_scored_leaves_the_episode_out() -> None:
    episode = three_turns(0.0, float("nan"))
    score([episode], [Component("env", env)], "x")
    assert np.isnan(episode.reward)
