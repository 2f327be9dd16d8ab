"""What a stage's state consists of: whatever has a state here is registered by name with `Context.resume`."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from rlx import world
from rlx.rollout.noise import key
from rlx.stages.models import ModelSpec, named_weights
from rlx.types import Policy


class State(Protocol):
    """Something that changes from step to step. What it gives and takes is made of what `rlx/encoding.py` can write."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides what the next step does."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...


class Weights:
    """The weights of a model that change: those in training, or all of a model that follows another."""

    def __init__(self, policy: Policy, *, trained: bool) -> None:
        self.named = {name: x for name, x in named_weights(policy).items() if x.requires_grad or not trained}

    def state_dict(self) -> dict[str, Any]:
        """Name -> tensor."""
        return dict(self.named)

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Into the weights that are there: optimisers hold these."""
        for name, weight in self.named.items():
            weight.copy_(saved[name])


def changing(models: Mapping[str, Any], specs: Mapping[str, ModelSpec], trained: Collection[str]) -> dict[str, State]:
    """The weights of those models of a stage that are in training, follow another or are renewed."""
    follow = {name for name, spec in specs.items() if spec.ema or spec.refresh is not None}
    return {
        f"models/{name}": Weights(model, trained=name not in follow)
        for name, model in models.items()
        if name in follow or name in trained
    }


class Generators:
    """The generators of each process, for components of the user's and libraries. rlx itself draws by counters."""

    def __init__(self, *seed: int) -> None:
        number = key(*seed) % 2**32
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    def state_dict(self) -> dict[str, Any]:
        """Those of Python, numpy and torch, and of the device, of each rank. All ranks call it."""
        own = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        return {"ranks": world.gathered(own)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there. Where there were fewer ranks, the others go on from theirs."""
        own = saved["ranks"][world.rank() % len(saved["ranks"])]
        random.setstate(own["python"])
        np.random.set_state(own["numpy"])
        torch.set_rng_state(own["torch"])
        if torch.cuda.is_available() and own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"])
