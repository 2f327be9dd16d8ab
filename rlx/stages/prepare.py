"""From a collated batch to what its loss terms read: fields of other models, derives, advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlx.stages.models import prefix
from rlx.stages.rows import numbers
from rlx.tensors import by_turn, seq_sum
from rlx.types import Advantage, Batch, Component, Derive, Episode, Policy
from rlx.units import computed


def fill(
    batch: Batch,
    reads: set[str],
    models: Mapping[str, Policy],
    owners: Mapping[str, Policy],
    token_budget: int,
    temperature: float,
    less: float = 1.0,
) -> None:
    """Add the fields of `reads` that models make and the forward in training does not: `ref_logp`, `critic_value`, `old_value`.

    `owners` maps what the trained models offer to the model that offers it: `old_x` is its x of now. `less` of what the token
    budget allows is read at a time, where memory did not suffice (the learner's `share`). The engine's log-probs are the old
    policy's, but where something reads both: there a forward computes `old_logp`, the trainer's own.
    """
    wanted: dict[str, tuple[Policy, dict[str, str]]] = {}
    for name, policy in models.items():
        wanted[prefix(name)] = policy, {f"{prefix(name)}_{x}": x for x in policy.offers}
    drew = {"logp": models["policy"]} if "policy" in models else {}  # a critic computes log-probs as well, but drew nothing
    owners = {**owners, **drew}
    for x in sorted(owners):  # in the same order on every rank: forwards are divided among them
        wanted.setdefault(f"old {id(owners[x])}", (owners[x], {}))[1][f"old_{x}"] = x
    if "old_logp" in reads and "rollout_logp" not in reads:  # those that drew the tokens are known, and cost no forward
        batch["old_logp"] = batch["rollout_logp"]
    for policy, fields in wanted.values():
        missing = {name: x for name, x in fields.items() if name in reads and name not in batch}
        if missing:
            found = computed(policy, batch, set(missing.values()), token_budget, temperature, less)
            batch.update({name: found[x] for name, x in missing.items()})


def columns(batch: Batch, names: Sequence[str], episodes: Sequence[Episode]) -> None:
    """Add numeric columns of the data as fields (N,)."""
    for name in names:
        batch[name] = torch.tensor(numbers(episodes, name, "columns: a batch"), device=batch["ret"].device)


def credit(batch: Batch, derive: Sequence[Component[Derive]], advantage: Sequence[Component[Advantage]]) -> None:
    """Run the derives in order, then the advantages on the whole batch: a weighted sum, times `correction` if there is one."""
    for d in derive:
        value = d.call(*(batch[name] for name in d.reads))
        batch[d.into] = batch[d.into] + value if d.add else value
        if d.into == "reward":  # what is paid along the way is part of the total
            batch["ret"] = seq_sum(batch["reward"], batch["mask"])
            if "turn_reward" in batch:
                batch["turn_reward"] = by_turn(batch["reward"], batch["turn"], batch["turn_mask"].shape[1])
    if advantage:
        parts = [a.weight * a.call(*(batch[name] for name in a.reads)) for a in advantage]
        batch["adv"] = sum(parts[1:], parts[0])
        if "correction" in batch:
            batch["adv"] = batch["adv"] * batch["correction"]


def corrections(batch: Batch) -> dict[str, float]:
    """The weights by which the rollout engine's gap is corrected, over trained tokens; nothing where none are."""
    if "correction" not in batch or not batch["mask"].any():
        return {}
    weights = batch["correction"][batch["mask"]]
    shown = {"mean": weights.mean(), "min": weights.min(), "max": weights.max(), "zero": (weights == 0).float().mean()}
    return {f"correction/{name}": float(x) for name, x in shown.items()}
