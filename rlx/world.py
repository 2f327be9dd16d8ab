"""The processes of a run: which of them this is, and what they tell each other. One process alone answers itself at once.

Each rank has all episodes, fields and weights that are not in training, so that only three things are divided: playing
(`rlx/stages/played.py`), forwards without gradient (`rlx/units.py`) and forwards with it (`rlx/learner.py`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this is the process that writes the run directory."""
    return rank() == 0


# --------------------------------------------------------------------------- what every rank calls together
def first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank."""
    if size() == 1:
        return make()
    box: list[Any] = [make() if leads() else None]
    with phase("waiting for rank 0"):
        dist.broadcast_object_list(box, src=0)
    made: T = box[0]
    return made


def gathered(item: T) -> list[T]:
    """The items of all ranks, in their order."""
    if size() == 1:
        return [item]
    box: list[Any] = [None] * size()
    with phase("waiting for the other ranks"):
        dist.all_gather_object(box, item)
    return box


def summed(x: Tensor) -> Tensor:
    """The sum over ranks; `x` itself is changed."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def largest(x: Tensor) -> Tensor:
    """The largest over ranks, number by number; `x` itself is changed."""
    if size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def barrier() -> None:
    """Go on when every rank has come here."""
    gathered(None)


# --------------------------------------------------------------------------- what the process that started them is told
@dataclass
class Watch:
    """What a rank reports in `folder`: its phase (rank-1.phase) and, where a phase takes over `timeout` seconds, its stacks.

    A phase that says that it goes on (`progress`) has its time anew. The timer is faulthandler's, a thread of C: it needs no
    lock of Python's, so a rank that is stuck anywhere ends.
    """

    folder: Path
    timeout: float
    step: str = ""
    began: float = 0.0
    phases: list[str] = field(default_factory=lambda: ["start"])
    stacks: IO[str] | None = None

    def begin(self) -> None:
        """Begin the time of the innermost phase."""
        if self.stacks is None:
            # The watch of another rank may fire first: the launcher then ends this one, which shows where it was as well.
            self.stacks = (self.folder / f"rank-{rank()}.stacks").open("w", encoding="utf-8")
            faulthandler.register(signal.SIGTERM, file=self.stacks, chain=True)
        text = " in ".join([*self.phases[:0:-1], *([self.step] if self.step else [])]) or self.phases[0]
        (self.folder / f"rank-{rank()}.phase").write_text(text, encoding="utf-8")
        self.time()

    def time(self) -> None:
        """Begin the time anew."""
        self.began = time.monotonic()
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=self.stacks or sys.stderr)

    def stop_asked(self) -> int:
        """The signal by which the user wants the run to end, or 0."""
        path = self.folder / "stop"
        return int(path.read_text(encoding="utf-8")) if path.exists() else 0


watch: Watch | None = None


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done inside goes by this name where it does not end."""
    if watch is None:
        yield
        return
    watch.phases.append(name)
    watch.begin()
    try:
        yield
    finally:
        watch.phases.pop()
        watch.begin()


def progress() -> None:
    """The phase goes on, however long it takes: a token was drawn, say. It costs next to nothing."""
    if watch is not None and time.monotonic() - watch.began > watch.timeout / 10:
        watch.time()


def stage(name: str) -> None:
    """A stage begins."""
    step(f"stage {name!r}")


def step(name: str) -> None:
    """A step begins."""
    if watch is not None:
        watch.step = name
        watch.begin()


def stop_asked() -> int:
    """The signal by which the user wants the run of these ranks to end, or 0. Ranks may see it at different times."""
    return watch.stop_asked() if watch is not None else 0


def join(folder: Path, timeout: float) -> None:
    """Become a rank of the run that a launcher has started: RANK, WORLD_SIZE and MASTER_ADDR are in the environment."""
    import datetime

    global watch
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The watch ends a rank first: it knows what the rank was doing.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=2 * timeout + 60))
    watch = Watch(folder, timeout)
    watch.begin()
