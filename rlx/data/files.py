"""Data sets in files and on the hub (catalogue group `data`), and the task made of the user's own files."""

from __future__ import annotations

import csv as csv_module
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from rlx.data.formats import Row, placed_episodes
from rlx.envs.single import SingleTurn
from rlx.rewards.rules import answer_match
from rlx.types import ConfigError, DataError, Episode, TaskSource

Rows = Iterator[tuple[str, Row]]  # each row with its place, such as "train.jsonl line 17"


# --------------------------------------------------------------------------- catalogue group `data`
def jsonl(*, path: str, columns: dict[str, str] | None = None, limit: int | None = None) -> list[Episode]:
    """Read a file with one JSON object a line; empty lines are skipped.

    `columns` maps a standard name to the file's column (see rlx.data.formats), `limit` is the number of rows to read.
    Raises ConfigError: no such file. DataError: a line that is not a JSON object, or a row that does not fit.
    """
    return _episodes(jsonl_rows(path), path, columns, limit)


def csv(*, path: str, columns: dict[str, str] | None = None, limit: int | None = None) -> list[Episode]:
    """Read a file of comma-separated values whose first line names the columns; settings and errors as `jsonl`."""
    return _episodes(csv_rows(path), path, columns, limit)


def parquet(*, path: str, columns: dict[str, str] | None = None, limit: int | None = None) -> list[Episode]:
    """Read a Parquet file; settings and errors as `jsonl`."""
    return _episodes(parquet_rows(path), path, columns, limit)


def hub(
    *,
    path: str,
    split: str = "train",
    subset: str | None = None,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
) -> list[Episode]:
    """Read a data set of the Hugging Face hub, or of its local cache; no code of the data set is run.

    Raises ConfigError: the data set, subset or split cannot be loaded. DataError: a row that does not fit.
    """
    return _episodes(hub_rows(path, split, subset), f"{path} [{split}]", columns, limit)


def read(path: str, columns: dict[str, str] | None = None, limit: int | None = None) -> list[Episode]:
    """Read a file of the user's by its extension: .jsonl, .parquet or .csv."""
    return _episodes(rows_of(path)(path), path, columns, limit)


def _episodes(rows: Rows, source: str, columns: dict[str, str] | None, limit: int | None) -> list[Episode]:
    if limit is not None and limit < 1:
        raise ConfigError(f"{source}: limit: expected at least 1 row, got {limit}")
    return placed_episodes(islice(rows, limit), source=source, columns=columns)


# --------------------------------------------------------------------------- the task of the user's own files
def files(
    *,
    train: str,
    test: str | None = None,
    dev: str | None = None,
    demos: str | None = None,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
) -> TaskSource:
    """A task from files by extension (.jsonl, .parquet, .csv), checked by the column `answer`; only given splits exist.

    `columns` and `limit` are those of `jsonl` and hold for every file. Files are read when a split is asked for.
    Raises ConfigError: an extension that is none of the three.
    """
    given = {"demos": demos, "train": train, "dev": dev, "test": test}
    paths = {split: path for split, path in given.items() if path is not None}
    for path in paths.values():
        rows_of(path)
    splits = {split: partial(read, path, columns, limit) for split, path in paths.items()}
    return TaskSource(splits, verifier=answer_match, make_env=SingleTurn)


# --------------------------------------------------------------------------- rows and where they stand
def jsonl_rows(path: str) -> Rows:
    """Yield the objects of a JSON-lines file, each with its line."""
    with _open(path) as file:
        for number, line in enumerate(_decoded(file, path), 1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _json_object(line, where)


def csv_rows(path: str) -> Rows:
    """Yield the rows of a file of comma-separated values, each with the line on which it begins."""
    with _open(path, newline="") as file:
        reader = csv_module.reader(_decoded(file, path), strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path} line {reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv_module.Error as error:
                raise DataError(f"{where}: not valid CSV: {error}") from None
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: expected column names that differ, got {', '.join(header)}")
            elif len(fields) != len(header):
                raise DataError(f"{where}: expected {len(header)} fields ({', '.join(header)}), got {len(fields)}")
            else:
                yield where, dict(zip(header, fields, strict=True))


def parquet_rows(path: str) -> Rows:
    """Yield the rows of a Parquet file, each with its number, from 1."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet as pyarrow_parquet

    file = _existing(path)
    try:
        table = pyarrow_parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from None
    with table:
        rows = (row for part in table.iter_batches() for row in part.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{path} row {number}", row


def hub_rows(path: str, split: str, subset: str | None = None) -> Rows:
    """Yield the rows of a data set of the hub, each with its number, from 1."""
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # the loader raises many kinds: network, unknown name, subset or split, cache
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        wanted = f"'{path}'" + (f" subset '{subset}'" if subset else "") + f" split '{split}'"
        raise ConfigError(
            f"the data set {wanted} could not be loaded from the hub: {reason}; check the name and the network, "
            "or download it and give the path of the files"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path} [{split}] row {number}", row


READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": jsonl_rows,
    ".jsonl.gz": jsonl_rows,
    ".parquet": parquet_rows,
    ".csv": csv_rows,
}


def rows_of(path: str) -> Callable[[str], Rows]:
    """Return the function that reads the rows of `path`, by its extension. Raises ConfigError: another extension."""
    found = next((suffix for suffix in READERS if Path(path).name.lower().endswith(suffix)), None)
    if found is None:
        raise ConfigError(f"{path}: expected a file that ends in {', '.join(READERS)}, got '{Path(path).suffix.lower()}'")
    return READERS[found]


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        got = "it is a folder" if file.is_dir() else f"looked in {file.absolute().parent}"
        raise ConfigError(f"no such file: {path} ({got}); give the path of a file, absolute or from the current folder")
    return file


def _open(path: str, newline: str | None = None) -> TextIO:
    file = _existing(path)
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline=newline)
    return file.open(encoding="utf-8-sig", newline=newline)  # -sig: drops a byte-order mark


def _decoded(file: TextIO, path: str) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not valid JSON: {reason}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with named columns, got {type(row).__name__}")
    return row
