"""Activation checkpointing (gradient checkpointing): layers are computed once more in the backward pass, not kept.

Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rlx.types import ConfigError


def recompute(module: Any, source: str) -> None:
    """Have each layer of a transformers model keep its input alone for the backward pass, where there is one.

    transformers' own switch works in train mode alone, and takes the cache of keys and values away. Raises ConfigError where
    the model's layers cannot be told.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model.activation_checkpointing: model {source!r} has no layers that transformers marks as such; leave it out"
        )
    for layer in layers:
        # A partial of a bound method: in a copy of the module it is of the copy's layer.
        layer.forward = partial(checkpointed, layer.forward)


def checkpointed(forward: Any, *given: Any, **settings: Any) -> Any:
    """What a layer computes; with gradient, from its input alone, and with the same random numbers in the second forward."""
    if not torch.is_grad_enabled():
        return forward(*given, **settings)
    return checkpoint(partial(forward, **settings), *given, use_reentrant=False)
