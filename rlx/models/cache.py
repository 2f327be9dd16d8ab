"""Keys and values of prompts, stored once each, and of the rows that follow them, written in place."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlx.types import Ids

PAGE = 64  # the columns that a row has at first; they double when they are full
FAR = -1e30  # added to the score of what is not attended to; finite, so that a row that attends to nothing is no NaN
SHORT = 128  # prompts below this length are copied to their rows: attention in one part is faster there

Array = TypeVar("Array", Tensor, Ids)
Layer = tuple[Tensor, Tensor]  # keys and values


class SharedCache:
    """What a causal model has read: U prompts, and R rows each of which goes on after one of them.

    `prompts`: for each layer, keys and values (U,K,P,D); the first `begun[u]` columns are prompt u's. Without any, rows hold
    their prompts themselves. `own`: keys and values of the rows, (S,K,C,D) with S >= R and C >= the longest row; the first
    `held[r]` columns are row r's, and `which[r]` is its prompt. Rows from R on are kept aside. transformers calls `update` in
    each layer, and `attention` reads `grid` and `cell`: grid (U,M) has the rows of each prompt, filled up with any, and row r
    stands at cell[0][r], cell[1][r] of it.
    """

    def __init__(self, prompts: list[Layer], begun: Ids, own: list[Layer], which: Ids, held: Ids) -> None:
        self.prompts, self.begun = prompts, begun
        self.own, self.which, self.held = own, which, held
        self.seats = np.arange(len(which))  # the rows as they stand, by their number in the order in which they came
        self.rows = len(which)
        self.place()

    @classmethod
    def of(cls, prompts: list[Layer], lengths: Ids, *, apart: bool) -> SharedCache:
        """One row for each prompt, which has read nothing after it; prompts are stored `apart`, or in their rows."""
        which, none = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
        if not apart:
            return cls([], none, list(prompts), which, lengths)
        return cls(prompts, lengths, [(emptied(k, PAGE), emptied(v, PAGE)) for k, v in prompts], which, none)

    # ----------------------------------------------------------------- what a forward reads
    def place(self) -> None:
        """Bring `grid` and `cell` in line with the rows; prompts without a row go behind the others."""
        device = self.own[0][0].device
        self.row = torch.arange(self.rows, device=device)[:, None]
        if not self.prompts:
            return
        order = kept(np.bincount(self.which[: self.rows], minlength=len(self.begun)) > 0)
        if moved := moves(order):
            at = exchanged(np.arange(len(self.begun)), *moved)  # an exchange is its own inverse
            self.begun, self.which = exchanged(self.begun, *moved), at[self.which]
            there = [torch.from_numpy(places).to(device) for places in moved]
            for pair in self.prompts:
                for x in pair:
                    exchanged(x, *there)
        which = self.which[: self.rows]
        grid, column = gridded(which, len(order))
        self.grid = torch.from_numpy(grid).to(device)
        self.cell = (torch.from_numpy(which.copy()).to(device), torch.from_numpy(column).to(device))
        seen = np.arange(self.prompts[0][0].shape[2]) < self.begun[: len(order), None]
        self.prompt_mask = barred(torch.from_numpy(seen).to(device))[:, None, None]  # (U,1,1,P)

    def settings(self, num: int) -> dict[str, Any]:
        """What a forward of `num` ids in each row takes beside them: positions, mask, this cache."""
        self.reserve(self.rows, int(self.held[: self.rows].max()) + num)
        at = self.held[: self.rows, None] + np.arange(num)
        positions = torch.from_numpy(self.begun[self.which[: self.rows], None] + at)
        self.at, self.width = torch.from_numpy(at).to(self.row.device), int(at.max()) + 1
        own = torch.arange(self.width, device=self.at.device) <= self.at[..., None]  # (R,T,W)
        return self.given(positions.to(self.row.device), barred(own)[:, None])

    def given(self, positions: Tensor, mask: Tensor) -> dict[str, Any]:
        """The same of positions (R,T) and mask (R,1,T,W): transformers hands a mask of four dimensions on as it is."""
        cached = {"past_key_values": self, "use_cache": True, "shared": self}
        return {"position_ids": positions, "attention_mask": mask, **cached}

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> Layer:
        """Write keys and values (R,K,T,D) of new ids; all that the rows hold, (R,K,W,D)."""
        for held, new in zip(self.own[layer], (key, value), strict=True):
            held[self.row, :, self.at] = new.transpose(1, 2).to(held.dtype)
        keys, values = self.own[layer]
        return keys[: self.rows, :, : self.width], values[: self.rows, :, : self.width]

    def get_seq_length(self, *_: Any) -> int:
        """Some models ask; positions and mask are given, so that nothing depends on it."""
        return 0

    # ----------------------------------------------------------------- rows come and go
    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows and columns."""
        have, width = self.own[0][0].shape[0], self.own[0][0].shape[2]
        if rows <= have and columns <= width:
            return
        while width < columns:
            width *= 2
        for layer, pair in enumerate(self.own):
            self.own[layer] = tuple(resized(x, max(rows, have), width) for x in pair)  # type: ignore[assignment]

    def keep(self, rows: Ids) -> None:
        """Go on with these rows, in this order (see `kept`); the others change places with them and stay behind."""
        if moved := moves(rows):
            width = int(self.held[: self.rows].max())
            there = [torch.from_numpy(places).to(self.row.device) for places in moved]
            for pair in self.own:
                for x in pair:
                    exchanged(x[:, :, :width], *there)
            for known in (self.which, self.held, self.seats):
                exchanged(known, *moved)
        self.rows = len(rows)
        self.place()

    def repeat(self, counts: Ids) -> None:
        """As many rows as `counts` says of each, those of one together."""
        rows = np.repeat(np.arange(self.rows), counts)
        index = torch.from_numpy(rows).to(self.row.device)
        self.own = [(k[index], v[index]) for k, v in self.own]
        self.which, self.held = self.which[rows], self.held[rows]
        self.seats = np.arange(len(rows))
        self.rows = len(rows)
        self.place()

    def picked(self, rows: Ids) -> SharedCache:
        """A cache of some of the rows, also of those kept aside. It takes over the prompts."""
        index = torch.from_numpy(rows).to(self.row.device)
        own = [(k[index], v[index]) for k, v in self.own]
        return SharedCache(self.prompts, self.begun, own, self.which[rows], self.held[rows])

    def join(self, other: SharedCache) -> None:
        """The rows of another follow; what was kept aside is lost, and so are prompts without a row."""
        old, new = self.rows, other.rows
        live = len(self.grid) if self.prompts else len(self.begun)
        width = int(max(self.held[:old].max(initial=0), other.held[:new].max()))
        self.reserve(old + new, width)
        for mine, its in zip(self.own, other.own, strict=True):
            for x, y in zip(mine, its, strict=True):
                both = min(width, y.shape[2])
                x[old : old + new, :, :both] = y[:new, :, :both]
        self.prompts = [
            (joined(k, more_k, live), joined(v, more_v, live))
            for (k, v), (more_k, more_v) in zip(self.prompts, other.prompts, strict=True)
        ]
        self.begun = np.concatenate([self.begun[:live], other.begun])
        self.which = np.concatenate([self.which[:old], other.which[:new] + live])
        self.held = np.concatenate([self.held[:old], other.held[:new]])
        self.seats = np.concatenate([self.seats[:old], other.seats[:new] + self.seats.max() + 1])
        self.rows = old + new
        self.place()


