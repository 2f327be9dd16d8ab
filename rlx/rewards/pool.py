"""Costly rewards in worker processes: one episode at a time, with a hard time limit, each answer worked out once.

A worker gets a reward and an episode, and sends back numbers. It is started when it is first needed, imports what the reward
needs (no torch), and has limits on memory and files and next to no environment; what it is given to run is a function that the
recipe names, never data. This bounds time and memory; it does not contain hostile code.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlx.modules import function_at, place_of
from rlx.types import ConfigError, Episode, Failed, Message, Turn

SECONDS = 10.0  # for one episode, where the reward has no `timeout`
START_SECONDS = 60.0  # for imports: math_verify takes one or two seconds, more on a cold disk
WORKERS = 8  # at most, in one process of a run
MEMORY = 4 * 2**30  # bytes of address space of a worker
KNOWN = 2**14  # answers that are kept
READY, BEGUN = b"ready", b"begun"

Call = TypeVar("Call", bound=Callable[..., Any])


class Unscored(Exception):
    """Why an episode has no number: where the reward raised, the `line` of its own file and the `trace` as well."""

    def __init__(self, reason: str, line: str = "", trace: str = "") -> None:
        super().__init__(reason, line, trace)
        self.reason, self.line, self.trace = reason, line, trace


def unscored(error: Exception) -> Unscored:
    """What a reward raised, caught where it was called."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call
    own = [frame for frame in frames if frame.filename == frames[0].filename]  # also where a library that it calls raised
    line = f"{Path(own[-1].filename).name} line {own[-1].lineno}" if own else ""
    return Unscored(f"raised {type(error).__name__}: {error}", line, "".join(traceback.format_exception(error)))


# --------------------------------------------------------------------------- which rewards
def pooled(before: Callable[[], object] | None = None, **when: Any) -> Callable[[Call], Call]:
    """Mark a reward of the catalogue that takes time where its settings are those of `when`: workers compute it.

    It must be a pure function of each episode alone: of the task, of what was said and replied, of token ids and status; it
    is given nothing else. Its setting `timeout`, if it has one, is the limit in seconds of wall clock for an episode.
    `before` imports what it needs, outside that time; it is called before each episode.
    """

    def mark(call: Call) -> Call:
        call.pooled = (before, when)  # type: ignore[attr-defined]
        return call

    return mark


def meant(call: Any) -> Any:
    """The reward that a component's call stands for: the recipe's `verifier` for the verifier of its task."""
    return getattr(getattr(call, "func", call), "means", call)


def goes_to_workers(call: Any) -> bool:
    """Whether a component's call is a costly reward."""
    call = meant(call)
    mark = getattr(getattr(call, "func", call), "pooled", None)
    return mark is not None and settings(call).items() >= mark[1].items()


def settings(call: Any) -> dict[str, Any]:
    """All keyword arguments of a function, or of a partial of one."""
    return {**(getattr(getattr(call, "func", call), "__kwdefaults__", None) or {}), **getattr(call, "keywords", {})}


def bare(episode: Episode) -> Episode:
    """What a worker is given of an episode, without images: equal prompts and completions are equal."""
    none = np.zeros(0, np.float32)
    turns = [Turn(turn.seen, turn.did, none, turn.said, texts(turn.replies), agent=turn.agent) for turn in episode.turns]
    return Episode(
        replace(episode.task, prompt=texts(episode.task.prompt)), episode.group, turns, episode.status, agent=episode.agent
    )


