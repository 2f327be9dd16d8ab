"""Questions with a gold answer, and the splits of a task that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlx.data.files import Rows, hub_rows, rows_of
from rlx.data.formats import Row, demonstration, turn
from rlx.types import ConfigError, DataError, Episode, Message, Task

Splits = dict[str, Callable[[], list[Episode]]]


@dataclass(frozen=True)
class Question:
    """A question, its gold answer, and a worked solution if there is one."""

    prompt: tuple[Message, ...]
    answer: str
    solution: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def ask(text: str, instruction: str | None) -> tuple[Message, ...]:
    """Return the prompt: one user message, the question and on the next line what to do."""
    return (Message("user", text if instruction is None else f"{text}\n{instruction}"),)


def splits(
    train: Callable[[], list[Question]], test: Callable[[], list[Question]], *, dev: int, limit: int | None = None
) -> Splits:
    """Return the splits demos, train, dev and test; `train` and `test` are called when a split is.

    `dev` is the last `dev` questions of the training data and in no other split. `demos` holds those of `train` that
    have a solution, with it. `limit` cuts every split.
    Calling a split raises ConfigError where `dev` leaves nothing to train on.
    """
    if dev < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"expected dev of at least 0 and limit of at least 1, got {dev} and {limit}")

    def parts() -> tuple[list[Question], list[Question]]:
        found = train()
        if dev >= len(found):
            raise ConfigError(f"task.dev: {dev} leaves nothing to train on; there are {len(found)} training questions")
        cut = len(found) - dev
        return found[:cut], found[cut:]

    return {
        "demos": lambda: _demonstrations(parts()[0][:limit]),
        "train": lambda: _questions(parts()[0][:limit]),
        "dev": lambda: _questions(parts()[1][:limit]),
        "test": lambda: _questions(test()[:limit]),
    }


def joined(first: Splits, second: Splits, name: str) -> list[Episode]:
    """Return split `name` of two tasks, one after the other, with groups numbered through."""
    left, right = first[name](), second[name]()
    offset = 1 + max((episode.group for episode in left), default=-1)
    for episode in right:
        episode.group += offset
    return left + right


def _questions(questions: list[Question]) -> list[Episode]:
    return [Episode(Task(q.prompt, q.answer, q.meta), group) for group, q in enumerate(questions)]


def _demonstrations(questions: list[Question]) -> list[Episode]:
    return [
        demonstration(Task(q.prompt, q.answer, q.meta), group, [turn(q.solution)])
        for group, q in enumerate(questions)
        if q.solution is not None
    ]


# --------------------------------------------------------------------------- rows
def split_rows(path: str, split: str, subset: str | None = None) -> Rows:
    """Yield a split's rows from a folder with SPLIT.jsonl, SPLIT.parquet or SPLIT.csv, or else from the hub.

    Raises ConfigError: no such folder, no such file in it, or nothing of that name on the hub.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        found = [folder / f"{split}{suffix}" for suffix in (".jsonl", ".parquet", ".csv")]
        file = next((str(file) for file in found if file.is_file()), None)
        if file is None:
            raise ConfigError(f"task.path: expected {split}.jsonl, {split}.parquet or {split}.csv in {path}, found none")
        return rows_of(file)(file)
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ConfigError(f"task.path: no such folder: {path}; give a folder, or a data set of the hub as OWNER/NAME")
    return hub_rows(path, split, subset)


def text_cell(row: Row, column: str, where: str) -> str:
    """Return the text in a column. Raises DataError: no such column, or something else than text in it."""
    if column not in row:
        raise DataError(f"{where}: no column '{column}'; found {', '.join(row)}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}, column '{column}': expected text that is not empty, got {value!r:.40}")
    return value
