"""visual: questions about pictures from files, as paths and as bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as pillow

from rlx.data.questions import split_rows
from rlx.data.visual import questions, visual
from rlx.types import DataError, Image, Message

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training rows and a test row about one picture."""
    pillow.fromarray(PIXELS).save(tmp_path / "a.png")
    row = {"problem": "How many?", "answer": "2", "image": "a.png", "keywords": ["red circle"], "solution": "It is 2"}
    bare = {k: row[k] for k in ("problem", "answer")} | {"image": ["a.png"]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, row, bare)))
    (tmp_path / "test.jsonl").write_text(json.dumps(bare) + "\n")
    return tmp_path


def test_rows_become_prompts_with_a_picture(folder: Path) -> None:
    source = visual(path=str(folder), dev=1, instruction="Look.", columns={"question": "problem"})
    train, demos, test = (source.splits[name]() for name in ("train", "demos", "test"))
    assert [len(train), len(demos), len(test)] == [2, 2, 1]
    (message,) = train[0].task.prompt
    assert isinstance(message.content, tuple)
    before, picture, question = message.content
    assert (before, question) == ("Look.\n", "How many?")
    assert isinstance(picture, Image)
    np.testing.assert_array_equal(picture.pixels, PIXELS)
    assert (train[0].task.answer, dict(train[0].task.meta)) == ("2", {"keywords": ["red circle"]})
    assert demos[0].turns[0].said == Message("assistant", "It is 2")
    assert dict(test[0].task.meta) == {}


def test_pictures_as_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    pillow.fromarray(PIXELS).save(stream, "png")
    cells: list[Any] = [{"bytes": stream.getvalue(), "path": None}, pillow.fromarray(PIXELS), {"bytes": None, "path": "a.png"}]
    rows = [(f"row {i}", {"question": "?", "answer": "1", "image": cell}) for i, cell in enumerate(cells)]
    monkeypatch.setattr("rlx.data.visual.split_rows", lambda path, split: iter(rows))
    for made in questions(str(folder), "train", instruction=None, columns={}):
        np.testing.assert_array_equal(made.prompt[0].images[0].pixels, PIXELS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "answer": "1"}, "line 1: no column 'image'; found question, answer"),
        (
            {"question": "?", "answer": "1", "image": "b.png"},
            "column 'image': expected an image or the path of one, got 'b.png'",
        ),
        ({"question": "?", "answer": "1", "image": None}, "expected an image or the path of one, got None"),
    ],
)
def test_rows_that_do_not_fit(folder: Path, row: dict[str, Any], message: str) -> None:
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert list(split_rows(str(folder), "train"))
    with pytest.raises(DataError) as caught:
        questions(str(folder), "train", instruction=None, columns={})
    assert message in str(caught.value)
