"""The worker of `rlx.rewards.latex`, run as a script: JSON lines in, JSON lines out, nothing of rlx imported."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys

MEMORY = 4 * 2**30  # bytes of address space


def serve() -> None:
    """Answer each line {"gold", "said", "timeout"} by true or false, until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like a reply
    with contextlib.suppress(OSError, ValueError):  # not every system can limit memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        from math_verify import parse, verify
    except ImportError as error:
        print(json.dumps(str(error)), file=replies, flush=True)
        return
    print(json.dumps("ready"), file=replies, flush=True)

    def formula(text: str) -> list[object]:
        bare = text.replace("\\$", "").replace("$", "")
        return list(parse(f"${bare}$", parsing_timeout=None))

    for line in sys.stdin:
        request = json.loads(line)
        # The parent kills a late worker. If the parent is gone, the kernel does: SIGALRM has no handler here.
        signal.setitimer(signal.ITIMER_REAL, request["timeout"] + 1.0)
        try:
            same = bool(verify(formula(request["gold"]), formula(request["said"]), timeout_seconds=None))
        except Exception:  # text that no parser takes is a wrong answer
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        print(json.dumps(same), file=replies, flush=True)


if __name__ == "__main__":
    serve()
