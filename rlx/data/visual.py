"""Questions about pictures in files or on the hub: a picture, a question, its answer, and what the picture shows."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlx.data.formats import Row
from rlx.data.questions import Question, split_rows, splits, text_cell
from rlx.envs.single import SingleTurn
from rlx.rewards.rules import answer_match
from rlx.types import DataError, Image, Message, TaskSource


def visual(
    *,
    path: str,
    dev: int = 200,
    limit: int | None = None,
    instruction: str | None = None,
    after: str | None = None,
    columns: dict[str, str] | None = None,
    test_split: str = "test",
) -> TaskSource:
    """Questions about a picture each, from a folder with train and test files or from the hub.

    Columns: `question`, `answer`, `image` (the path of a file in the folder, or an image as Parquet and the hub hold them; of
    a list the first), and where there are any `keywords` (a list of what the picture shows) and `solution` (a worked answer:
    the split `demos`); `columns` maps these names to the file's. The prompt is `instruction`, the picture and the question.
    `dev` is the end of the training file, in no other split; `limit` cuts every split. The answer is compared as text, as
    number and as mathematics; after the heading `after`, where it is given.

    Pictures are decoded when a split is read, and stay in memory. Needs Pillow. Raises ConfigError: no such data. DataError:
    a row that does not fit.
    """
    load = partial(questions, path, instruction=instruction, columns=columns or {})
    return TaskSource(
        splits(partial(load, "train"), partial(load, test_split), dev=dev, limit=limit),
        verifier=partial(answer_match, extract="whole" if after else "auto", method="math_verify", after=after),
        make_env=SingleTurn,
        max_new_tokens=2048,
    )


def questions(path: str, split: str, *, instruction: str | None, columns: Mapping[str, str]) -> list[Question]:
    """The rows of a split."""
    names = {name: columns.get(name, name) for name in ("question", "answer", "image", "keywords", "solution")}
    made = []
    for where, row in split_rows(path, split):
        picture = image_cell(row, names["image"], where, Path(path).expanduser())
        question = text_cell(row, names["question"], where)
        keywords, solution = row.get(names["keywords"]), row.get(names["solution"])
        content = (*((f"{instruction}\n",) if instruction else ()), picture, question)
        meta = {"keywords": [str(word) for word in keywords]} if keywords is not None else {}
        made.append(Question((Message("user", content),), text_cell(row, names["answer"], where), solution, meta))
    return made


def image_cell(row: Row, column: str, where: str, folder: Path) -> Image:
    """The picture in a column. Raises DataError: no such column, or nothing that Pillow can read in it."""
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    if column not in row:
        raise DataError(f"{where}: no column '{column}'; found {', '.join(row)}")
    value: Any = row[column]
    value = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(value, Mapping):  # as Parquet files hold an image
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
    try:
        opened = value if isinstance(value, pillow.Image) else pillow.open(folder / value if isinstance(value, str) else value)
        return Image(np.asarray(opened.convert("RGB")))
    except (OSError, UnidentifiedImageError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{where}, column '{column}': expected an image or the path of one, got {value!r:.60}") from error
