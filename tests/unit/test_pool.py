"""Costly rewards in worker processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlx.modules import load_module
from rlx.rewards import pool as pools
from rlx.rewards import rules
from rlx.rewards.pool import Pool, Unscored, goes_to_workers, pooled
from rlx.types import (
    Component,
    ConfigError,
    DataError,
    Ended,
    Episode,
    Failed,
    Image,
    Message,
    Play,
    Reply,
    Sampling,
    Status,
    Task,
    Turn,
    View,
)


def episode(*said: str, logp: float = 0.0, answer: object = None) -> Episode:
    none = np.zeros(0, np.int64)
    turns = [Turn(none, none, np.full(1, logp, np.float32), Message("assistant", text)) for text in said]
    return Episode(Task((Message("user", "2+3="),), answer), 0, turns, Status.FINISHED)


@pooled()
def timely(episodes: list[Episode], *, timeout: float = 30.0) -> list[float | list[float]]:
    """Its seconds for one turn, a number each for several; nan for "nan"."""
    seconds = [[float(turn.said.text) for turn in e.turns if turn.said is not None] for e in episodes]
    time.sleep(sum(x for e in seconds for x in e if x > 0))
    return [e if len(e) > 1 else e[0] for e in seconds]


@pooled()
def counted(episodes: list[Episode], *, folder: str) -> list[float]:
    """How many files there are, with one more for each call; a completion "?" is a mistake."""
    for e in episodes:
        os.close(tempfile.mkstemp(dir=folder)[0])
        if e.completion == "?":
            raise LookupError("no such answer")
    return [float(len(os.listdir(folder))) for _ in episodes]


@pooled()
def fatal(episodes: list[Episode], *, folder: str, times: int) -> list[float]:
    """It kills its process so many times."""
    died = len(os.listdir(folder))
    if died < times:
        os.close(tempfile.mkstemp(dir=folder)[0])
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(died) for _ in episodes]


@pooled()
def surroundings(episodes: list[Episode]) -> list[list[float]]:
    """What a worker has of torch, of its parent's environment and session."""
    return [
        [float("torch" in sys.modules), float("RLX_TEST" in os.environ), float(os.getsid(0) == os.getpid())] for _ in episodes
    ]


@pooled()
def waits(episodes: list[Episode], *, path: str) -> list[float]:
    """1 once there is a file."""
    while not os.path.exists(path):
        time.sleep(0.01)
    return [1.0 for _ in episodes]


@pooled()
def starts(episodes: list[Episode], *, path: str, timeout: float) -> list[float]:
    """Start a process, say which, and wait for it."""
    started = subprocess.Popen(["sleep", "1000"])
    os.symlink(str(started.pid), path)
    return [float(started.wait()) for _ in episodes]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


def test_workers_say_what_this_process_would_in_order(pool: Pool) -> None:
    """Whoever is ready first, and however many there are."""
    asked = [episode("0.2"), episode("0"), episode("0.1", "-1"), episode("nan"), episode("-2")]
    for size in (pool, Pool(1)):
        assert str([answer.result() for answer in size.send(timely, asked)]) == str([timely([e])[0] for e in asked])
    size.close()


def test_workers_have_little_around_them(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLX_TEST", "s3cret")
    own = Pool(1)
    assert own.send(surroundings, [episode("")])[0].result() == [0.0, 0.0, 1.0]
    own.close()


def test_what_takes_too_long_is_that_episode_s_alone(pool: Pool) -> None:
    late, quick, *_ = pool.send(partial(timely, timeout=0.5), [episode("1000"), episode("0")])
    with pytest.raises(Unscored) as caught:
        late.result()
    assert (caught.value.reason, caught.value.trace) == ("gave no answer within 0.5 s", "")
    assert quick.result() == 0.0


def test_equal_prompts_and_completions_are_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "KNOWN", 3)
    pool = Pool(1)
    call = partial(counted, folder=str(tmp_path))
    same = [episode("a", logp=0.1), episode("a", logp=0.2)]
    assert [answer.result() for answer in pool.send(call, same) + pool.send(call, same)] == [1.0] * 4
    assert pool.send(call, [episode("b")])[0].result() == 2.0
    assert pool.send(call, [episode("a", answer="5")])[0].result() == 3.0  # another task
    assert pool.send(partial(counted, folder=f"{tmp_path}/"), [episode("a")])[0].result() == 4.0  # other settings
    assert pool.send(call, [episode("a")])[0].result() == 5.0  # the fourth of three that are kept
    assert pool.send(call, [episode("a", answer="5")])[0].result() == 3.0
    pool.close()


def test_what_failed_is_asked_anew(pool: Pool, tmp_path: Path) -> None:
    for times in (1, 2):
        with pytest.raises(Unscored, match="raised LookupError: no such answer") as caught:
            pool.send(partial(counted, folder=str(tmp_path)), [episode("?")])[0].result()
        assert len(os.listdir(tmp_path)) == times
    assert caught.value.line.startswith("test_pool.py line ")
    assert caught.value.trace.endswith("LookupError: no such answer\n")


