"""Time by phase, and the passes that the parent asks a worker for."""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch


class Clock:
    """Seconds by phase; what runs inside another phase counts for its own alone, and what is in none is `rest`.

    CPU seconds of the process. On a GPU seconds of the wall, with the device waited for at each change.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.open = ["rest"]
        self.spent: dict[str, float] = {}
        self.mark = self.now()

    def now(self) -> float:
        """What the seconds are counted by."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> None:
        """Add the time since the last change to the phase that is open."""
        now = self.now()
        self.spent[self.open[-1]] = self.spent.get(self.open[-1], 0.0) + now - self.mark
        self.mark = now

    def enter(self, phase: str) -> None:
        """A phase begins."""
        self.lap()
        self.open.append(phase)

    def leave(self) -> None:
        """It ends."""
        self.lap()
        self.open.pop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The phase of a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The same function, its time counted for a phase."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return call(*args, **kwargs)

        return run

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Count the time of a method for a phase."""
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    def without_optimizer(self) -> None:
        """An optimiser's step is in no phase, whoever calls it."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        register_optimizer_step_pre_hook(lambda *_: self.enter("rest"))
        register_optimizer_step_post_hook(lambda *_: self.leave())


class Passes:
    """Reports each pass of `steps` optimiser steps as a line of JSON, then waits to be asked for the next.

    The first pass is the warm-up, and ends with it. `groups` are the lengths (prompt, answers) of offline data; a trainer that
    samples tells of them as it goes (`played`).
    """

    def __init__(self, clock: Clock, steps: int, groups: list[tuple[int, list[int]]], out: TextIO, asked: TextIO) -> None:
        self.clock, self.steps, self.given, self.out, self.asked = clock, steps, groups, out, asked
        self.taken = 0
        self.begin("")

    def begin(self, word: str) -> None:
        """A pass begins; with the word `syncs` the host's waits for the GPU are counted in it."""
        self.sampled: list[tuple[int, list[int]]] = []
        self.counted = contextlib.ExitStack()
        self.waits: list[warnings.WarningMessage] = []
        if word == "syncs":
            self.waits = self.counted.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.counted.callback(torch.cuda.set_sync_debug_mode, "default")
        self.clock.lap()
        self.clock.spent = {}
        self.wall = time.perf_counter()

    def played(self, prompt: int, answers: list[int]) -> None:
        """A group of sampled answers."""
        self.sampled.append((prompt, answers))

    def step(self) -> None:
        """An optimiser step is done. Raises SystemExit where the parent asks for no more."""
        self.taken += 1
        if self.taken % self.steps:
            return
        self.clock.lap()
        report = {
            "seconds": sum(self.clock.spent.values()),
            "wall": time.perf_counter() - self.wall,
            "phases": self.clock.spent,
            "groups": self.given or self.sampled,
            "peak": peak(self.clock.device),
            "syncs": sum("synchroniz" in str(w.message) for w in self.waits),
        }
        self.counted.close()
        self.out.write(json.dumps(report) + "\n")
        self.out.flush()
        word = self.asked.readline()
        if not word:
            raise SystemExit
        self.begin(word.strip())


def peak(device: str) -> int:
    """The most bytes so far: of the process, or allocated on its GPU."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.cuda.max_memory_allocated())
