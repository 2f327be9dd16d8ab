"""Chains of letters: the rule, the demonstrators' chances, and that an answer is right as a whole or not at all."""

from __future__ import annotations

import pytest

from rlx.data.chain import letter_chain
from rlx.types import ConfigError, Episode, Message, Status, Task, Turn


def said(task: Task, text: str) -> Episode:
    import numpy as np

    none = np.zeros(0, np.int64)
    return Episode(task, 0, [Turn(none, none, np.zeros(0, np.float32), Message("assistant", text))], Status.FINISHED)


def text(episode: Episode) -> str:
    return episode.task.prompt[0].text + episode.completion


def test_each_letter_is_five_places_after_the_one_before() -> None:
    tests = letter_chain().splits["test"]()
    assert [e.task.prompt[0].text for e in tests] == list("abcdefghijkl")
    assert tests[0].task.answer == "fkdibglejcha"
    assert letter_chain(letters=4, stride=1, length=3).splits["test"]()[2].task.answer == "dab"


def test_only_a_whole_chain_is_right() -> None:
    source = letter_chain(length=3)
    task = source.splits["test"]()[0].task
    assert source.verifier([said(task, x) for x in ("fkd", "fk", "fkdi", "fkc", "")]) == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("split", "noise"), [("demos", 0.7), ("guide_demos", 0.25)])
def test_a_letter_of_a_demonstration_follows_as_often_as_its_noise_says(split: str, noise: float) -> None:
    """12 x 4096 letters: 1 - noise + noise / 12 of them follow, within 4 standard deviations."""
    rows = letter_chain().splits[split]()
    steps = [(a, b) for e in rows for a, b in zip(text(e), text(e)[1:], strict=False)]
    follows = sum((ord(b) - ord(a) - 5) % 12 == 0 for a, b in steps) / len(steps)
    share = 1 - noise + noise / 12
    assert abs(follows - share) < 4 * (share * (1 - share) / len(steps)) ** 0.5
    assert {len(e.completion) for e in rows} == {12}
    right = sum(e.completion == e.task.answer for e in rows) / len(rows)
    assert abs(right - share**12) < 4 * (share**12 * (1 - share**12) / len(rows)) ** 0.5 + 1e-4


def test_it_is_a_function_of_its_settings() -> None:
    def all_of(seed: int) -> list[str]:
        source = letter_chain(demos=20, train=20, data_seed=seed)
        return [text(e) for split in source.splits.values() for e in split()]

    assert all_of(0) == all_of(0) != all_of(1)


@pytest.mark.parametrize("wrong", [{"letters": 1}, {"letters": 27}, {"stride": 12}, {"noise": 1.5}, {"length": 0}])
def test_a_setting_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="letter_chain: "):
        letter_chain(**wrong)  # type: ignore[arg-type]
