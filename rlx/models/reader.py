"""How a causal model reads on while it is sampled from: the state of a batch of unfinished sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from rlx.types import ConfigError, Ids, View

if TYPE_CHECKING:
    from rlx.models.language import LanguageModel


class Reader(Protocol):
    """Sequences that a model has begun to read, one a row.

    `logits` (R,V) are of the id that comes next in each row. `ahead` holds, for each view that the reader was made from,
    the ids that have to be read before one is drawn (the rest of a view's prefix).
    """

    @property
    def logits(self) -> Tensor:
        """(R,V)."""
        ...

    ahead: list[Ids]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be named several times."""

    def read(self, token: Tensor) -> None:
        """Read one more id in each row: (R,)."""


class CausalReader:
    """Views and their prefixes, padded on the left, are read at once; each id after them by the key/value cache."""

    def __init__(self, policy: LanguageModel, views: list[View], longest: int) -> None:
        """Read the views, which turns of at most `longest` ids follow. Raises ConfigError where these exceed the context."""
        from transformers import DynamicCache

        self.policy = policy
        self.ahead: list[Ids] = [np.zeros(0, np.int64) for _ in views]
        prompts = [np.concatenate([view.ids, view.prefix]) for view in views]
        width, seen = max(len(p) for p in prompts), max(len(view.ids) for view in views)
        room = getattr(policy.module.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and seen + longest > room:
            raise ConfigError(
                f"model {policy.source!r}: a prompt of {seen} tokens and max_new_tokens={longest} exceed its context of {room}"
            )
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
        self.place = (last if last.dim() == 2 else last.amax(0)) + 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be named several times."""
        self.cache.batch_select_indices(rows)
        self.logits, self.attend, self.place = self.logits[rows], self.attend[rows], self.place[rows]

    def read(self, token: Tensor) -> None:
        """Read one more id in each row: (R,)."""
        self.attend = torch.nn.functional.pad(self.attend, (0, 1), value=1)
        with self.policy.autocast():
            self.logits = self.policy.module(
                input_ids=token[:, None],
                attention_mask=self.attend,
                position_ids=self.place,
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
        self.place = self.place + 1
