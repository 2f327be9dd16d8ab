"""Components of a user's, named with --trust: what draws from the process's generators, what has a state, what is slow."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlx.marks import stateful
from rlx.types import Episode


def noisy(episodes: list[Episode]) -> list[float]:
    """The share of even digits, plus a little from each generator of the process."""
    noise = [random.random() + float(np.random.random()) + float(torch.rand(())) for _ in episodes]
    even = [sum(c in "02468" for c in e.completion) / max(1, len(e.completion)) for e in episodes]
    return [a + 0.1 * b for a, b in zip(even, noise, strict=True)]


def slow(episodes: list[Episode]) -> list[float]:
    """Says in the file `playing` (beside the run, in RESUME_MARK) that a rollout is being paid, for a moment."""
    mark = Path(os.environ["RESUME_MARK"])
    mark.touch()
    time.sleep(0.01)
    mark.unlink()
    return [0.0 for _ in episodes]


def next_mean(mean_reward: Tensor, ret: Tensor) -> Tensor:
    """A running mean of the episodes' rewards."""
    return 0.9 * mean_reward + 0.1 * ret.mean()


@stateful("mean_reward", 0.0, next_mean)
def against_mean(logp: Tensor, ret: Tensor, mean_reward: Tensor, mask: Tensor) -> Tensor:
    """REINFORCE with a running mean as its baseline: (N,T)."""
    return torch.where(mask, -logp * (ret[:, None] - mean_reward), 0.0)