def test_an_episode_whose_worker_dies_is_asked_once_more(pool: Pool, tmp_path: Path) -> None:
    once, always = tmp_path / "once", tmp_path / "always"
    once.mkdir()
    always.mkdir()
    assert pool.send(partial(fatal, folder=str(once), times=1), [episode("")])[0].result() == 1.0
    with pytest.raises(Unscored, match="broke its worker process, twice"):
        pool.send(partial(fatal, folder=str(always), times=9), [episode("")])[0].result()
    assert len(os.listdir(always)) == 2


@pytest.mark.parametrize(
    ("starts", "said"),
    [("echo 'no module named numpy' >&2; exit 1", "no module named numpy"), ("exec sleep 100", "it says nothing")],
)
def test_workers_that_do_not_start_are_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: str, said: str
) -> None:
    """Not failures of all episodes; nor is anything waited for that is larger than a pipe holds."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{starts}\n")
    python.chmod(0o755)
    monkeypatch.setattr(pools, "START_SECONDS", 0.5)
    monkeypatch.setattr(sys, "executable", str(python))
    own = Pool(1)
    with pytest.raises(ConfigError, match=f"^a worker process for rewards does not start: {said}$"):
        own.send(timely, [episode("0" * 10**6)])[0].result()
    own.close()


@pooled()
def unavailable(episodes: list[Episode]) -> list[float]:
    """What it asks is not there."""
    raise Failed("the server is gone", 7)


def test_a_worker_s_failure_of_the_whole_run_is_one(pool: Pool) -> None:
    with pytest.raises(Failed, match="the server is gone") as caught:
        pool.send(unavailable, [episode("")])[0].result()
    assert caught.value.status == 7


def test_a_reward_in_a_file_of_the_user_s_goes_to_workers(pool: Pool, tmp_path: Path) -> None:
    """With a helper beside it and settings; what is in no module or file by its name cannot be found again."""
    file = tmp_path / "random.py"  # not the module of that name
    file.write_text(
        "from rlx.rewards.pool import pooled\n\ndef worth(text):\n    return float(text)\n\n"
        "@pooled()\ndef score(episodes, *, more: float = 0.0):\n    return [worth(e.completion) + more for e in episodes]\n"
    )
    call = partial(load_module(str(file)).score, more=0.5)
    assert goes_to_workers(call)
    assert [answer.result() for answer in pool.send(call, [episode("1"), episode("2")])] == [1.5, 2.5]

    @pooled()
    def inside(episodes: list[Episode]) -> list[float]:
        return [0.0 for _ in episodes]

    with pytest.raises(ConfigError, match="inside is in a function; another process only finds what stands in a module"):
        pool.send(inside, [episode("1")])


def test_images_do_not_travel() -> None:
    image = Image(np.zeros((64, 64, 3), np.uint8))
    seen = episode("a")
    seen.task = Task((Message("user", ("2", image, "+3=")),))
    sent = pools.bare(seen)
    assert (sent.task.prompt[0].text, sent.task.prompt[0].images) == ("2+3=", ())


def test_a_mistake_of_the_user_s_stays_one(pool: Pool) -> None:
    with pytest.raises(ConfigError, match=r"answer_match: the task '2\+3=' \(group 0\) has no answer"):
        pool.send(partial(rules.answer_match, method="exact"), [episode("5")])[0].result()
    with pytest.raises(DataError, match="has no answer"):
        rules.answer_match([episode("5")])


# --------------------------------------------------------------------------- which rewards, and how they are paid
def test_only_what_is_marked_and_costly_goes_to_workers() -> None:
    from rlx.plan import verifier_of
    from rlx.types import TaskSource

    formulas = partial(rules.answer_match, method="math_verify")
    task = TaskSource({}, formulas, lambda: None)  # type: ignore[arg-type, return-value]
    calls = [
        rules.length,
        rules.answer_match,
        partial(rules.answer_match, method="exact"),
        formulas,
        partial(verifier_of(task)),
    ]
    assert [goes_to_workers(call) for call in calls] == [False, False, False, True, True]


def test_workers_compute_while_other_rewards_are_asked(tmp_path: Path) -> None:
    """The first waits for what the second does; the mean of a group is over all that could be scored."""
    from rlx.rewards.score import score

    def makes(episodes: list[Episode]) -> list[float]:
        (tmp_path / "made").touch()
        return [2.0 for _ in episodes]

    asked = [episode("a"), episode("b")]
    score(asked, [Component("waits", partial(waits, path=str(tmp_path / "made"))), Component("makes", makes)], "x")
    assert [(e.rewards, e.reward) for e in asked] == [({"waits": 1.0, "makes": 2.0}, 3.0)] * 2


def test_workers_compute_while_others_are_decoded(tmp_path: Path) -> None:
    """The first answer is worked out before the last turn has ended, and each only once."""
    from rlx.envs.single import SingleTurn
    from rlx.models.load import tiny
    from rlx.rewards.score import begin, score
    from rlx.rollout.native import generate
    from rlx.rollout.samplers import plain

    policy = tiny(hidden=16, layers=1, heads=2, kv_heads=2)
    policy.end_ids = list(range(20))
    reward = Component("counted", partial(counted, folder=str(tmp_path)))
    made: list[int] = []  # how many are worked out, when a turn ends

    def engine(policy: Any, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended) -> list[list[Turn]]:
        def slowly(i: int, turn: Turn) -> None:
            made.append(len(os.listdir(tmp_path)))
            ended(i, turn)
            while not os.listdir(tmp_path):
                time.sleep(0.01)

        return generate(policy, views, keys, sampling, slowly)

    policy.engine = engine
    rows = [Episode(Task((Message("user", text),)), i) for i, text in enumerate(("2+3=", "a long question", "2+3="))]
    asked = plain(Play(policy, SingleTurn, Sampling(12), (0,), ended=partial(begin, [reward])), rows, 4)
    assert (len(made), made[0]) == (12, 0)
    assert made[-1] > 0
    score(asked, [reward], "x")
    assert {e.status for e in asked} == {Status.FINISHED, Status.TRUNCATED}
    assert len(os.listdir(tmp_path)) == len({(e.task.prompt[0].text, e.completion) for e in asked})


def test_episodes_of_several_turns_are_told_of_when_their_environment_ends_them() -> None:
    from rlx.models.load import tiny
    from rlx.rollout.native import generate
    from rlx.rollout.samplers import plain

    class Until:
        """As many turns as the prompt has letters."""

        def reset(self, task: Task) -> tuple[Message, ...]:
            self.left = len(task.prompt[0].text)
            return task.prompt

        def step(self, said: Message) -> Reply:
            self.left -= 1
            return Reply((Message("user", "go on"),), done=self.left == 0)

    policy = tiny(hidden=16, layers=1, heads=2, kv_heads=2)
    policy.end_ids, policy.engine = list(range(256)), generate
    told: list[tuple[int, Status, int]] = []
    rows = [Episode(Task((Message("user", "x" * n),)), n) for n in (3, 1)]
    note = Play(policy, Until, Sampling(30), (0,), ended=lambda e: told.append((e.group, e.status, len(e.turns))))
    plain(note, rows, 1)
    assert told == [(1, Status.FINISHED, 1), (3, Status.FINISHED, 3)]


def test_what_was_begun_and_what_is_known_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more episodes are played than answers are kept."""
    monkeypatch.setattr(pools, "KNOWN", 4)
    own, call = Pool(1), partial(counted, folder=str(tmp_path))
    several = [episode(str(i)) for i in range(7)]
    for _ in range(2):
        for e in several:
            own.begin(call, e)
    answers = own.send(call, several[::-1])
    assert sorted(answer.result() for answer in answers) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [answer.result() for answer in answers[:-5:-1]] == [1.0, 2.0, 3.0, 4.0]
    own.begin(call, episode("?"))
    (failed,) = own.send(call, [episode("?")])
    assert isinstance(failed.exception(), Unscored)
    own.close()


