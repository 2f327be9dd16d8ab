"""Sequences that begin alike as trees [prefix | branch | branch ...], and the trees as one row without padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlx.types import Ids

# A prefix is shared where that saves more ids than this: below, attention in calls of its own costs more than it saves.
LEAST = 16


class Tree(NamedTuple):
    """The sequences `members`, whose first `prefix` ids are the same."""

    members: list[int]
    prefix: int


class Segment(NamedTuple):
    """Ids of a row that follow one another: a prefix or a branch."""

    start: int
    length: int


class Call(NamedTuple):
    """One call of attention: `rows` segments padded to `width` ids; each sees `prefix` ids and, causally, itself."""

    rows: int
    width: int
    prefix: int

    def keys(self, x: Tensor) -> Tensor:
        """The keys (or values) of the prefix before those of each segment: (P+R*C,K,D) -> (R,K,P+C,D)."""
        first, own = torch.split(x, [self.prefix, self.rows * self.width])
        own = own.view(self.rows, self.width, *x.shape[1:])
        seen = torch.cat([first.expand(self.rows, *first.shape), own], 1) if self.prefix else own
        return seen.transpose(1, 2)


@dataclass(frozen=True)
class Layout:
    """Who attends to whom in a row of T ids, as calls of attention.

    `queries` are the places in the row of the ids of all calls, one call after the other, `keys` those of the ids that they
    see; what is filled up repeats a place and is not read. `back` (T,) says where each id of the row is among the queries.
    """

    calls: list[Call]
    queries: Tensor
    keys: Tensor
    back: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """query (H,T,D), key and value (K,T,D) -> (T,H,D). No mask over the row is built, no key repeated for query heads.

        Where torch has no flash attention, it builds the mask of each call that sees a prefix. Ids are picked for all calls at
        once, because each pick costs a gradient of the size of the row.
        """
        query, key, value = (x.transpose(0, 1).to(value.dtype) for x in (query, key, value))  # of one type in autocast, too
        sizes = [call.rows * call.width for call in self.calls]
        queries = torch.split(query.index_select(0, self.queries), sizes)
        seen = [size + call.prefix for size, call in zip(sizes, self.calls, strict=True)]
        keys, values = (torch.split(x.index_select(0, self.keys), seen) for x in (key, value))
        found = []
        for call, q, k, v in zip(self.calls, queries, keys, values, strict=True):
            q, k, v = q.view(call.rows, call.width, *q.shape[1:]).transpose(1, 2), call.keys(k), call.keys(v)
            bias = after_prefix(q.shape[2], k.shape[2]) if call.prefix else None
            causal = bias is None
            out = scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=True)
            found.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(found).index_select(0, self.back)


def after_prefix(width: int, seen: int) -> Tensor:
    """The causal mask (width, seen) of rows whose first id already sees a prefix of `seen - width`, never built."""
    from torch.nn.attention.bias import causal_lower_right  # here, because it brings the whole compiler: a second or two

    bias: Tensor = causal_lower_right(width, seen)
    return bias


@dataclass(frozen=True)
class Row:
    """Sequences as one row: its ids and their positions (1,T), its layout, and the place of each id of each sequence."""

    ids: Tensor
    positions: Tensor
    layout: Layout
    places: list[Ids]


def pack(sequences: Sequence[Ids], device: torch.device) -> Row:
    """All ids of some sequences, what they share once."""
    ids: list[Ids] = []
    positions: list[Ids] = []
    places: list[Ids] = [np.zeros(0, np.int64) for _ in sequences]
    alone: list[Segment] = []
    calls: list[tuple[list[Segment], Segment | None]] = []
    end = 0
    for members, prefix in trees(sequences):
        trunk = Segment(end, prefix)
        branches = []
        ids.append(sequences[members[0]][:prefix])
        positions.append(np.arange(prefix))
        end += prefix
        for i in members:
            length = len(sequences[i]) - prefix
            ids.append(sequences[i][prefix:])
            positions.append(np.arange(prefix, prefix + length))
            places[i] = np.concatenate([np.arange(prefix) + trunk.start, np.arange(length) + end])
            branches.append(Segment(end, length))
            end += length
        alone.append(trunk)
        calls += [(segments, trunk) for segments in alike(branches)]
    calls = [*((segments, None) for segments in alike(alone)), *calls]
    return Row(
        torch.from_numpy(np.concatenate(ids))[None].to(device),
        torch.from_numpy(np.concatenate(positions))[None].to(device),
        layout(calls, end, device),
        places,
    )


def layout(calls: Sequence[tuple[list[Segment], Segment | None]], total: int, device: torch.device) -> Layout:
    """The layout of a row of `total` ids from the segments of each call and the prefix that they see."""
    back = np.zeros(total, np.int64)
    made, queries, keys, done = [], [], [], 0
    for segments, prefix in calls:
        before = np.arange(prefix.length) + prefix.start if prefix else np.zeros(0, np.int64)
        width = max(segment.length for segment in segments)
        for i, (start, length) in enumerate(segments):
            back[start : start + length] = done + i * width + np.arange(length)
        own = np.concatenate([start + np.minimum(np.arange(width), length - 1) for start, length in segments])
        made.append(Call(len(segments), width, len(before)))
        queries.append(own)
        keys += [before, own]
        done += len(own)
    return Layout(made, *(torch.from_numpy(x).to(device) for x in (np.concatenate(queries), np.concatenate(keys), back)))


def alike(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Segments of similar length, so that little is padding; those without an id are left out."""
    part: list[Segment] = []
    for segment in sorted((s for s in segments if s.length), key=lambda s: s.length):
        if part and segment.length > 1.25 * part[0].length + 8:
            yield part
            part = []
        part.append(segment)
    if part:
        yield part


