"""The reader of plain causal models: prompts are stored once, rows in place, and rows come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlx.models.cache import SHORT, Layer, SharedCache, resized
from rlx.models.graph import Graphs
from rlx.models.reader import Memory, check_room
from rlx.types import Ids, View

if TYPE_CHECKING:
    from rlx.models.language import LanguageModel

PREFILL = 8192  # padded tokens of prompts, or of what goes on after them, that are read at once


class SharedReader:
    """Views and their prefixes are read at once but for the last id, which each row reads like those it draws.

    So the logits come from one place, and a prompt is in memory once however many rows follow it.
    """

    joins = True
    graphs: Graphs | None = None

    def __init__(
        self, policy: LanguageModel, views: Sequence[View], counts: Sequence[int], longest: int, apart: bool | None = None
    ) -> None:
        """Read the views, which turns of at most `longest` ids follow. Raises ConfigError where these exceed the context.

        Prompts are stored `apart` from their rows where that is faster: where they are long and several rows follow each.
        """
        check_room(policy, views, longest)
        self.policy, self.longest = policy, longest
        self.ahead: list[Ids] = [np.zeros(0, np.int64) for _ in views]
        prompts = [np.concatenate([view.ids, view.prefix]) for view in views]
        lengths = np.array([len(p) - 1 for p in prompts])
        if apart is None:
            apart = bool(lengths.max() >= SHORT and sum(counts) >= 2 * len(counts))
        self.apart = apart
        self.cache = SharedCache.of(prefilled(policy, [p[:-1] for p in prompts]), lengths, apart=apart)
        self._begin([p[-1] for p in prompts])
        self._repeat(counts)

    @classmethod
    def resumed(cls, memory: Memory, found: Sequence[tuple[int, Ids]], counts: Sequence[int], longest: int) -> SharedReader:
        """Rows of an earlier reader go on: each has ids to read, one at least, before it draws. The earlier one is used up."""
        old: SharedReader = memory.reader
        self = cls.__new__(cls)
        self.policy, self.longest, self.apart = old.policy, longest, old.apart
        self.ahead = [np.zeros(0, np.int64) for _ in found]
        self.cache = old.cache.picked(np.array([row for row, _ in found]))
        self._extend([ids[:-1] for _, ids in found])
        self._begin([ids[-1] for _, ids in found])
        self._repeat(counts)
        memory.clear()  # the earlier keys and values are not held beside those of the next turn
        return self

    @property
    def seats(self) -> Ids:
        """The rows as they stand, by the number under which they were begun."""
        return self.cache.seats[: self.cache.rows]

    def keep(self, rows: Ids) -> None:
        """Go on with these rows, in this order; the others are kept aside."""
        self.cache.keep(rows)

    def read(self, token: Tensor) -> None:
        """Read one more id in each row: (R,)."""
        ids = token[:, None].to(self.policy.device)
        if self.policy.replays and (logits := self._replayed(ids)) is not None:
            self.logits = logits
            self.cache.held[: self.cache.rows] += 1
        else:
            self.logits = self._forward(ids, np.ones(len(token), np.int64))

    def _replayed(self, ids: Tensor) -> Tensor | None:
        """The logits after ids (R,1) by a CUDA graph; None where none can be captured, now and from then on."""
        try:
            self.graphs = self.graphs or Graphs(self.policy, self.cache)
            return self.graphs(ids)
        except RuntimeError as error:
            self.graphs, self.policy.replays = None, False
            why = str(error).partition("\n")[0]
            print(f"! model {self.policy.source!r}: no CUDA graph could be captured, it decodes without ({why})", flush=True)
            return None

    def join(self, views: Sequence[View], counts: Sequence[int]) -> None:
        """Begin `counts[i]` rows for each view; they follow the rows that are there."""
        more = SharedReader(self.policy, views, counts, self.longest, self.apart)
        self.logits = torch.cat([self.logits[: self.cache.rows], more.logits])
        self.cache.join(more.cache)

    def _begin(self, last: Sequence[int]) -> None:
        """Read the id after which each row draws. It is not a graph's: what would be captured is read once."""
        self.logits = self._forward(torch.tensor(last)[:, None].to(self.policy.device), np.ones(len(last), np.int64))

    def _repeat(self, counts: Sequence[int]) -> None:
        if any(n != 1 for n in counts):
            self.logits = self.logits.repeat_interleave(torch.tensor(counts, device=self.logits.device), 0)
            self.cache.repeat(np.array(counts))

    def _extend(self, rows: Sequence[Ids]) -> None:
        """Read several more ids in each row, of which some may have none; what pads them is written over later."""
        ids, lengths = filled(rows)
        size = max(1, PREFILL // len(rows))
        for start in range(0, ids.shape[1], size):
            part = ids[:, start : start + size]
            self._forward(part.to(self.policy.device), (lengths - start).clip(0, part.shape[1]))

    def _forward(self, ids: Tensor, lengths: Ids) -> Tensor:
        """Read (R,T) ids, of which row r has `lengths[r]`; the logits after the last column, (R,V)."""
        policy, cache = self.policy, self.cache
        with policy.autocast():
            out = policy.module(input_ids=ids, **cache.settings(ids.shape[1]), logits_to_keep=1)
        cache.held[: cache.rows] += lengths
        return out.logits[:, -1]  # type: ignore[no-any-return]


def prefilled(policy: LanguageModel, prompts: Sequence[Ids]) -> list[Layer]:
    """Keys and values of prompts, filled up on the right: (U,K,P,D) for each layer. Those of like length are read together."""
    from transformers import DynamicCache

    widest = max(1, *(len(p) for p in prompts))
    done: list[list[Layer]] = []
    order: list[int] = []
    for unit in units([len(p) for p in prompts], PREFILL):
        cache = DynamicCache(config=policy.module.config)
        ids, _ = filled([prompts[i] for i in unit], at_least=1)
        with policy.autocast():  # on the right of a causal model, what fills up a row is seen by nothing before it
            policy.backbone(input_ids=ids.to(policy.device), past_key_values=cache, use_cache=True)
        pairs = [(x.keys.to(x.values.dtype), x.values) for x in cache.layers]  # autocast leaves rotated keys in float32
        done.append([(resized(k, len(unit), widest), resized(v, len(unit), widest)) for k, v in pairs])
        order += unit
    if len(done) == 1 and order == sorted(order):
        return done[0]
    back = torch.from_numpy(np.argsort(order)).to(policy.device)
    return [
        (torch.cat([k for k, _ in parts])[back], torch.cat([v for _, v in parts])[back]) for parts in zip(*done, strict=True)
    ]


def units(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The rows in order of length, as many at a time as their number times the longest stays within the budget, or one."""
    unit: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if unit and lengths[i] * (len(unit) + 1) > budget:
            yield unit
            unit = []
        unit.append(i)
    yield sorted(unit)


def filled(rows: Sequence[Ids], at_least: int = 0) -> tuple[Tensor, Ids]:
    """Rows of ids filled up with 0 on the right (R,L), and their lengths (R,)."""
    lengths = np.array([len(row) for row in rows])
    ids = torch.zeros(len(rows), max(at_least, int(lengths.max())), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
    return ids, lengths
