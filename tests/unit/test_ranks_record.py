"""What the process that started the ranks leaves in the run directory, and what it clears away."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.ranks import GONE, LOST, OWN, note, remove_left, trouble
from rlx.types import ConfigError, Failed


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"status": "running", "error": None, "seed": 3}))
    return path


def info(run_dir: Path) -> tuple[str, str]:
    found = json.loads((run_dir / "run.json").read_text())
    assert found["seed"] == 3
    return found["status"], found["error"]


def reports(folder: Path, **by: tuple[int, int, str]) -> Path:
    folder.mkdir()
    for rank, (kind, status, message) in by.items():
        record = {"kind": kind, "time": 1.0, "status": status, "message": message, "traceback": ""}
        (folder / f"{rank.replace('_', '-')}.error").write_text(json.dumps(record))
    return folder


def test_what_another_rank_met_is_noted(tmp_path: Path, run_dir: Path) -> None:
    folder = reports(tmp_path / "ranks", rank_0=(LOST, 1, "closed by peer"), rank_1=(OWN, 1, "a mistake"))
    error = trouble(folder, 1, run_dir)
    assert (type(error), str(error)) == (Failed, "a mistake")
    assert info(run_dir) == ("failed", "a mistake")
    assert (run_dir / "error.txt").read_text() == "a mistake"


def test_what_rank_0_raised_is_its_own_to_note(tmp_path: Path, run_dir: Path) -> None:
    """The directory may be another run's: in use, or of another config."""
    folder = reports(tmp_path / "ranks", rank_0=(OWN, 2, "holds a run of another config"), rank_1=(LOST, 1, "closed by peer"))
    error = trouble(folder, 2, run_dir)
    assert (type(error), str(error)) == (ConfigError, "holds a run of another config")
    assert info(run_dir) == ("running", None)
    assert not (run_dir / "error.txt").exists()


def test_of_a_rank_0_that_is_gone_it_is_noted(tmp_path: Path, run_dir: Path) -> None:
    folder = reports(tmp_path / "ranks", rank_0=(GONE, 1, "rank 0 has died"), rank_1=(LOST, 1, "closed by peer"))
    assert str(trouble(folder, 1, run_dir)) == "rank 0 has died"
    assert info(run_dir) == ("failed", "rank 0 has died")


def test_a_run_that_has_ended_stays_as_it_ended(tmp_path: Path, run_dir: Path) -> None:
    note(run_dir, "interrupted", "before the end of a step")
    assert info(run_dir) == ("interrupted", "before the end of a step")
    note(run_dir, "failed", "later")
    assert info(run_dir) == ("interrupted", "before the end of a step")
    note(tmp_path / "none", "failed", "no run has begun")
    assert not (tmp_path / "none").exists()


def test_folders_of_starts_that_were_killed_are_removed(tmp_path: Path, run_dir: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    job = {"host": socket.gethostname(), "parent": ended.pid}
    starts = {
        "run.ranks-1": job,
        "run.ranks-2": {**job, "parent": os.getpid()},
        "run.ranks-3": {**job, "host": "another"},
        "other.ranks-4": job,
    }
    for name, content in starts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(json.dumps(content))
    remove_left(run_dir)
    assert sorted(path.name for path in tmp_path.glob("*.ranks-*")) == ["other.ranks-4", "run.ranks-2", "run.ranks-3"]
