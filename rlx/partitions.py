"""What ZeRO's stages 1 to 3 divide, as torch.optim has it for whole parameters: gathered one by one, and put back.

DeepSpeed flattens the parameters and gives each rank a part, in float32; these parts are what the optimiser steps, and of what
its state is. A parameter has a fragment on one rank, on several, or under stage 3 on each. `zero` is DeepSpeed's optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlx import world
from rlx.types import ConfigError

STEP = "step"  # the one number of an optimiser's state that is no number for each weight
PLACED = ("params", "foreach", "fused")  # of a group: what depends on where its weights are


def parts(zero: Any) -> list[Tensor]:
    """The parts of this rank."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        return list(zero.fp32_partitioned_groups_flat)
    return [part for group in zero.optimizer.param_groups for part in group["params"]]


def forget_gradient(zero: Any) -> None:
    """After a step: DeepSpeed would use a weight's gradient once more in a step in which the weight has none."""
    for part in parts(zero):
        if part.grad is not None:  # kept from step to step where the optimiser is offloaded
            part.grad.zero_()
    if hasattr(zero, "grad_partitions_flat_buffer"):  # stage 3
        zero.grad_partitions_flat_buffer.zero_()


def check_divisible(zero: Any, name: str) -> None:
    """Raises ConfigError where the optimiser's state is not one number for each weight, so that it differs on flat parts."""
    for part in parts(zero):
        for key, x in zero.optimizer.state[part].items():
            if key != STEP and getattr(x, "shape", None) != part.shape:
                raise ConfigError(
                    f"optim {name!r}: its state {key!r} is not one number for each weight, and ZeRO gives it weights cut into "
                    "flat parts, on which it is another method; take launch=zero0 or launch=local"
                )


def gathered(zero: Any, parameters: Sequence[nn.Parameter]) -> dict[int, dict[str, Any]]:
    """The state of each parameter by its number, on the CPU of rank 0; empty before the first step. All ranks call it."""
    from deepspeed.utils import safe_get_full_optimizer_state

    known = zero.optimizer.state.get(parts(zero)[0], {})
    found: dict[int, dict[str, Any]] = {i: {} for i in range(len(parameters))} if known else {}
    for i, state in found.items():
        for key in known:
            if key == STEP:
                state[key] = torch.tensor(float(known[key]))
            else:
                kept(state, key, safe_get_full_optimizer_state(parameters[i], key))
    return found


def gathered_weights(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The float32 weights of the optimiser, on the CPU of rank 0. All ranks call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[int, Tensor] = {}
    for i, parameter in enumerate(parameters):
        kept(found, i, safe_get_full_fp32_param(parameter))
    return list(found.values())


def settings(zero: Any, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of each group of whole parameters as they are: an optimiser may change its own."""
    live = [{key: x for key, x in group.items() if key not in PLACED} for group in zero.optimizer.param_groups]
    return [{key: own.get(key, x) for key, x in group.items()} for group, own in zip(groups, live, strict=True)]


def kept(found: dict[Any, Any], key: Any, x: Tensor) -> None:
    """Rank 0 writes the state, so that the others need not hold it."""
    if world.leads():
        found[key] = x.detach().cpu().clone()


@torch.no_grad()
def put(zero: Any, parameters: Sequence[nn.Parameter], states: Mapping[int, Mapping[str, Any]]) -> None:
    """Make the optimiser's state of that of whole parameters. A parameter that has none never had a gradient: zeros."""
    keys = list(dict.fromkeys(key for state in states.values() for key in state))
    if not keys:
        return
    steps = [state[STEP] for state in states.values() if STEP in state]
    for part in parts(zero):
        zero.optimizer.state[part] = {key: torch.zeros_like(part, requires_grad=False) for key in keys if key != STEP}
        if steps:
            zero.optimizer.state[part][STEP] = torch.tensor(max(map(float, steps)))
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 look the fragments up once
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    for i, state in states.items():
        for key in state.keys() - {STEP}:
            put_one(zero, parameters[i], state[key], key)


def put_settings(zero: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Set what the optimiser has of the settings of its groups."""
    for group, saved in zip(zero.optimizer.param_groups, groups, strict=True):
        group.update({key: x for key, x in saved.items() if key in group and key not in PLACED})


@torch.no_grad()
def put_weights(zero: Any, parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> None:
    """Set the weights: those of the optimiser, and under stage 3 those of the forward, which nobody else has whole."""
    from deepspeed.runtime.zero import GatheredParameters

    for parameter, weight in zip(parameters, weights, strict=True):
        if hasattr(parameter, "ds_id"):
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(weight)
        put_one(zero, parameter, weight, None)


def put_one(zero: Any, parameter: Any, x: Tensor, key: str | None) -> None:
    """This rank's fragment of a parameter's weights (no key) or of its state."""
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(x, key)
        return
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(group=parameter.ds_process_group)
    padded = nn.functional.pad(x.flatten(), (0, size * world.size() - x.numel()))  # to what the ranks share evenly
    zero.set_local_hp_param(padded[size * rank : size * (rank + 1)], parameter, key)
