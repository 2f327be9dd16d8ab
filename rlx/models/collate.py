"""Episodes -> named tensors: the fields that every kind of policy has, whatever its inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlx.types import Batch, Episode, Floats, Status, Turn


def batch_of(episodes: Sequence[Episode], inputs: list[Any], device: torch.device) -> Batch:
    """The batch of some episodes with at least one turn each (see FIELDS).

    Positions begin after what the first turn had seen. What later turns saw (environment text) has mask False, as have the
    ids that a stream `trained` says the policy did not choose.
    """
    rows = [positions(episode) for episode in episodes]
    streams = {name for row in rows for name in row}
    kinds = {name: next(row[name].dtype for row in rows if name in row) for name in streams}
    empty = [{name: np.zeros(len(row["turn"]), kinds[name]) for name in streams if name not in row} for row in rows]
    rows = [{**row, **more} for row, more in zip(rows, empty, strict=True)]
    fields = {name: pad([row[name] for row in rows], -1 if name == "turn" else 0) for name in streams}
    agents = {agent: i for i, agent in enumerate(sorted({e.agent for e in episodes}))}
    fields |= {
        "ret": torch.tensor([e.reward for e in episodes], dtype=torch.float32),
        "bootstrap": torch.tensor([float(e.info.get("bootstrap", 0.0)) for e in episodes]),
        "label": torch.tensor([e.label if e.label is not None else 0.0 for e in episodes]),
        "group": torch.tensor([e.group for e in episodes]),
        "agent": torch.tensor([agents[e.agent] for e in episodes]),
        "fresh": torch.tensor([bool(e.info.get("fresh")) for e in episodes]),
        "turn_mask": pad([np.array([trained(t).any() for t in e.turns]) for e in episodes]),
        "turn_reward": pad([np.array([np.sum(x) for x in paid(e)], np.float32) for e in episodes]),
        "turn_done": pad([last_done(e) for e in episodes]),
    }
    return Batch({name: value.to(device) for name, value in fields.items()}, inputs)


def positions(episode: Episode) -> dict[str, NDArray[Any]]:
    """One array for each (N,T) field: a value for each position of the episode after its prompt."""
    gaps = [0, *(len(turn.seen) for turn in episode.turns[1:])]
    mask = _joined(gaps, [trained(turn) for turn in episode.turns])
    turns = _joined(gaps, [np.full(len(turn.did), i + 1) for i, turn in enumerate(episode.turns)]) - 1
    names = {name for turn in episode.turns for name, x in turn.token.items() if x.ndim == 1} - {"trained"}
    return {
        **{name: _joined(gaps, [_stream(turn, name) for turn in episode.turns]) for name in names},
        "mask": mask,
        "turn": np.where(mask, turns, -1),
        "rollout_logp": _joined(gaps, [t.logp if len(t.logp) else np.zeros(len(t.did), np.float32) for t in episode.turns]),
        "reward": rewards(episode, gaps, mask),  # what the recipe's rewards made of it, also where a stream is called so
    }


def rewards(episode: Episode, gaps: list[int], mask: NDArray[np.bool_]) -> Floats:
    """What was paid at each position: a turn's pay on the last trained position up to its end (else on the first trained)."""
    out = np.zeros(len(mask), np.float32)
    chosen = np.flatnonzero(mask)
    end = 0
    for gap, turn, pay in zip(gaps, episode.turns, paid(episode), strict=True):
        end += gap + len(turn.did)
        if isinstance(pay, np.ndarray):
            out[end - len(turn.did) : end] += pay
        elif len(chosen):
            out[chosen[max(0, int(np.searchsorted(chosen, end)) - 1)]] += pay
    return out


def paid(episode: Episode) -> list[float | Floats]:
    """What each turn earned: as the rewards said, or all of `reward` on the last turn."""
    return episode.paid or [*[0.0] * (len(episode.turns) - 1), episode.reward]


def trained(turn: Turn) -> NDArray[np.bool_]:
    """Which ids of a turn the policy chose."""
    given = turn.token.get("trained")
    return np.ones(len(turn.did), bool) if given is None else np.asarray(given, bool)


def acted(episode: Episode) -> NDArray[np.bool_]:
    """Which positions after the prompt somebody chose, the policy or another in its place; the environment's are False."""
    gaps = [0, *(len(turn.seen) for turn in episode.turns[1:])]
    return _joined(gaps, [np.ones(len(turn.did), bool) for turn in episode.turns])


def last_done(episode: Episode) -> Floats:
    """1 on the last turn, unless the episode was cut: (K,)."""
    out = np.zeros(len(episode.turns), np.float32)
    out[-1] = float(episode.status is not Status.TRUNCATED)
    return out


def pad(rows: list[NDArray[Any]], value: float = 0) -> Tensor:
    """Rows of unequal length as one tensor, filled up on the right."""
    tensors = [torch.from_numpy(np.ascontiguousarray(row)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _stream(turn: Turn, name: str) -> NDArray[Any]:
    """A stream of a turn as float32 (truth values as they are), zeros where the turn has none."""
    x = turn.token.get(name)
    if x is None:
        return np.zeros(len(turn.did), np.float32)
    return x if x.dtype == bool else x.astype(np.float32)


def _joined(gaps: list[int], parts: list[NDArray[Any]]) -> NDArray[Any]:
    """The parts one after the other, each after a gap of zeros."""
    return np.concatenate([x for gap, part in zip(gaps, parts, strict=True) for x in (np.zeros(gap, part.dtype), part)])
