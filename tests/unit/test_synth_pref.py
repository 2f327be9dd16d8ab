"""The synthetic preference task: the gold reward by hand, its pairs and labels, splits that do not meet, and its judge."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from rlx.data.formats import turn
from rlx.data.synth_pref import gold, gold_reward, synth_judge, synth_pref
from rlx.rewards.judge import judge, question
from rlx.types import Component, ConfigError, Episode, Message, Status, Task


def asked(rows: list[Episode]) -> set[str]:
    return {row.task.prompt[0].text for row in rows}


@pytest.mark.parametrize(
    ("said", "expected"),
    [("", 0.0), ("abc", 0.75), ("abx", 0.0), ("xyz", -1.5), ("a" * 8, 2.0), ("a" * 10, 1.5), ("a" * 14, 0.5), (" a b ", 0.5)],
)
def test_gold_values(said: str, expected: float) -> None:
    assert gold("abc", said) == pytest.approx(expected)


def test_the_task_pays_the_gold_reward() -> None:
    rows = synth_pref().splits["demos"]()
    assert gold_reward(rows) == [gold(r.task.prompt[0].text, r.completion) for r in rows]
    assert synth_pref().verifier is gold_reward


def test_pairs_are_two_answers_to_a_prompt_of_a_group_of_their_own() -> None:
    rows = synth_pref(pairs=50).splits["pairs"]()
    assert len(rows) == 100
    for group, (chosen, rejected) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert (chosen.group, rejected.group) == (group, group)
        assert (chosen.label, rejected.label) == (1.0, -1.0)
        assert chosen.task is rejected.task
        gap = gold_reward([chosen])[0] - gold_reward([rejected])[0]
        assert gap == pytest.approx(chosen.task.meta["gold_margin"])
        assert gap != 0
    assert [r.completion for r in synth_pref(pairs=50).splits["chosen"]()] == [r.completion for r in rows[::2]]


def test_labels_follow_bradley_terry_and_flips() -> None:
    def right(**settings: float) -> tuple[float, float]:
        margins = [r.task.meta["gold_margin"] for r in synth_pref(pairs=4000, **settings).splits["pairs"]()[::2]]  # type: ignore[arg-type]
        sizes = np.abs(margins)
        noise = settings.get("noise", 0.5)
        return float(np.mean(np.array(margins) > 0)), float(np.mean(1 / (1 + np.exp(-sizes / noise)))) if noise else 1.0

    assert right(noise=0.0) == (1.0, 1.0)
    share, expected = right(noise=0.8)
    assert share == pytest.approx(expected, abs=0.025)  # 3 standard deviations of 4000 labels
    assert right(noise=0.0, flip=0.3)[0] == pytest.approx(0.7, abs=0.022)
    assert min(r.task.meta["gold_margin"] for r in synth_pref(noise=5.0).splits["test_pairs"]()) > 0


def test_splits_share_no_prompt_and_depend_on_the_seed_alone() -> None:
    splits = synth_pref().splits
    train, dev, test = (asked(splits[name]()) for name in ("train", "dev", "test"))
    assert [train & dev, train & test, dev & test] == [set()] * 3
    assert asked(splits["pairs"]()) | asked(splits["demos"]()) <= train
    assert asked(splits["test_pairs"]()) <= test
    again, other = synth_pref().splits, synth_pref(data_seed=1).splits
    assert [r.completion for r in splits["demos"]()] == [r.completion for r in again["demos"]()]
    assert [r.completion for r in splits["demos"]()] != [r.completion for r in other["demos"]()]


@pytest.mark.parametrize("settings", [{"pairs": 0}, {"noise": -1.0}, {"flip": 1.5}, {"test": 1000}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"expected|leave nothing"):
        synth_pref(**settings)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- the judge
def answers(*words: str) -> list[Episode]:
    return [Episode(Task((Message("user", "abc"),)), 0, [turn(word)], Status.FINISHED) for word in words]


def asks(first: str, second: str, **settings: float) -> list[str]:
    return synth_judge([question(*answers(first, second), "Which is better?")], **settings)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "settings", "says"),
    [
        ("ab", "a", {}, "[[A]]"),  # 0.5 against 0.25
        ("a", "ab", {}, "[[B]]"),
        ("a", "ab", {"place": 0.3}, "[[A]]"),  # worse by 0.25, read first
        ("a", "abc", {"place": 0.3}, "[[B]]"),  # worse by 0.5
        ("abx", "a", {"length": 0.1}, "[[B]]"),  # 0 against 0.25: two letters more make up for 0.2
        ("abx", "a", {"length": 0.2}, "[[A]]"),
    ],
)
def test_the_judge_by_hand(first: str, second: str, settings: dict[str, float], says: str) -> None:
    assert asks(first, second, **{"noise": 0.0, "place": 0.0, **settings}) == [says]


def test_its_errors_are_normal_and_differ_between_the_votes_and_seeds_alone() -> None:
    votes = asks("a", "ab", place=0.0, noise=0.25, n=4000)  # type: ignore[arg-type]
    share = votes.count("[[A]]") / 4000
    assert share == pytest.approx(0.1587, abs=0.018)  # one standard deviation from even; 3 of 4000 votes
    assert asks("a", "ab", place=0.0, noise=0.25, n=4000) == votes  # type: ignore[arg-type]
    assert asks("a", "ab", place=0.0, noise=0.25, n=4000, seed=1) != votes  # type: ignore[arg-type]


def test_asked_in_both_orders_its_love_of_a_place_makes_ties_and_no_wrong_label() -> None:
    llm = Component("mine", partial(synth_judge, noise=0.0, place=0.6))
    near, far = answers("a", "abc"), answers("a", "abcabc")
    assert judge(near, llm=llm) == [0.5, 0.5]
    assert judge(near, llm=llm, swap=False) == [1.0, 0.0]
    assert judge(far, llm=llm) == judge(far, llm=llm, swap=False) == [0.0, 1.0]


def test_the_judge_answers_its_own_question_alone() -> None:
    with pytest.raises(ConfigError, match="the question of the reward `judge` alone"):
        synth_judge([[Message("user", "Which is better?")]])
