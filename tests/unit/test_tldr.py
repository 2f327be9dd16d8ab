"""The task of summaries: prompts alone to play, no verifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlx.data.tldr import tldr
from rlx.types import ConfigError, Message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"{split} {i} TL;DR:", "completion": f" summary {i}"} for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_its_splits(folder: Path) -> None:
    splits = tldr(path=str(folder), dev=3, test=2).splits
    found = {name: [(e.task.prompt[0].content, e.completion) for e in read()] for name, read in splits.items()}
    assert found == {
        "demos": [(f"train {i} TL;DR:", f" summary {i}") for i in range(4)],
        "train": [(f"train {i} TL;DR:", "") for i in range(4)],
        "dev": [(f"validation {i} TL;DR:", "") for i in range(3)],
        "test": [(f"test {i} TL;DR:", "") for i in range(2)],
    }
    assert splits["train"]()[1].task.prompt == (Message("user", "train 1 TL;DR:"),)


def test_limit_cuts_every_split(folder: Path) -> None:
    assert [len(read()) for read in tldr(path=str(folder), limit=1).splits.values()] == [1, 1, 1, 1]


def test_sizes_below_one() -> None:
    with pytest.raises(ConfigError, match=r"^expected dev, test and limit of at least 1, got 200, 0 and None$"):
        tldr(test=0)


def test_it_cannot_say_what_is_right(folder: Path) -> None:
    task = tldr(path=str(folder))
    with pytest.raises(ConfigError) as caught:
        task.verifier(task.splits["dev"]())
    assert str(caught.value) == (
        "task tldr has no verifier: give `eval`, or a stage that evaluates, verifier: {name: reward_model, path: ...}"
    )