def trees(sequences: Sequence[Ids]) -> list[Tree]:
    """The sequences as trees that save the most ids, by dynamic programming over their lexicographic order.

    A tree of m sequences that begin with the same p ids saves (m - 1) p ids. One sequence by itself is all prefix.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i8").tobytes())
    same = [common(sequences[a], sequences[b]) for a, b in itertools.pairwise(order)]
    shared = np.full(len(order), np.iinfo(np.int32).max, np.int64)  # by the first of a run: what all of it share
    saved = np.zeros(len(order) + 1, np.int64)  # by the number of sequences from the first
    begin = np.zeros(len(order) + 1, np.int64)  # where the last run of the best of these begins
    for end in range(1, len(order) + 1):
        if end > 1:
            shared[: end - 1] = np.minimum(shared[: end - 1], same[end - 2])
        more = np.arange(end - 1, -1, -1)  # sequences of a run after its first
        total = saved[:end] + more * shared[:end] - LEAST * (more > 0)
        begin[end] = end - 1 - int(total[::-1].argmax())  # of equals the shortest run
        saved[end] = total[begin[end]]
    found: list[Tree] = []
    end = len(order)
    while end:
        first = int(begin[end])
        prefix = int(shared_by(sequences, order[first:end]))
        found.append(Tree(order[first:end], prefix))
        end = first
    return found[::-1]


def shared_by(sequences: Sequence[Ids], members: Sequence[int]) -> int:
    """How many ids some sequences begin with alike; of one sequence, all."""
    first = sequences[members[0]]
    return min([len(first), *(common(first, sequences[i]) for i in members[1:])])


def common(a: Ids, b: Ids) -> int:
    """How many ids two sequences begin with alike."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def num_ids(sequences: Sequence[Ids], key: float = 0.0) -> int:
    """How many ids a row of some sequences has, where each key of a prefix that a branch holds beside its own counts `key`."""
    found = trees(sequences)
    ids = sum(prefix + sum(len(sequences[i]) - prefix for i in members) for members, prefix in found)
    return ids + math.ceil(key * sum(prefix * sum(len(sequences[i]) > prefix for i in members) for members, prefix in found))