def gridded(which: Ids, prompts: int) -> tuple[Ids, Ids]:
    """The rows of each prompt, (U,M) filled up with row 0, and the column of each row in it (R,)."""
    counts = np.bincount(which, minlength=prompts)
    rows, column = np.argsort(which, kind="stable"), np.zeros(len(which), np.int64)
    column[rows] = np.arange(len(rows)) - (np.cumsum(counts) - counts)[which[rows]]
    grid = np.zeros((prompts, counts.max(initial=1)), np.int64)
    grid[which, column] = np.arange(len(which))
    return grid, column


def kept(stays: Any) -> Ids:
    """Where `stays` (R,) is True, with as few changes of place as there can be: what stays behind the end fills the gaps."""
    rows = np.flatnonzero(stays)
    order = np.arange(len(rows))
    order[~stays[: len(rows)]] = rows[rows >= len(rows)]
    return order


def moves(order: Ids) -> tuple[Ids, Ids] | None:
    """The places that change in `order`, each once, and those that they change with."""
    to = np.flatnonzero(order != np.arange(len(order)))
    return (np.concatenate([to, order[to]]), np.concatenate([order[to], to])) if len(to) else None


def exchanged(x: Array, places: Array, others: Array) -> Array:
    """`x` with entries of its first dimension exchanged, in place (see `moves`); a tensor's places lie on its device."""
    x[places] = x[others]
    return x


def emptied(x: Tensor, columns: int) -> Tensor:
    """Zeros for as many rows, and so many columns."""
    return x.new_zeros(*x.shape[:2], columns, x.shape[3])


def resized(x: Tensor, rows: int, columns: int) -> Tensor:
    """(S,K,C,D) with more rows and columns, filled up with 0: what is masked has weight 0, and 0 times anything finite is 0."""
    if (x.shape[0], x.shape[2]) == (rows, columns):
        return x
    wider = x.new_zeros(rows, x.shape[1], columns, x.shape[3])
    wider[: x.shape[0], :, : x.shape[2]] = x
    return wider


def joined(x: Tensor, y: Tensor, live: int) -> Tensor:
    """The first `live` rows of x and then those of y, as wide as the wider."""
    seen = max(x.shape[2], y.shape[2])
    return torch.cat([resized(x[:live], live, seen), resized(y, len(y), seen)])


def barred(seen: Tensor) -> Tensor:
    """0 where True, FAR elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, FAR)
