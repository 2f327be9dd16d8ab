"""The synthetic preference task: the gold reward by hand, its pairs and labels, and splits that do not meet."""

from __future__ import annotations

import numpy as np
import pytest

from rlx.data.synth_pref import gold, gold_reward, synth_pref
from rlx.types import ConfigError, Episode


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
