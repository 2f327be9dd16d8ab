"""A batch in units, of which one forward reads each: how it is cut, and which rank gets which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rlx import world
from rlx.offload import present
from rlx.types import Batch, Policy


def halves(batch: Batch) -> list[Batch]:
    """Two parts of whole groups, every second group in the second."""
    groups = {g: i for i, g in enumerate(dict.fromkeys(batch["group"].tolist()))}
    side = [groups[g] % 2 for g in batch["group"].tolist()]
    return [batch.take([i for i, s in enumerate(side) if s == part]) for part in range(min(2, len(groups)))]


def units(policy: Policy, batch: Batch, token_budget: int, *, whole_groups: bool = False) -> Iterator[Batch]:
    """Parts of which one forward reads at most `token_budget` tokens, padding counted.

    A part has at least one sequence, or with `whole_groups` one group, however long that is.
    """
    return map(batch.take, policy.split(batch, token_budget, whole_groups=whole_groups))


def own_units(
    policy: Policy, batch: Batch, token_budget: int, less: float = 1.0, *, whole_groups: bool = False
) -> list[tuple[Batch, bool]]:
    """The units of this rank, and of each whether it is a repeated one. So small, in several ranks, that each rank gets some.

    `less` makes them smaller than the budget and the batch make them, where memory did not suffice.

    Every rank has as many, because each is a collective where weights are divided: a rank that has fewer goes through the
    shortest unit once more, and what that gives counts nothing.
    """
    size = [x.length for x in batch.inputs]
    most, parts = token_budget, policy.split(batch, token_budget, whole_groups=whole_groups)
    wanted = math.ceil(max(world.size(), len(parts)) / less)
    while len(parts) < wanted and most > 1:  # what a prompt that answers share counts, only the policy knows
        most = min(most, sum(size)) // 2
        parts = policy.split(batch, most, whole_groups=whole_groups)
    every = dealt([sum(size[i] for i in part) for part in parts], world.size())
    own = [(batch.take(parts[i]), False) for i in every[world.rank()]]
    shortest = min(parts, key=lambda part: sum(size[i] for i in part))
    return own + [(batch.take(shortest), True) for _ in range(max(map(len, every)) - len(own))]


def counted(x: Tensor, repeated: bool) -> Tensor:
    """What a unit adds: x, or exactly 0 where it is a repeated one (0 times infinity is nan)."""
    return torch.zeros_like(x) if repeated else x


def stop_gradient(fields: Mapping[str, Tensor]) -> None:
    """Have a backward go through all that made these fields, as other ranks' do, with a gradient of exactly 0 from here on."""
    for x in fields.values():
        if x.requires_grad:
            x.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]


def dealt(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of some things of these sizes each rank gets: the largest first, to the rank that has least; in order."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(found, key=lambda own: sum(sizes[j] for j in own)).append(i)
    return [sorted(own) for own in found]


@torch.no_grad()
def computed(
    policy: Policy, batch: Batch, wants: set[str], token_budget: int, temperature: float = 1.0, less: float = 1.0
) -> dict[str, Tensor]:
    """The fields of `wants` that a policy offers, for a whole batch and without gradient; `less` as in `own_units`."""
    numbered = Batch({**batch, "index": torch.arange(len(batch.inputs), device=policy.device)}, batch.inputs)
    out: dict[str, Tensor] = {}
    with present(policy), policy.autocast():
        for unit, repeated in own_units(policy, numbered, token_budget, less):
            for name, x in policy.forward(unit, wants, temperature).items():
                out.setdefault(name, x.new_zeros((len(batch.inputs), *x.shape[1:])))[unit["index"]] += counted(x, repeated)
    return {name: world.summed(out[name]) for name in sorted(out)}
