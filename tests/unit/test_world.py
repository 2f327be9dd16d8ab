"""What the process that starts ranks makes of what they left behind, and what ranks send each other."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlx import world
from rlx.ranks import LOST, OWN, OutOfMemory, trouble
from rlx.stages.spread import packed, spread, unpacked
from rlx.types import ConfigError, Episode, Image, Message, Status, Task, Turn


def error(folder: Path, rank: int, time: float, message: str, status: int = 1, *, memory: bool = False) -> None:
    kind = LOST if "by peer" in message else OWN
    record = {"kind": kind, "time": time, "status": status, "message": message, "traceback": f"at {message}", "memory": memory}
    (folder / f"rank-{rank}.error").write_text(json.dumps(record))


def run_dir(folder: Path) -> Path:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"status": "running", "error": None}))
    return run


def test_the_first_error_is_told(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    error(tmp_path, 0, 20.0, "connection closed by peer")
    error(tmp_path, 1, 10.0, "a mistake", status=2)
    told = trouble(tmp_path, 1, run)
    assert (type(told), str(told)) == (ConfigError, "a mistake")
    assert json.loads((run / "run.json").read_text()) == {"status": "failed", "error": "a mistake"}
    assert (run / "error.txt").read_text() == "at a mistake"
    (tmp_path / "rank-2.pid").write_text(f"0 {socket.gethostname()}")  # the launcher has ended it after the mistake
    assert str(trouble(tmp_path, 1, run)) == "a mistake"
    error(tmp_path, 1, 10.0, "too little memory", memory=True)
    assert isinstance(trouble(tmp_path, 1, run), OutOfMemory)


def test_a_rank_that_died_without_a_word_is_named_with_its_phase_and_last_words(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    error(tmp_path, 0, 20.0, "connection closed by peer")
    for rank, pid in ((0, os.getpid()), (1, gone.pid)):
        (tmp_path / f"rank-{rank}.pid").write_text(f"{pid} {socket.gethostname()}")
        (tmp_path / f"rank-{rank}.phase").write_text("rollouts in step 3 of stage 'rl'")
    (tmp_path / "rank-1.log").write_text("Bus error\n")
    told = "rank 1 has died (killed from outside, or out of memory) in rollouts in step 3 of stage 'rl'\nBus error"
    assert str(trouble(tmp_path, 1, run_dir(tmp_path))) == told


def test_a_rank_that_stalled_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    for rank, phase in ((0, "waiting for the other ranks"), (1, "rollouts")):
        (tmp_path / f"rank-{rank}.phase").write_text(phase)
        (tmp_path / f"rank-{rank}.stacks").write_text("")
    own = 'Thread 0x2:\n  File "mine.py", line 1 in f'
    stack = f'Timeout (0:00:05)!\nThread 0x1:\n  File "rlx/worker.py", line 9 in end_with\n\n{own}\n'
    (tmp_path / "rank-1.stacks").write_text(stack)
    os.utime(tmp_path / "rank-1.stacks", (10.0, 10.0))
    (tmp_path / "rank-1.pid").write_text(f"0 {socket.gethostname()}")
    error(tmp_path, 0, 20.0, "connection closed by peer")
    # Rank 0, whose time was over first, waits in a collective for rank 1, which the launcher has ended.
    waits = 'Thread 0x1:\n  File "torch/distributed/distributed_c10d.py", line 1 in all_reduce\n'
    (tmp_path / "rank-0.stacks").write_text(waits)
    os.utime(tmp_path / "rank-0.stacks", (9.0, 9.0))
    assert str(trouble(tmp_path, 1, run_dir(tmp_path))) == (
        "rank 1 made no progress in rollouts for launch.timeout seconds\n"
        "rank 0: waiting for the other ranks\nrank 1: rollouts\n"
        f"{own}"
    )


def test_stacks_of_ranks_that_the_launcher_ended_are_no_stall(tmp_path: Path) -> None:
    (tmp_path / "rank-0.stacks").write_text('Thread 0x1:\n  File "torch/distributed/x.py", line 1 in all_reduce\n')
    (tmp_path / "rank-0.pid").write_text(f"0 {socket.gethostname()}")
    error(tmp_path, 1, 20.0, "a mistake", status=2)
    assert str(trouble(tmp_path, 1, run_dir(tmp_path))) == "a mistake"


STALLS = """
import sys, time
from pathlib import Path
from rlx import world
world.watch = world.Watch(Path(sys.argv[1]), 2.0)
world.stage("test")
with world.phase("evaluation"):
    time.sleep(100)
"""


def test_a_phase_before_the_first_step_is_timed_and_named(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", STALLS, str(tmp_path)], timeout=90)
    assert ended.returncode == 1
    told = str(trouble(tmp_path, 1, run_dir(tmp_path)))
    assert told.startswith("rank 0 made no progress in evaluation in stage 'test' for launch.timeout seconds\n")


def test_a_phase_that_goes_on_has_its_time_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = world.Watch(tmp_path, 1000.0)
    monkeypatch.setattr(world, "watch", watch)
    try:
        world.step("step 1")
        began = watch.began
        world.progress()
        assert watch.began == began
        watch.began -= 200.0
        world.progress()
        assert watch.began >= began
    finally:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGTERM)


def test_episodes_are_sent_without_the_tasks_that_every_rank_has() -> None:
    image = Image(np.zeros((200, 200, 3), np.uint8))
    tasks = [Task((Message("user", ("look", image)),), answer=i) for i in range(2)]
    turn = Turn(np.arange(3), np.arange(2), np.zeros(2, np.float32), Message("assistant", "yes"), token={"x": np.ones(2)})
    own = Task((Message("user", "made while playing"),))
    episodes = [Episode(task, 7, [turn], Status.FINISHED, {"r": 1.0}, 1.0, info={"k": 1}) for task in (*tasks, own)]
    data = packed(episodes, tasks)
    assert len(data) < 5000
    found = unpacked(data, tasks)
    assert [e.task is task for e, task in zip(found, tasks, strict=False)] == [True, True]
    assert found[2].task.prompt == own.prompt
    assert (found[0].turns[0].did.tolist(), found[0].turns[0].token["x"].tolist()) == ([0, 1], [1.0, 1.0])
    assert (found[0].rewards, found[0].status, found[0].info) == ({"r": 1.0}, Status.FINISHED, {"k": 1})


def test_what_the_world_replied_is_not_sent_either_where_every_rank_has_it() -> None:
    view = Message("user", ("now", Image(np.zeros((200, 200, 3), np.uint8))))
    task = Task((Message("user", "look"),))
    past = Turn(np.arange(3), np.arange(2), np.zeros(2, np.float32), Message("assistant", "yes"), (view,))
    data = packed([Episode(task, 7, [past], info={"fresh": True})], [task, view])
    assert len(data) < 5000
    (found,) = unpacked(data, [task, view])
    assert found.task is task
    assert found.turns[0].replies[0] is view


def test_one_process_plays_its_rows_itself() -> None:
    rows = [Episode(Task((Message("user", "?"),)), i) for i in range(3)]
    assert all(a is b for a, b in zip(spread(rows, lambda share: share), rows, strict=True))
