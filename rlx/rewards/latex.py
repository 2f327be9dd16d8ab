"""Comparison of formulas by math_verify, in a worker process that has a hard time limit.

math_verify hands text to sympy, which can run for ever (a tower of powers) inside one C call, and its own limits are
alarm signals, which only reach a main thread. So each process of a run has one long-lived worker process for this work;
a worker that is late is killed, and the next comparison starts a new one. This bounds time and memory; it does not
contain hostile code.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path

from rlx.types import ConfigError

START_SECONDS = 60.0  # importing math_verify takes one or two seconds, more on a cold disk

_worker: subprocess.Popen[bytes] | None = None
_lock = threading.Lock()


def same_math(gold: str, said: str, *, timeout: float = 2.0) -> bool | None:
    """Say whether two formulas (LaTeX or plain, without dollar signs) are mathematically equal.

    `timeout` is in seconds of wall clock, for this comparison. Returns None if it ran out or if the worker broke.
    Letters are variables: meant for mathematics, not for words. Raises ConfigError if math_verify cannot be used.
    """
    global _worker
    with _lock:
        if _worker is None or _worker.poll() is not None:
            _worker = _start()
        request = json.dumps({"gold": gold, "said": said, "timeout": timeout})
        try:
            reply = _ask(_worker, request, timeout)
        except OSError:
            reply = b""
        if not reply.endswith(b"\n"):
            _stop()
            return None
    return bool(json.loads(reply))


def _start() -> subprocess.Popen[bytes]:
    worker = subprocess.Popen(
        [sys.executable, "-P", "-B", str(Path(__file__).with_name("latex_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd="/",
        env={"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path)},
        start_new_session=True,  # Ctrl-C is for the parent
    )
    reply = _read_line(worker, START_SECONDS)
    if reply.strip() != b'"ready"':
        worker.kill()
        worker.communicate()
        why = json.loads(reply) if reply.endswith(b"\n") else f"its worker did not start within {START_SECONDS:.0f} s"
        raise ConfigError(f"method math_verify: {why}; install math-verify or set method: exact")
    return worker


def _ask(worker: subprocess.Popen[bytes], request: str, timeout: float) -> bytes:
    assert worker.stdin is not None
    message = memoryview(request.encode() + b"\n")
    while message:  # an unbuffered pipe may take a part
        message = message[worker.stdin.write(message) :]
    return _read_line(worker, timeout)


def _read_line(worker: subprocess.Popen[bytes], timeout: float) -> bytes:
    """Return one line of the worker's; without its newline, or empty, if the time is over or the worker is gone."""
    assert worker.stdout is not None
    # A reply is shorter than a pipe's atomic write, so a readable pipe holds all of it.
    return worker.stdout.readline() if wait([worker.stdout.fileno()], timeout) else b""


def _stop() -> None:
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()  # closes the pipes and reaps the process
        _worker = None


def _forget() -> None:
    """In a forked child: the worker belongs to the parent."""
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)
