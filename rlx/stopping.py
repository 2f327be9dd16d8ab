"""How a command is stopped from outside: by SIGINT (Ctrl-C) or SIGTERM (a scheduler)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

SAID = b"\nends after this step, with its state saved; Ctrl-C once more ends at once\n"


@dataclass
class Stop:
    """`number`: the signal that asked for the end, 0 while none did. `waits`: the end of a step comes first."""

    number: int = 0
    waits: bool = False


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Both signals raise KeyboardInterrupt(number); where `waits` is set, the first is noted, and then only SIGINT does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: object) -> None:
        again = stop.number and number == signal.SIGINT
        first, stop.number = not stop.number, stop.number or number
        if again or not stop.waits:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is closed then is closed whole
            raise KeyboardInterrupt(stop.number)
        if first:
            with contextlib.suppress(OSError):
                os.write(2, SAID)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
