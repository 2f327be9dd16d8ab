"""A policy that is a mixture of others, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlx.models.language import LanguageModel
from rlx.models.reader import Reader
from rlx.types import ConfigError, Ids, View


class Mixture(LanguageModel):
    """pi(y_t | y_<t) proportional to prod_i pi_i(y_t | y_<t)^w_i: the geometric mixture of some policies of one vocabulary.

    `parts` are the policies themselves, with their weights: where one is trained, the mixture moves with it. It is never
    trained itself (Nash-MD's opponent, Munos et al. 2023, arXiv 2312.00886, section 6).

    Raises ConfigError: a part that is no causal language model of text, or parts of several vocabularies.
    """

    def __init__(self, parts: Sequence[tuple[LanguageModel, float]]) -> None:
        first = parts[0][0]
        for policy, _ in parts:
            name = getattr(policy, "source", type(policy).__name__)
            if type(policy) is not LanguageModel:  # what images, an encoder or observations would be, the forward cannot know
                raise ConfigError(f"mix: model {name!r} is no causal language model of text alone, and only these are mixed")
            if policy.tokenizer.get_vocab() != first.tokenizer.get_vocab():
                raise ConfigError(f"mix: models {first.source!r} and {name!r} have different vocabularies; mix those of one")
        module = Mixed([policy.module for policy, _ in parts], [weight for _, weight in parts])
        super().__init__(module, first.tokenizer, first.device, bf16=first.bf16, source=first.source)
        self.parts, self.engine = list(parts), first.engine

    def parameters(self) -> list[torch.nn.Parameter]:
        """None: the parts are trained, or not, by themselves."""
        return []

    def reader(self, views: Sequence[View], counts: Sequence[int], longest: int) -> Reader:
        """The views, read by every part."""
        return MixedReader([(policy.reader(views, counts, longest), weight) for policy, weight in self.parts])


class Mixed(nn.Module):
    """The forward of a mixture, without a cache: logits = sum_i w_i log pi_i."""

    def __init__(self, modules: Sequence[Any], weights: Sequence[float]) -> None:
        super().__init__()
        self.members, self.weights = nn.ModuleList(modules), weights
        self.config, self.generation_config = modules[0].config, modules[0].generation_config

    def forward(self, **settings: Any) -> SimpleNamespace:
        """The logits of the mixture, (N,L,V)."""
        return SimpleNamespace(
            logits=mixed([(m(**settings).logits, w) for m, w in zip(self.members, self.weights, strict=True)])
        )


class MixedReader:
    """Several readers of the same rows."""

    def __init__(self, parts: Sequence[tuple[Reader, float]]) -> None:
        self.parts = parts
        self.ahead: list[Ids] = parts[0][0].ahead
        self.joins = all(reader.joins for reader, _ in parts)

    @property
    def seats(self) -> Ids:
        """The rows as they stand: the same in every part."""
        return self.parts[0][0].seats

    @property
    def logits(self) -> Tensor:
        """(R,V) of the id that comes next."""
        return mixed([(reader.logits, weight) for reader, weight in self.parts])

    def keep(self, rows: Ids) -> None:
        """Go on with these rows, in this order."""
        for reader, _ in self.parts:
            reader.keep(rows)

    def read(self, token: Tensor) -> None:
        """Read one more id in each row: (R,)."""
        for reader, _ in self.parts:
            reader.read(token)

    def join(self, views: Sequence[View], counts: Sequence[int]) -> None:
        """Begin `counts[i]` rows for each view."""
        for reader, _ in self.parts:
            reader.join(views, counts)


def mixed(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """sum_i w_i log softmax(logits_i), of the same shape."""
    return torch.stack([weight * torch.log_softmax(logits.float(), -1) for logits, weight in parts]).sum(0)
