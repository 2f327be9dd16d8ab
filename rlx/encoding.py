"""What a stage has come to, as JSON and tensors: numbers, texts, containers, arrays, tensors, episodes; and back again.

Nothing is pickled, so reading runs no code. An object that several episodes share is shared after reading, too: images are
compared by identity, and a filter may note something on an episode that is in two buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.types import Episode, Image, Message, Status, Task, Turn

RECORDS: dict[str, Any] = {cls.__name__: cls for cls in (Image, Message, Task, Turn, Episode)}
CONTAINERS: dict[str, Any] = {cls.__name__: cls for cls in (tuple, set, frozenset)}
KIND = "!"  # the key of a mapping that stands for something that JSON does not have
ARRAYS = "arrays"  # the bytes of all arrays, one after the other


class NotStorable(TypeError):
    """A value that cannot be written, with its place."""


def encode(tree: Mapping[str, Any], rows: Mapping[str, Sequence[Episode]]) -> tuple[Any, dict[str, Tensor]]:
    """A plain tree and the tensors that it names. A task of the data's `rows` is named by its place there.

    Raises NotStorable.
    """
    encoder = Encoder(rows)
    plain = encoder.plain(tree, "")
    data = np.frombuffer(b"".join(encoder.arrays), np.uint8)
    return plain, encoder.tensors | {ARRAYS: torch.from_numpy(data.copy())}


def decode(plain: Any, tensors: Mapping[str, Tensor], rows: Mapping[str, Sequence[Episode]]) -> Any:
    """What was encoded, with tensors and arrays of its own."""
    return Decoder(tensors, rows).value(plain)


class Encoder:
    """One pass over a tree."""

    def __init__(self, rows: Mapping[str, Sequence[Episode]]) -> None:
        self.rows = rows
        self.tensors: dict[str, Tensor] = {}
        self.arrays: list[bytes] = []
        self.size = 0
        self.met: dict[int, tuple[int, Any]] = {}  # the object is kept, so that no other gets its id

    @cached_property
    def places(self) -> dict[int, tuple[str, int]]:
        """The name and number of the row of each task."""
        found: dict[int, tuple[str, int]] = {}
        for name, rows in self.rows.items():  # the first that has it: rows that others select from are read before those
            for i, row in enumerate(rows):
                found.setdefault(id(row.task), (name, i))
        return found

    def plain(self, x: Any, at: str) -> Any:
        """A value as JSON has it; `at` is its place."""
        if x is None or type(x) in (bool, int, float, str):
            return x
        if isinstance(x, Tensor):
            name = f"{len(self.tensors)}{at}"
            self.tensors[name] = x.detach()
            return {KIND: "tensor", "name": name}
        if isinstance(x, np.ndarray | np.generic) and not x.dtype.hasobject:
            return self.array(x)
        if isinstance(x, Status):
            return {KIND: "Status", "value": x.value}
        if type(x) is list:
            return [self.plain(item, f"{at}/{i}") for i, item in enumerate(x)]
        if type(x).__name__ in CONTAINERS and type(x) is CONTAINERS[type(x).__name__]:
            return {KIND: type(x).__name__, "items": [self.plain(item, f"{at}/{i}") for i, item in enumerate(x)]}
        if isinstance(x, Mapping):
            return self.mapping(x, at)
        if RECORDS.get(type(x).__name__) is type(x):
            return self.record(x, at)
        raise NotStorable(f"{at[1:]} holds a {type(x).__module__}.{type(x).__qualname__}, which cannot be written")

    def mapping(self, x: Mapping[Any, Any], at: str) -> Any:
        """Keys that are no texts are values like others."""
        if all(type(key) is str for key in x) and KIND not in x:
            return {key: self.plain(value, f"{at}/{key}") for key, value in x.items()}
        items = [[self.plain(key, at), self.plain(value, f"{at}/{key}")] for key, value in x.items()]
        return {KIND: "dict", "items": items}

    def array(self, x: Any) -> Any:
        """The place of an array's bytes; a numpy number is an array of shape ()."""
        data, start = x.tobytes(), self.size
        self.arrays.append(data)
        self.size += len(data)
        kind = "array" if isinstance(x, np.ndarray) else "number"
        return {KIND: kind, "dtype": x.dtype.str, "shape": list(x.shape), "start": start}

    def record(self, x: Any, at: str) -> Any:
        """The fields of an episode or of what it is made of, the first time; then its number."""
        if isinstance(x, Task) and id(x) in self.places:
            name, i = self.places[id(x)]
            return {KIND: "row", "of": name, "at": i}
        if id(x) in self.met:
            return {KIND: "same", "as": self.met[id(x)][0]}
        number = len(self.met)
        self.met[id(x)] = number, x
        fields = {f.name: self.plain(getattr(x, f.name), f"{at}/{f.name}") for f in dataclasses.fields(x)}
        return {KIND: type(x).__name__, "number": number, "fields": fields}


class Decoder:
    """One pass over a plain tree, in the order in which it was written."""

    def __init__(self, tensors: Mapping[str, Tensor], rows: Mapping[str, Sequence[Episode]]) -> None:
        self.tensors, self.rows = tensors, rows
        self.arrays = tensors[ARRAYS].numpy()
        self.met: dict[int, Any] = {}

    def value(self, x: Any) -> Any:
        """The value that a plain one stands for."""
        if isinstance(x, list):
            return [self.value(item) for item in x]
        if not isinstance(x, dict):
            return x
        kind = x.get(KIND)
        if kind is None:
            return {key: self.value(value) for key, value in x.items()}
        if kind == "tensor":
            return self.tensors[x["name"]].clone()
        if kind in ("array", "number"):
            return self.array(x)
        if kind == "Status":
            return Status(x["value"])
        if kind == "dict":
            return {self.value(key): self.value(value) for key, value in x["items"]}
        if kind in CONTAINERS:
            return CONTAINERS[kind](self.value(item) for item in x["items"])
        if kind == "row":
            return self.rows[x["of"]][x["at"]].task
        if kind == "same":
            return self.met[x["as"]]
        made = RECORDS[kind](**{key: self.value(value) for key, value in x["fields"].items()})
        self.met[x["number"]] = made
        return made

    def array(self, x: Mapping[str, Any]) -> Any:
        """A copy of some of the bytes."""
        dtype, shape = np.dtype(x["dtype"]), tuple(x["shape"])
        count = int(np.prod(shape))
        made = np.frombuffer(self.arrays, dtype, count, x["start"]) if count else np.zeros(0, dtype)
        made = made.reshape(shape).copy()
        return made if x[KIND] == "array" else made[()]
