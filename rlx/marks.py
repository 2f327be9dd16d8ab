"""What a loss term or diagnostic says of itself to the learner, as decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Term = TypeVar("Term")


def whole_batch(term: Term) -> Term:
    """Mark a loss term that couples all sequences of an optimiser step (a quantile, a sort, a mean of the batch).

    The learner then goes twice over the step's units (see TorchLearner), so that the term sees all of them at once.
    """
    term.whole_batch = True  # type: ignore[attr-defined]
    return term


def vanishes_with(name: str) -> Callable[[Term], Term]:
    """Mark a loss term or diagnostic that is 0, and without gradient, at each position where its parameter `name` is 0.

    Sequences on which this is so for all terms of an update cost no backward (see `with_signal`).
    """

    def mark(term: Term) -> Term:
        term.vanishes = name  # type: ignore[attr-defined]
        return term

    return mark


def stateful(name: str, start: float, update: Callable[..., Tensor]) -> Callable[[Term], Term]:
    """Give a loss term a scalar field `name` that lives from step to step (a running mean, a controller's coefficient).

    `update` reads fields by name, the state among them, and returns its next value after each optimiser step.
    """

    def mark(term: Term) -> Term:
        term.state = (name, start, update)  # type: ignore[attr-defined]
        return term

    return mark


def marked(call: Any, name: str) -> Any:
    """What `whole_batch`, `vanishes_with` or `stateful` wrote on a term, through the partial that binds its hyperparameters."""
    return getattr(getattr(call, "func", call), name, None)
