"""Addition: the splits do not leak, the demonstrator errs as often as told and only by dropping carries."""

from __future__ import annotations

import pytest

from rlx.data.arithmetic import arithmetic, check_disjoint, drop_carries
from rlx.data.formats import demonstration, turn
from rlx.types import ConfigError, Episode


def operands(episodes: list[Episode]) -> list[tuple[int, int]]:
    texts = [episode.task.prompt[0].content for episode in episodes]
    return [(int(a), int(b)) for a, b in (text.removesuffix("=").split("+") for text in texts)]


def unordered(episodes: list[Episode]) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in operands(episodes)}


def texts(episodes: list[Episode]) -> list[tuple[str, str]]:
    return [(episode.task.prompt[0].content, episode.completion) for episode in episodes]


@pytest.mark.parametrize(
    ("a", "b", "written"),
    [
        (57, 68, 115),  # 7+8=15 -> 5; 5+6=11 in full
        (68, 57, 115),
        (7, 68, 65),
        (55, 45, 90),
        (5, 95, 90),
        (7, 8, 15),  # the leading column is written in full
        (60, 70, 130),
        (12, 34, 46),
        (999, 1, 990),
        (567, 678, 1135),  # 7+8 -> 5; 6+7 -> 3; 5+6 = 11
        (0, 0, 0),
    ],
)
def test_dropped_carries_by_hand(a: int, b: int, written: int) -> None:
    assert drop_carries(a, b) == written


def test_sizes_and_no_leak() -> None:
    splits = {name: split() for name, split in arithmetic(digits=2, dev=200, test=500).splits.items()}
    assert list(splits) == ["demos", "train", "dev", "test"]
    pairs = {name: unordered(splits[name]) for name in ("train", "dev", "test")}
    assert [len(pairs[name]) for name in pairs] == [4350, 200, 500]
    assert [len(splits[name]) for name in ("dev", "test")] == [200, 500]
    assert not pairs["train"] & pairs["dev"]
    assert not pairs["train"] & pairs["test"]
    assert not pairs["dev"] & pairs["test"]
    assert len(pairs["train"] | pairs["dev"] | pairs["test"]) == 100 * 101 // 2
    train = operands(splits["train"])
    assert len(set(train)) == len(train)
    assert {(b, a) for a, b in train} == set(train)


def test_questions_and_answers() -> None:
    task = arithmetic(digits=2)
    for episode, (a, b) in zip(task.splits["test"](), operands(task.splits["test"]()), strict=True):
        assert episode.task.answer == str(a + b)
        assert episode.task.meta == {"carry": a % 10 + b % 10 >= 10 and max(a, b) >= 10}
        assert not episode.turns
    assert [episode.group for episode in task.splits["dev"]()] == list(range(200))
    assert task.max_new_tokens == 6


def test_demonstrations_are_right_without_errors_and_the_verifier_says_so() -> None:
    task = arithmetic(digits=2, demos=50)
    demos = task.splits["demos"]()
    assert operands(demos) == operands(task.splits["train"]())[:50]
    assert all(demo.completion == demo.task.answer and demo.label == 1 for demo in demos)
    assert task.verifier(demos) == [1.0] * 50


def test_demonstrator_errs_at_the_given_rate_where_there_is_a_carry() -> None:
    task = arithmetic(digits=2, error_rate=0.3)
    demos = task.splits["demos"]()
    carry = [demo for demo in demos if demo.task.meta["carry"]]
    wrong = [demo for demo in demos if not demo.task.meta["correct"]]
    assert len(demos) == len(task.splits["train"]())
    assert all(demo.task.meta["carry"] for demo in wrong)
    assert len(wrong) / len(carry) == pytest.approx(0.3, abs=0.02)  # about 3 700 with a carry: 0.0075 a deviation
    assert task.verifier(wrong[:20]) == [0.0] * 20
    assert [demo.completion for demo in wrong] == [str(drop_carries(a, b)) for a, b in operands(wrong)]


def test_demonstrator_that_always_errs() -> None:
    demos = arithmetic(digits=2, error_rate=1.0).splits["demos"]()
    assert all(demo.task.meta["correct"] != demo.task.meta["carry"] for demo in demos)


def test_same_settings_same_data_and_the_limit_changes_no_error() -> None:
    every = arithmetic(error_rate=0.5, data_seed=3).splits
    again = arithmetic(error_rate=0.5, data_seed=3, demos=100).splits
    other = arithmetic(error_rate=0.5, data_seed=4).splits
    assert texts(every["demos"]())[:100] == texts(again["demos"]())
    assert texts(every["test"]()) == texts(again["test"]())
    assert texts(every["test"]()) != texts(other["test"]())
    assert every["train"]()[0] is not every["train"]()[0]


def test_longer_sums_are_drawn_and_distinct() -> None:
    splits = arithmetic(digits=3).splits  # 10 000 of 500 500 pairs: about 100 would be drawn twice
    train, test = splits["train"](), splits["test"]()
    assert (len(unordered(train)), len(unordered(test))) == (9_300, 500)
    assert not unordered(train) & unordered(test)
    assert max(max(pair) for pair in operands(train)) > 990


def test_overlap_of_splits_is_an_error_in_either_order() -> None:
    with pytest.raises(AssertionError, match=r"^2\+1 stands in train and in test$"):
        check_disjoint({"train": [(1, 2)], "test": [(3, 4), (2, 1)]})


def test_verifier_wants_the_number_and_nothing_else() -> None:
    task = arithmetic()
    question = task.splits["test"]()[0].task
    said = [f"{question.answer}", f"1+{question.answer}", f"{question.answer} {question.answer}"]
    assert task.verifier([demonstration(question, 0, [turn(text)]) for text in said]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digits": 0}, "digits: expected 1 to 9, got 0"),
        ({"error_rate": 1.5}, "error_rate: expected a probability from 0 to 1, got 1.5"),
        (
            {"digits": 1, "error_rate": 0.5},
            "error_rate: sums of one digit have no carry to drop; set task.digits to 2 or more",
        ),
        ({"demos": 0}, "expected dev and test of at least 0 and demos of at least 1, got 200, 500, 0"),
        (
            {"digits": 1},
            "dev 200 and test 500 leave nothing to train on: there are 55 unordered pairs of "
            "1-digit numbers; lower task.dev and task.test or raise task.digits",
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arithmetic(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message
