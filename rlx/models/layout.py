"""Sequences that begin alike as trees [prefix | branch | branch ...], and the trees as one row without padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
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


@dataclass(frozen=True)
class Call:
    """One call of attention: R segments padded to C ids, each of which sees `prefix` and its own segment up to itself.

    `at` (R*C,) are their places in the row; what is filled up repeats a place and is not read.
    """

    at: Tensor
    rows: int
    prefix: Segment | None


@dataclass(frozen=True)
class Layout:
    """Who attends to whom in a row of T ids. `back` (T,) says where each id stands among the results of `calls`."""

    calls: list[Call]
    back: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """query (H,T,D), key and value (K,T,D) -> (T,H,D). No mask over the row is built, no key repeated for query heads."""
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        found = []
        for call in self.calls:
            q, k, v = (x.index_select(0, call.at).unflatten(0, (call.rows, -1)).transpose(1, 2) for x in (query, key, value))
            bias = None
            if call.prefix is not None:
                k, v = (seen(call.prefix, whole, own) for whole, own in ((key, k), (value, v)))
                bias = causal_lower_right(q.shape[2], k.shape[2])
            causal = bias is None
            out = scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=True)
            found.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(found).index_select(0, self.back)


def seen(prefix: Segment, whole: Tensor, own: Tensor) -> Tensor:
    """The keys (or values) of a prefix before those of each segment: whole (T,K,D), own (R,K,C,D) -> (R,K,P+C,D)."""
    first = whole[prefix.start : prefix.start + prefix.length].transpose(0, 1)
    return torch.cat([first.expand(len(own), -1, -1, -1), own], 2)


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
    made, done = [], 0
    for segments, prefix in calls:
        width = max(segment.length for segment in segments)
        at = np.stack([start + np.minimum(np.arange(width), length - 1) for start, length in segments])
        for i, (start, length) in enumerate(segments):
            back[start : start + length] = done + i * width + np.arange(length)
        made.append(Call(torch.from_numpy(at.ravel()).to(device), len(segments), prefix))
        done += at.size
    return Layout(made, torch.from_numpy(back).to(device))


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


def num_ids(sequences: Sequence[Ids]) -> int:
    """How many ids a row of some sequences has."""
    return sum(prefix + sum(len(sequences[i]) - prefix for i in members) for members, prefix in trees(sequences))
