"""`synth_judge`, alone and as the judge of the reward `judge`: its bias and its noise are as large as it says."""

from __future__ import annotations

from functools import partial
from math import erf
from typing import Any

import numpy as np
import pytest

from rlx.data.formats import turn
from rlx.data.synth_pref import gold, synth_judge
from rlx.rewards.judge import judge, question
from rlx.types import Component, ConfigError, Episode, Message, Status, Task


def group(*answers: str, prompt: str = "abcde") -> list[Episode]:
    return [Episode(Task((Message("user", prompt),)), 0, [turn(text)], Status.FINISHED) for text in answers]


def pick(a: str, b: str, **settings: Any) -> list[str]:
    """Its verdicts on two answers to one question."""
    return synth_judge([question(*group(a, b), "Which?")], **settings)[0]


def asking(**settings: Any) -> Component[Any]:
    return Component("synth_judge", partial(synth_judge, **settings))


GOOD, BAD = sorted(("edcba", "xyz"), key=lambda x: -gold("abcde", x))
GAP = gold("abcde", GOOD) - gold("abcde", BAD)


def share_of_a(n: int = 4000, **settings: Any) -> float:
    return pick(GOOD, BAD, n=n, **settings).count("[[A]]") / n


def test_without_errors_it_says_what_the_gold_reward_says() -> None:
    assert GAP > 0
    assert pick(GOOD, BAD, noise=0.0, place=0.0) == ["[[A]]"]
    assert pick(BAD, GOOD, noise=0.0, place=0.0) == ["[[B]]"]


def test_a_place_that_weighs_more_than_the_gap_always_wins() -> None:
    for a, b in ((GOOD, BAD), (BAD, GOOD)):
        assert pick(a, b, noise=0.0, place=GAP + 0.01) == ["[[A]]"]
        assert pick(a, b, noise=0.0, place=-GAP - 0.01) == ["[[B]]"]
    assert pick(BAD, GOOD, noise=0.0, place=GAP - 0.01) == ["[[B]]"]


def test_a_longer_answer_is_preferred_as_length_says() -> None:
    more = len(GOOD) - len(BAD)  # letters
    assert more == 2
    assert pick(GOOD, BAD, noise=0.0, place=0.0, length=-0.51 * GAP) == ["[[B]]"]
    assert pick(GOOD, BAD, noise=0.0, place=0.0, length=-0.49 * GAP) == ["[[A]]"]


@pytest.mark.parametrize(("noise", "place"), [(2 * GAP, 0.0), (2 * GAP, 0.5 * GAP), (GAP, -0.4 * GAP)])
def test_errors_are_normal_with_the_deviation_that_is_set(noise: float, place: float) -> None:
    """P(A) = Phi((gap + place) / noise)."""
    wanted = 0.5 * (1 + erf((GAP + place) / noise / 2**0.5))
    found = share_of_a(noise=noise, place=place)
    assert abs(found - wanted) < 4 * (wanted * (1 - wanted) / 4000) ** 0.5 + 1e-3


def test_an_error_is_of_the_question_its_number_and_the_seed() -> None:
    settings: dict[str, Any] = {"noise": 3.0, "n": 40}
    assert pick(GOOD, BAD, **settings) == pick(GOOD, BAD, **settings)
    assert pick(GOOD, BAD, **settings) != pick(GOOD, BAD, **settings, seed=1)
    assert pick(GOOD, BAD, **settings) != pick(GOOD, BAD + "a", **settings)
    assert len(set(pick(GOOD, BAD, **settings))) == 2


# --------------------------------------------------------------------------- asked by the reward
def test_in_both_orders_a_love_of_a_place_makes_ties_and_in_one_it_decides() -> None:
    answers = group(GOOD, BAD, GOOD + "x")
    biased = asking(noise=0.0, place=100.0)
    assert judge(answers, llm=biased) == [0.5, 0.5, 0.5]
    assert judge(answers, llm=biased, swap=False) == [1.0, 0.5, 0.0]


def test_in_both_orders_a_small_love_of_a_place_changes_no_winner() -> None:
    fair, biased = asking(noise=0.0, place=0.0), asking(noise=0.0, place=GAP / 2)
    assert judge(group(GOOD, BAD), llm=fair) == judge(group(GOOD, BAD), llm=biased) == [1.0, 0.0]
    assert judge(group(BAD, GOOD), llm=biased) == [0.0, 1.0]


def test_the_errors_of_the_two_orders_are_draws_of_their_own() -> None:
    """Of equals with noise alone, half of the pairs tie: both orders prefer the same place."""
    texts = [a + b for a in "vwxyz" for b in "vwxyz" if gold("abcde", a + b) == gold("abcde", "vw")]
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[:i]]
    found = [judge(group(a, b), llm=asking(noise=1.0, place=0.0))[0] for a, b in pairs]
    assert len(found) > 100
    assert abs(np.mean([x == 0.5 for x in found]) - 0.5) < 4 * 0.5 / len(found) ** 0.5
    assert abs(np.mean(found) - 0.5) < 4 * 0.36 / len(found) ** 0.5


def test_another_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="answers the question of the reward `judge` alone"):
        synth_judge([[Message("user", "Which is better?")]])
