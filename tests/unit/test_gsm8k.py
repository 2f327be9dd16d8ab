"""GSM8K and competition mathematics: rows -> questions, and splits that share nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlx.data.gsm8k import gsm8k, gsm8k_question
from rlx.data.mathematics import dapo_math, dapo_question, gsm8k_math, last_boxed, math, math_question
from rlx.types import ConfigError, DataError, Episode, Message

CLIPS = {
    "question": "How many clips?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 1,000+24 = <<1000+24=1024>>1,024.\n#### 1,024",
}


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def grade_school(folder: Path, train: int = 5, test: int = 2) -> str:
    for split, count in (("train", train), ("test", test)):
        write(folder, split, [{"question": f"{split} {i}?", "answer": f"So {i}.\n#### {i}"} for i in range(count)])
    return str(folder)


def competition(folder: Path, train: int = 5, test: int = 2) -> str:
    for split, count in (("train", train), ("test", test)):
        rows = [{"problem": f"{split} x={i}?", "solution": f"So \\boxed{{{i}}}.", "level": "1"} for i in range(count)]
        write(folder, split, rows)
    return str(folder)


def asked(episodes: list[Episode]) -> list[str]:
    return [episode.task.prompt[0].content for episode in episodes]


# --------------------------------------------------------------------------- GSM8K
def test_row_loses_annotations_and_commas() -> None:
    question = gsm8k_question(CLIPS, "here", "Do it.")
    assert question.prompt == (Message("user", "How many clips?\nDo it."),)
    assert question.answer == "1024"
    assert question.solution == "She sold 48/2 = 24 clips.\nIn all 1,000+24 = 1,024.\n#### 1,024"
    assert gsm8k_question(CLIPS, "here", None).prompt[0].content == "How many clips?"


def test_splits_of_a_folder(tmp_path: Path) -> None:
    task = gsm8k(path=grade_school(tmp_path), dev=2, instruction=None)
    splits = {name: split() for name, split in task.splits.items()}
    assert {name: asked(episodes) for name, episodes in splits.items()} == {
        "demos": ["train 0?", "train 1?", "train 2?"],
        "train": ["train 0?", "train 1?", "train 2?"],
        "dev": ["train 3?", "train 4?"],
        "test": ["test 0?", "test 1?"],
    }
    assert [demo.completion for demo in splits["demos"]] == [f"So {i}.\n#### {i}" for i in range(3)]
    assert all(not episode.turns for name in ("train", "dev", "test") for episode in splits[name])
    assert [episode.task.answer for episode in splits["dev"]] == ["3", "4"]
    assert [episode.group for episode in splits["train"]] == [0, 1, 2]
    assert task.verifier(splits["demos"]) == [1.0, 1.0, 1.0]


def test_limit_cuts_every_split(tmp_path: Path) -> None:
    splits = gsm8k(path=grade_school(tmp_path), dev=2, limit=1).splits
    assert [len(split()) for split in splits.values()] == [1, 1, 1, 1]


def test_default_instruction_asks_for_the_form_of_the_solutions(tmp_path: Path) -> None:
    (first, *_) = gsm8k(path=grade_school(tmp_path), dev=0).splits["train"]()
    assert asked([first]) == ["train 0?\nSolve the problem step by step and end with '#### ' and the number."]


def test_nothing_is_read_before_a_split_is_called(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    task = gsm8k(path=str(tmp_path / "data"), dev=1)
    grade_school(tmp_path / "data")
    assert len(task.splits["train"]()) == 4


def test_parquet_folder(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.table({name: [value] for name, value in CLIPS.items()}), tmp_path / "test.parquet")
    (episode,) = gsm8k(path=str(tmp_path)).splits["test"]()
    assert episode.task.answer == "1024"


def test_data_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        gsm8k(path=str(tmp_path)).splits["test"]()
    expected = f"task.path: expected test.jsonl, test.parquet or test.csv in {tmp_path}, found none"
    assert str(caught.value) == expected
    with pytest.raises(ConfigError) as caught:
        gsm8k(path="./nowhere").splits["test"]()
    expected = "task.path: no such folder: ./nowhere; give a folder, or a data set of the hub as OWNER/NAME"
    assert str(caught.value) == expected


def test_dev_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        gsm8k(path=grade_school(tmp_path), dev=5).splits["train"]()
    assert str(caught.value) == "task.dev: 5 leaves nothing to train on; there are 5 training questions"
    with pytest.raises(ConfigError) as caught:
        gsm8k(dev=-1)
    assert str(caught.value) == "expected dev of at least 0 and limit of at least 1, got -1 and None"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?"}, ": no column 'answer'; found question"),
        ({"question": "a?", "answer": 4}, ", column 'answer': expected text that is not empty, got 4"),
        (
            {"question": "a?", "answer": "It is 4."},
            ", column 'answer': expected a solution that ends in '#### ' and a number, found none",
        ),
    ],
)
def test_row_that_does_not_fit(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path, "test", [CLIPS, row])
    with pytest.raises(DataError) as caught:
        gsm8k(path=str(tmp_path)).splits["test"]()
    assert str(caught.value) == f"{tmp_path / 'test.jsonl'} line 2{message}"


# --------------------------------------------------------------------------- MATH, both, DAPO
@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"First \boxed{1}, then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"Thus \fbox{7}.", "7"),
        (r"Thus $\boxed 9$.", "9"),
        ("none", None),
    ],
)
def test_last_boxed(solution: str, answer: str | None) -> None:
    assert last_boxed(solution) == answer


def test_math_row() -> None:
    row = {"problem": "x?", "solution": r"So $\boxed{2}$.", "level": "Level 5", "type": "Algebra"}
    question = math_question(row, "here", "Box it.")
    assert question.prompt == (Message("user", "x?\nBox it."),)
    assert (question.answer, question.solution) == ("2", r"So $\boxed{2}$.")
    assert question.meta == {"level": "Level 5", "type": "Algebra"}
    with pytest.raises(DataError) as caught:
        math_question(row | {"solution": "So 2."}, "here", None)
    assert str(caught.value) == r"here, column 'solution': expected a solution with \boxed{...}, found none"


def test_math_splits(tmp_path: Path) -> None:
    splits = math(path=competition(tmp_path), dev=1).splits
    assert [len(split()) for split in splits.values()] == [4, 4, 1, 2]


def test_gsm8k_and_math_are_one_task(tmp_path: Path) -> None:
    first, second = grade_school(tmp_path / "g"), competition(tmp_path / "m")
    splits = gsm8k_math(gsm8k_path=first, math_path=second, dev=3, instruction=None).splits
    assert list(splits) == ["train", "dev", "test", "test_gsm8k", "test_math"]
    assert asked(splits["dev"]()) == ["train 4?", "train x=3?", "train x=4?"]
    assert [episode.group for episode in splits["train"]()] == list(range(7))
    assert asked(splits["test"]()) == asked(splits["test_gsm8k"]()) + asked(splits["test_math"]())


def dapo_row(text: str, answer: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": answer, "style": "rule"}}


def test_dapo_row() -> None:
    question = dapo_question(dapo_row("Solve: x?", "34"), "here")
    assert (question.prompt, question.answer, question.solution) == ((Message("user", "Solve: x?"),), "34", None)
    with pytest.raises(DataError) as caught:
        dapo_question({"prompt": "x?"}, "here")
    assert str(caught.value) == "here, column 'prompt': expected a list of messages, got 'x?'"
    with pytest.raises(DataError) as caught:
        dapo_question(dapo_row("x?", "1") | {"reward_model": None}, "here")
    assert str(caught.value) == "here, column 'reward_model': expected {ground_truth: TEXT}, got None"


def test_dapo_keeps_each_prompt_once_and_has_no_demos(tmp_path: Path) -> None:
    write(tmp_path / "d", "train", [dapo_row(text, text) for text in ("a", "b", "a", "c", "b", "a")])
    write(tmp_path / "t", "train", [dapo_row("z", "26")] * 3)
    splits = dapo_math(path=str(tmp_path / "d"), test_path=str(tmp_path / "t"), dev=1).splits
    assert {name: asked(split()) for name, split in splits.items()} == {
        "train": ["a", "b"],
        "dev": ["c"],
        "test": ["z"],
    }