def test_late_and_failed_episodes_are_left_out_and_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    from rlx.rewards.score import score

    asked = [episode("0.0"), episode("five"), episode("1000"), episode("-1")]
    score(asked, [Component("timely", partial(timely, timeout=0.5))], "x")
    assert [e.reward for e in asked] == [0.0, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True), -1.0]
    out = capsys.readouterr().out
    assert out.startswith(
        "! x: reward 'timely' raised ValueError: could not convert string to float: 'five' (test_pool.py line "
    )
    assert out.count("! x:") == out.count("Traceback") == 1
    with pytest.raises(ConfigError, match="x: reward 'timely' raised ValueError"):
        score([episode("five"), episode("six")], [Component("timely", timely)], "x")


# --------------------------------------------------------------------------- the end
def gone(pid: int) -> bool:
    """Whether a process has ended; what nobody waited for has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_nothing_is_waited_for_when_a_pool_is_closed() -> None:
    own = Pool(1)
    own.send(timely, [episode("0")])[0].result()
    (worker,) = own.workers
    asked = own.send(timely, [episode("1000"), episode("1001")])
    own.close()
    assert gone(worker.pid)
    for answer in asked:
        with pytest.raises((Unscored, CancelledError)):
            answer.result()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_what_a_late_worker_has_started_ends_with_it(tmp_path: Path) -> None:
    own = Pool(1)
    (answer,) = own.send(partial(starts, path=str(tmp_path / "pid"), timeout=1.0), [episode("")])
    assert isinstance(answer.exception(), Unscored)
    while not gone(int(os.readlink(tmp_path / "pid"))):
        time.sleep(0.05)
    own.close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_ends_with_its_killed_parent() -> None:
    """One that waits at once, one that computes when its time is over."""
    code = (
        "from functools import partial\nfrom test_pool import *\nown = Pool(2)\n"
        "own.send(partial(timely, timeout=1.0), [episode('1000')])\nown.send(timely, [episode('0')])[0].result()\n"
        "print(*(worker.pid for worker in own.workers), flush=True)\ntime.sleep(1000)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert len(pids) == 2
    while not all(gone(pid) for pid in pids):
        time.sleep(0.05)
