"""Fill batches with what a frozen model says, in one process or as a rank of several."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlx import offload, world
from rlx.models.language import LanguageModel
from rlx.models.load import tiny
from rlx.stages.frozen import Frozen
from rlx.types import Batch, Episode, Message, Task, Turn

ANSWERS = (2, 5, 3, 9, 1, 4)  # ids of each; a prompt has one more
ROWS = ([0, 1, 2], [2, 3, 0, 4, 5], [5, 4, 3, 2, 1, 0])  # of which nothing is known, something, everything


class Counting(LanguageModel):
    """Counts the tokens that it reads; `at`: where its weights are then."""

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        self.read += sum(x.length for x in batch.inputs)
        self.at.add(places(self))
        return super().forward(batch, want, temperature)


def places(policy: Any) -> tuple[int, ...]:
    """The storage of each weight."""
    return tuple(x.data_ptr() for x in policy.module.parameters())


def steps(folder: Path) -> list[tuple[Tensor, int]]:
    """What is said of the rows of each step, and the tokens that were read for it.

    Where models are offloaded, other storage than the host's is read, and at the end of each step there is none.
    """
    made: Any = tiny(layers=1, hidden=16, heads=2, kv_heads=2, ffn=32)
    made.__class__, made.read, made.at = Counting, 0, set()
    offload.keep(made)
    host = places(made)
    draw = np.random.default_rng(0)
    turns = [Turn(draw.integers(2, 250, 1 + n), draw.integers(2, 250, n), np.zeros(0, np.float32)) for n in ANSWERS]
    batch = made.collate([Episode(Task((Message("user", "?"),)), i // 2, [turn]) for i, turn in enumerate(turns)])
    kept = Frozen(made, {"ref_logp": "logp"}, folder, print)
    found = []
    for rows in ROWS:
        part, made.read, made.at = batch.take(rows), 0, set()
        kept.fill(part, 12)
        found.append((part["ref_logp"], made.read))
        assert (places(made), bool(made.at)) == (host, made.read > 0)
        assert all(bool(set(at) & set(host)) != offload.enabled for at in made.at)
    return found


def in_one() -> list[tuple[Tensor, int]]:
    """What one process finds."""
    with tempfile.TemporaryDirectory() as folder:
        return steps(Path(folder))


def in_ranks() -> dict[str, Any]:
    """What each rank finds, and finds by what is on disk then; the files that each has. Each has a disk of its own.

    `offloaded` is what is found first where the model is in the host's memory.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        first, again = world.gathered(steps(Path(folder))), world.gathered(steps(Path(folder)))
        offload.enabled = True
        offloaded = world.gathered(steps(Path(other)))
        offload.enabled = False
        files = world.gathered(len(list(Path(folder).glob("*/*.npz"))))
        return {"first": first, "again": again, "offloaded": offloaded, "files": files}