def texts(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages without their images, which are large and which no pooled reward reads."""
    return tuple(Message(message.role, message.text) for message in messages)


# --------------------------------------------------------------------------- this process
class Pool:
    """`size` workers at most, each with a thread that waits for it. The answers to the last requests are kept."""

    def __init__(self, size: int) -> None:
        self.threads = ThreadPoolExecutor(size, "rewards")
        self.known: dict[bytes, Future[Any]] = {}
        self.early = 0  # how many were begun since somebody asked
        self.own = threading.local()
        self.workers: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.closed = False
        self.begun = False  # whether a worker has ever started

    def begin(self, call: Any, episode: Episode) -> None:
        """Have a marked reward worked out before anybody asks for it; not of more episodes than answers are kept."""
        if self.early < KNOWN:
            self.early += 1
            self._found(call, [episode])

    def send(self, call: Any, episodes: Sequence[Episode]) -> list[Future[Any]]:
        """For each episode what a marked reward will answer: a number, or one for each turn.

        The future raises Unscored where there is none, ConfigError where the reward refuses its settings or its task.
        """
        self.early = 0
        return self._found(call, episodes)

    def _found(self, call: Any, episodes: Sequence[Episode]) -> list[Future[Any]]:
        """The answers that are known or on their way; what is not, or could not be scored, is asked."""
        call = meant(call)
        limit = float(settings(call).get("timeout", SECONDS))
        asked = (*place_of(getattr(call, "func", call)), getattr(call, "keywords", {}), limit)
        requests = [pickle.dumps((*asked, bare(episode))) for episode in episodes]
        keys = [hashlib.sha256(request).digest() for request in requests]
        found = {key: self.known.pop(key) for key in dict.fromkeys(keys) if key in self.known}
        for key, request in zip(keys, requests, strict=True):
            if key not in found or (found[key].done() and found[key].exception() is not None):
                found[key] = self.threads.submit(self.answer, request, limit)
        self.known |= found  # the last to be forgotten
        for key in list(itertools.islice(self.known, max(0, len(self.known) - KNOWN))):
            del self.known[key]
        return [found[key] for key in keys]

    def answer(self, request: bytes, limit: float) -> Any:
        """What a worker says; one that dies is replaced, and the next is asked once more."""
        for _ in range(2):
            worker, line = getattr(self.own, "worker", None) or self.start()
            try:
                line.send_bytes(request)
                said = line.recv_bytes() if line.poll(START_SECONDS) else b""
                if said == BEGUN:
                    said = line.recv_bytes() if line.poll(limit) else BEGUN
                if said not in (b"", BEGUN):
                    return read(json.loads(said))
                self.end(worker, line)
                late = (
                    f"gave no answer within {limit:g} s" if said else f"had not imported in {START_SECONDS:g} s what it needs"
                )
                raise Unscored(late)
            except (OSError, EOFError):
                self.end(worker, line)
        raise Unscored("broke its worker process, twice")

    def start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """A new worker of this thread. Raises ConfigError where it does not start, Unscored where others have."""
        ours, theirs = Pipe()
        with self.lock, theirs:
            if self.closed:
                raise Unscored("was not computed: the run has ended")
            worker = subprocess.Popen(
                [sys.executable, "-P", "-B", "-c", f"from rlx.rewards.pool import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,  # until it has started
                cwd="/",
                env={
                    **{key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},
                    "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process
            )
            self.workers.add(worker)
        try:
            started = ours.poll(START_SECONDS) and ours.recv_bytes() == READY
        except (OSError, EOFError):
            started = False
        if not started:
            self.end(worker, ours)
            said = worker.stderr.read().decode(errors="replace").strip() if worker.stderr else ""
            why = f"a worker process for rewards does not start: {said.splitlines()[-1] if said else 'it says nothing'}"
            raise Unscored(why, trace=said) if self.begun or self.closed else ConfigError(why)
        if worker.stderr:
            worker.stderr.close()
        self.begun = True
        self.own.worker = worker, ours
        return worker, ours

    def end(self, worker: subprocess.Popen[bytes], line: Connection) -> None:
        """Kill a worker of this thread."""
        self.own.worker = None
        kill(worker)
        line.close()
        with self.lock:
            self.workers.discard(worker)

    def close(self) -> None:
        """End all workers; nobody waits for what they were asked."""
        with self.lock:
            self.closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.workers):
            kill(worker)


def kill(worker: subprocess.Popen[bytes]) -> None:
    """End a worker and what it has started, which is in its session."""
    if worker.returncode is None:  # nobody has waited for it: its number is still its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def read(reply: dict[str, Any]) -> Any:
    """A worker's reply."""
    if "refused" in reply:
        raise ConfigError(reply["refused"])
    if "failed" in reply:
        raise Failed(*reply["failed"])
    if "unscored" in reply:
        raise Unscored(*reply["unscored"])
    return reply["value"]


@functools.cache
def pool() -> Pool:
    """The pool of this process. Ranks share the cores of their machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pool(min(WORKERS, max(1, cores // int(os.environ.get("LOCAL_SIZE", "1")))))


@atexit.register
def close() -> None:
    """End the workers of this process, if it has any."""
    if pool.cache_info().currsize:
        pool().close()
        pool.cache_clear()


os.register_at_fork(after_in_child=pool.cache_clear)  # the workers belong to the parent


# --------------------------------------------------------------------------- a worker
def serve(fd: int) -> None:
    """Answer each request until the other end of the pipe closes."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    with contextlib.suppress(OSError, ValueError):  # not every system can limit memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with Connection(fd) as line, contextlib.suppress(EOFError, OSError):
        line.send_bytes(READY)
        while True:
            line.send_bytes(json.dumps(worked_out(line.recv_bytes(), line)).encode())


def worked_out(request: bytes, line: Connection) -> dict[str, Any]:
    """The reply to a request. Its time begins when its imports are done."""
    try:
        place, name, given, limit, episode = pickle.loads(request)
        call: Any = function_at(place, name)
        before, _ = call.pooled
        if before is not None:
            before()
        line.send_bytes(BEGUN)
        # The parent kills a late worker. If the parent is gone, the kernel does: SIGALRM has no handler here.
        signal.setitimer(signal.ITIMER_REAL, limit + 1.0)
        (value,) = call([episode], **given)
        return {"value": [float(x) for x in value] if isinstance(value, list | tuple) else float(value)}
    except ConfigError as error:
        return {"refused": str(error)}
    except Failed as error:
        return {"failed": [str(error), error.status]}
    except Exception as error:  # whatever a reward raises is this episode's alone
        found = unscored(error)
        return {"unscored": [found.reason, found.line, found.trace]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
