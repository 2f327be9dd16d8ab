"""How a model reads on while it is sampled from: the state of a batch of unfinished sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlx.types import ConfigError, Ids, View

if TYPE_CHECKING:
    from rlx.models.language import LanguageModel


class Reader(Protocol):
    """Sequences that a model has begun to read, one a row, `counts[i]` rows for view i.

    `logits` (R,V) are of the id that comes next in each row. `seats` has for each row, as the rows stand, its number among
    those that were begun. `ahead` holds, for each view that the reader was made from, the ids that have to be read before one
    is drawn (the rest of a view's prefix). A reader that `joins` takes up more rows while it is under way.
    """

    ahead: list[Ids]
    joins: bool

    @property
    def logits(self) -> Tensor:
        """(R,V)."""
        ...

    @property
    def seats(self) -> Ids:
        """(R,)."""
        ...

    def keep(self, rows: Ids) -> None:
        """Go on with these rows, in this order, which is one that `kept` gives."""

    def read(self, token: Tensor) -> None:
        """Read one more id in each row: (R,)."""

    def join(self, views: Sequence[View], counts: Sequence[int]) -> None:
        """Begin `counts[i]` rows for each view; they follow the rows that are there."""


class DynamicReader:
    """Any causal model, with a cache of transformers: views and prefixes are padded on the left, and each row holds its own."""

    joins = False

    def __init__(self, policy: LanguageModel, views: Sequence[View], counts: Sequence[int], longest: int) -> None:
        """Read the views, which turns of at most `longest` ids follow. Raises ConfigError where these exceed the context."""
        from transformers import DynamicCache

        check_room(policy, views, longest)
        self.policy = policy
        self.ahead: list[Ids] = [np.zeros(0, np.int64) for _ in views]
        prompts = [np.concatenate([view.ids, view.prefix]) for view in views]
        width = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width), int(policy.tokenizer.pad_token_id))
        attend = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.from_numpy(prompt)
            attend[i, width - len(prompt) :] = 1
        ids, attend = ids.to(policy.device), attend.to(policy.device)
        self.attend = attend
        self.cache = DynamicCache(config=policy.module.config)
        with policy.autocast():
            read = policy.reading(ids, attend, [view.images for view in views])
            out = policy.module(**read, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = out.logits[:, -1]
        last = read["position_ids"][..., -1:]  # (R,1); of time, height and width (3,R,1), text goes on after the largest
        self.at = (last if last.dim() == 2 else last.amax(0)) + 1
        rows = np.repeat(np.arange(len(views)), counts)
        self.seats = np.arange(len(rows))
        if len(rows) != len(views) or (rows != self.seats).any():
            self._select(torch.from_numpy(rows))

    def keep(self, rows: Ids) -> None:
        """Go on with these rows, in this order."""
        self.seats = self.seats[rows]
        self._select(torch.from_numpy(rows))

    def _select(self, rows: Tensor) -> None:
        rows = rows.to(self.policy.device)
        self.cache.batch_select_indices(rows)
        self.logits, self.attend, self.at = self.logits[rows], self.attend[rows], self.at[rows]

    def read(self, token: Tensor) -> None:
        """Read one more id in each row: (R,)."""
        self.attend = torch.nn.functional.pad(self.attend, (0, 1), value=1)
        with self.policy.autocast():
            self.logits = self.policy.module(
                input_ids=token[:, None],
                attention_mask=self.attend,
                position_ids=self.at,
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
        self.at = self.at + 1

    def join(self, views: Sequence[View], counts: Sequence[int]) -> None:
        """It does not."""
        raise NotImplementedError


def check_room(policy: LanguageModel, views: Sequence[View], longest: int) -> None:
    """Raises ConfigError where a view and a turn of `longest` ids exceed the context."""
    seen = max(len(view.ids) for view in views)
    room = getattr(policy.module.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and seen + longest > room:
        raise ConfigError(
            f"model {policy.source!r}: a prompt of {seen} tokens and max_new_tokens={longest} exceed its context of {room}"
        )


@dataclass
class Memory:
    """What a reader holds when its turns are over, for the next turns of the same conversations.

    It serves those that the next reader begins with, if it has the beginning of each; what that reader joins is read anew.

    `rows`: the ids of a conversation up to its last drawn one, which is not read yet, and the row that holds them.
    """

    reader: Any = None
    rows: dict[bytes, int] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)

    def store(self, reader: Any, conversations: Sequence[Ids]) -> None:
        """Keep a reader, whose row r has read all of `conversations[r]` but its last id."""
        self.reader, self.lengths = reader, {len(ids) for ids in conversations}
        self.rows = {ids.tobytes(): r for r, ids in enumerate(conversations)}

    def clear(self) -> None:
        """Keep nothing."""
        self.reader, self.rows, self.lengths = None, {}, set()

    def find(self, view: View) -> tuple[int, Ids] | None:
        """The row that holds the beginning of a view, and the ids that it has not read."""
        for length in sorted((n for n in self.lengths if n <= len(view.ids)), reverse=True):
            if (row := self.rows.get(view.ids[:length].tobytes())) is not None:
                return row, np.concatenate([view.ids[length - 1 :], view.prefix])
        return None


@contextlib.contextmanager
def remembering(policy: Any) -> Iterator[None]:
    """Where the turns that a policy takes go on from what it has read for earlier ones. Its weights must stay as they are."""
    policy.memory = Memory()
    try:
        yield
    finally:
        policy.memory = None
