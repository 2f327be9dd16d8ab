"""Playing is divided among the ranks by group; every rank gets all that was played."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlx import world
from rlx.types import Component, ConfigError, Episode, Message, Sampler, Task

Played = Callable[[list[Episode]], list[Episode]]
Known = Task | Message  # what episodes have in common with those that every rank has


def together(sampler: Component[Sampler]) -> bool:
    """Whether a sampler makes groups of its own out of all rows of a step (`together` on its function): one rank plays it."""
    return bool(getattr(getattr(sampler.call, "func", sampler.call), "together", False))


def spread(rows: list[Episode], play: Played, *, together: bool = False) -> list[Episode]:
    """What `play` makes of the rows, each rank of its share of their groups, in the order of the rows.

    Draws depend on group, sample and position, so that who plays a group changes nothing in it. With `together`, rank 0
    plays them all. Raises ConfigError where a share has episodes of groups that are not its rows'.
    """
    if world.size() == 1:
        return play(rows)
    tasks = [row.task for row in rows]
    if together:
        return led(lambda: play(rows), tasks)
    groups = list(dict.fromkeys(row.group for row in rows))
    own = {groups[i] for i in np.array_split(np.arange(len(groups)), world.size())[world.rank()].tolist()}
    mine = [row for row in rows if row.group in own]
    made = play(mine) if mine else []
    if strange := {e.group for e in made} - own:
        raise ConfigError(
            f"the sampler made episodes of the groups {sorted(strange)[:4]}, which its rows do not have: in several processes "
            "they could meet another rank's; write `my_sampler.together = True`, and one rank plays all rows"
        )
    return [e for part in world.gathered(packed(made, tasks)) for e in unpacked(part, tasks)]


def led(make: Callable[[], list[Episode]], known: Sequence[Known]) -> list[Episode]:
    """The episodes that rank 0 makes, on every rank; of what is `known` to all, each keeps its own."""
    return make() if world.size() == 1 else unpacked(world.first(lambda: packed(make(), known)), known)


class Packer(pickle.Pickler):
    """Every rank has what is `known`: a number stands for each, so that its images are not sent and stay the same objects."""

    def __init__(self, file: io.BytesIO, known: Sequence[Known]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.numbers = {id(x): i for i, x in enumerate(known)}

    def persistent_id(self, obj: Any) -> int | None:
        """The number of a task or message that is known."""
        return self.numbers.get(id(obj)) if isinstance(obj, Known) else None


class Unpacker(pickle.Unpickler):
    """The other way round."""

    def __init__(self, file: io.BytesIO, known: Sequence[Known]) -> None:
        super().__init__(file)
        self.known = known

    def persistent_load(self, pid: Any) -> Known:
        """What a number stands for."""
        return self.known[int(pid)]


def packed(episodes: list[Episode], known: Sequence[Known]) -> bytes:
    """Episodes as another rank reads them."""
    file = io.BytesIO()
    Packer(file, known).dump(episodes)
    return file.getvalue()


def unpacked(data: bytes, known: Sequence[Known]) -> list[Episode]:
    """The episodes that another rank has packed."""
    episodes: list[Episode] = Unpacker(io.BytesIO(data), known).load()
    return episodes
