"""A judge of two answers: what it is asked, how its verdicts are read, and that its love of a place does not count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from rlx.data.formats import turn
from rlx.llm.rules import rules
from rlx.rewards.judge import judge, preference, question, verdict, win_rates
from rlx.types import Component, ConfigError, Episode, Message, Status, Task


def group(*answers: str, prompt: str = "Say b.") -> list[Episode]:
    task = Task((Message("user", prompt),))
    return [Episode(task, 0, [turn(text)], Status.FINISHED) for text in answers]


class Judge:
    """Prefers what `better` says, and with `always` a place instead; counts what it is asked."""

    def __init__(self, always: str = "") -> None:
        self.always = always
        self.asked: list[str] = []

    def __call__(self, conversations: Sequence[Sequence[Message]], **_: Any) -> list[list[str]]:
        self.asked += [talk[-1].text for talk in conversations]
        return [[self.always or self.say(talk[-1].text)] for talk in conversations]

    def say(self, text: str) -> str:
        first, second = (text.split(f"[The start of answer {x}]\n")[1].split("\n[The end")[0] for x in "AB")
        return "[[A]]" if first > second else "[[B]]" if first < second else "[[C]]"


def asking(backend: Any) -> Component[Any]:
    return Component("mine", backend)


@pytest.mark.parametrize(
    ("text", "value"), [("so [[A]]", 1.0), ("[[B]]", 0.0), ("[[ C ]]", 0.5), ("[[A]] is bad: [[B]]", 0.0), ("A wins", math.nan)]
)
def test_the_last_verdict_counts(text: str, value: float) -> None:
    assert verdict(text) == pytest.approx(value, nan_ok=True)


def test_preference_averages_both_orders() -> None:
    assert preference(1.0, 0.0) == 1.0
    assert preference(1.0, 1.0) == 0.5
    assert preference(0.5, 0.0) == 0.75
    assert math.isnan(preference(1.0, math.nan))
    assert preference(1.0) == 1.0


def test_win_rates_by_hand() -> None:
    assert win_rates(3, {(0, 1): 1.0, (0, 2): 0.5, (1, 2): 0.0}) == [0.75, 0.0, 0.75]
    assert win_rates(3, {(0, 1): math.nan, (0, 2): 1.0, (1, 2): 0.0}) == [1.0, 0.0, 0.5]
    assert math.isnan(win_rates(1, {})[0])


def test_each_pair_is_shown_in_both_orders() -> None:
    backend = Judge()
    assert judge(group("a", "c", "b"), llm=asking(backend)) == [0.0, 1.0, 0.5]
    assert len(backend.asked) == 6


@pytest.mark.parametrize("place", ["[[A]]", "[[B]]"])
def test_a_judge_that_prefers_a_place_makes_ties_only(place: str) -> None:
    assert judge(group("a", "b"), llm=asking(Judge(place))) == [0.5, 0.5]
    assert judge(group("a", "b"), llm=asking(Judge(place)), swap=False) == ([1.0, 0.0] if place == "[[A]]" else [0.0, 1.0])


def test_equal_answers_tie_and_are_not_asked_about() -> None:
    backend = Judge("[[A]]")
    assert judge(group("a", "a"), llm=asking(backend)) == [0.5, 0.5]
    assert backend.asked == []


def test_what_could_not_be_read_is_not_scored() -> None:
    found = judge(group("a", "b"), llm=asking(partial(rules, answers={}, otherwise="hm")))
    assert all(math.isnan(x) for x in found)


def test_the_question_shows_the_conversation_and_fills_nothing_in_twice() -> None:
    one, other = group("{second}", "b", prompt="what is {first}?")
    (asked,) = question(one, other, "Which?", "{criterion} {prompt} 1: {first} 2: {second}")
    assert asked == Message("user", "Which? what is {first}? 1: {second} 2: b")
    several = Episode(Task((Message("system", "s"), Message("user", "u"))), 0, [turn("x", [Message("user", "y")]), turn("z")])
    (asked,) = question(several, other, "", "{prompt}|{first}")
    assert asked.text == "system: s\n\nuser: u|assistant: x\n\nuser: y\n\nassistant: z"


def test_a_prompt_has_to_show_both_answers() -> None:
    with pytest.raises(ConfigError, match=r"it has no \{second\}"):
        judge(group("a", "b"), llm=asking(Judge()), prompt="{first}")
