"""Rows of data on their way into a stage: with tokens, in an order that the seed alone decides."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlx.build import hint
from rlx.types import ConfigError, DataError, Episode, TextPolicy


def first(rows: list[Episode], limit: int | None) -> list[Episode]:
    """The rows of the first `limit` groups, whole: a row that is alone in its group counts as one, as do those of a pair."""
    if limit is None:
        return rows
    groups = set(list(dict.fromkeys(row.group for row in rows))[:limit])
    return [row for row in rows if row.group in groups]


def numbers(rows: Sequence[Episode], name: str, where: str) -> list[float]:
    """A column of the data. Raises DataError where a row does not have it, or has anything but a number there."""
    found = []
    for i, row in enumerate(rows):
        if name not in row.task.meta:
            raise DataError(f"{where}: row {i} has no column {name!r}{hint(name, row.task.meta)}")
        try:
            found.append(float(row.task.meta[name]))
        except (TypeError, ValueError):
            said = repr(row.task.meta[name])
            raise DataError(f"{where}: row {i}, column {name!r}: expected a number, got {said[:60]}") from None
    return found


def with_columns(rows: list[Episode], names: Sequence[str], where: str) -> list[Episode]:
    """The rows, if each of them has a number in every column of `names`. Raises DataError else."""
    for name in names:
        numbers(rows, name, where)
    return rows


def tokenized(rows: list[Episode], policy: TextPolicy, max_length: int | None, where: str) -> list[Episode]:
    """Rows with tokens; those with nothing to train on, or longer than `max_length`, are left out and counted.

    The other rows of a group go with them: a pair is never cut.
    Raises DataError where no row is left: a data set whose mask is empty would train on a loss of 0.
    """
    if not any(row.turns for row in rows):
        raise DataError(f"{where}: its rows are prompts alone; to fit it needs completions, messages or pairs")
    made = [policy.tokenize(row) for row in rows]
    trained = [row for row in made if row.num_tokens]
    if not trained:
        raise DataError(
            f"{where}: no token of its {len(rows)} rows is trained on: the chat template marks no assistant text "
            "(see `rlx data show`)"
        )
    long = [r for r in trained if max_length and sum(len(t.seen) + len(t.did) for t in r.turns) > max_length]
    bad = {row.group for row in made if not row.num_tokens} | {row.group for row in long}
    whole = [row for row in made if row.group not in bad]
    if not whole:
        what = f"is longer than max_length={max_length} tokens" if len(long) == len(trained) else "has a part that does not fit"
        raise DataError(f"{where}: every row {what}")
    if len(whole) < len(rows):
        print(
            f"{where}: {len(rows) - len(trained)} rows without a trained token and {len(long)} longer than max_length; "
            f"{len(rows) - len(whole)} of {len(rows)} are left out, whole groups"
        )
    return whole


class Shuffled(Iterator[list[Episode]]):
    """Endless batches of `size` groups of rows: epoch after epoch, each a new permutation; none stands twice in a batch.

    A row that is alone in its group counts as one, as do the rows of a pair. Raises ConfigError where there are fewer
    groups than a batch takes; `where` is the key that says how many. Its state is the place in the data.
    """

    def __init__(self, rows: list[Episode], size: int, seed: tuple[int, ...], where: str) -> None:
        members: dict[int, list[Episode]] = {}
        for row in rows:
            members.setdefault(row.group, []).append(row)
        self.groups, self.size, self.seed = list(members.values()), size, seed
        if size > len(self.groups):
            raise ConfigError(f"{where}: {size} asked for, but the data has {len(self.groups)} rows")
        self.epoch = 0
        self.waiting: list[int] = []

    def __next__(self) -> list[Episode]:
        if len(self.waiting) < self.size:
            order = np.random.default_rng((*self.seed, self.epoch)).permutation(len(self.groups)).tolist()
            left = set(self.waiting)  # of the last epoch: its repetitions go to the end of this one
            self.waiting += [i for i in order if i not in left] + [i for i in order if i in left]
            self.epoch += 1
        chosen, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        return [row for i in chosen for row in self.groups[i]]

    def state_dict(self) -> dict[str, Any]:
        """How many permutations were drawn, and what is left of them."""
        return {"epoch": self.epoch, "waiting": np.array(self.waiting, np.int64)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.waiting = saved["epoch"], saved["waiting"].tolist()


def mark_of(rows: Sequence[Episode]) -> int:
    """A number that another order, or another text, of rows does not have (CRC-32)."""
    mark = 0
    for row in rows:
        texts = [message.text for message in row.task.prompt] + [row.completion, str(row.task.answer)]
        mark = zlib.crc32("\0".join(texts).encode("utf-8", "surrogatepass"), mark)
    return mark
