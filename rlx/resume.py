"""The state of an unfinished stage on disk: written beside and renamed, verified when it is read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.types import ConfigError, Episode

VERSION = 1
MANIFEST = "manifest.json"  # of the other two: the step, their sizes and hashes, and how long the logs were
TREE = "state.json"
TENSORS = "tensors.safetensors"
CHECKPOINTS = "checkpoints"  # those of the stage at that time, as hard links


@dataclass(kw_only=True)
class Save:
    """How often a stage's state is written: every `steps` steps and every `minutes` (0: not by that). `keep` of them stay.

    By the clock, writing takes at most a tenth of the time: where a state takes a minute, the next comes after ten.
    """

    steps: int = 0
    minutes: float = 5.0
    keep: int = 2

    def problems(self) -> list[str]:
        """What is wrong with the settings."""
        least = {"steps": 0, "minutes": 0, "keep": 1}
        return [f"{key}: expected at least {x}, got {vars(self)[key]}" for key, x in least.items() if vars(self)[key] < x]


class States:
    """The states of one stage, in `folder`/step-000080. `logs` are files to which its steps append.

    `found` is the newest whole one. States that are not whole are told (`say`) and set aside. Every rank reads
    them, rank 0 writes.

    Checkpoints written after a state are of steps that are taken again, maybe in another number of processes, whose sums
    are others to the last bit: best/ could be of a step that no line of the log has. So a state has links to the checkpoints
    of its time, which `put_back` makes those of the stage again. They take no space until a checkpoint is replaced: then
    its files stay for the state.
    """

    def __init__(self, folder: Path, save: Save, logs: Sequence[Path], say: Callable[[str], None], code: str = "") -> None:
        self.folder, self.save, self.logs, self.say, self.code = folder, save, logs, say, code
        self.last, self.took = time.monotonic(), 0.0
        from rlx import world  # imports torch, which the process that starts ranks does without

        if world.leads():  # of a write or a removal that was cut short
            for beside in folder.glob("*.partial"):
                shutil.rmtree(beside, ignore_errors=True)
        self.found = world.first(self.newest)

    def due(self, step: int) -> bool:
        """Whether to write after this step."""
        if self.save.steps and step % self.save.steps == 0:
            return True
        wait = max(60.0 * self.save.minutes, 9.0 * self.took)
        return bool(self.save.minutes) and time.monotonic() - self.last >= wait

    def all(self) -> list[Path]:
        """The states that are there, newest first."""
        return sorted((p for p in self.folder.glob("step-*") if p.name[5:].isdecimal()), key=number, reverse=True)

    def newest(self) -> dict[str, Any] | None:
        """The manifest of the newest state that is whole."""
        for path in self.all():
            manifest, wrong = verified(path, self.logs)
            if not wrong:
                if manifest["code"] != self.code:
                    self.say(f"! the state of step {number(path)} is of other code than this")
                return manifest
            self.say(f"! the state of step {number(path)} is skipped: {wrong}")
            path.rename(path.with_name(f"{path.name}.{time.time_ns()}.broken"))
        return None

    def read(self, rows: Mapping[str, Sequence[Episode]]) -> dict[str, Any] | None:
        """The newest state, if there is one; `rows` are those of the data that the stage has read."""
        if self.found is None:
            return None
        from safetensors.torch import load_file

        from rlx.encoding import decode

        path = self.folder / name(self.found["step"])
        tree = json.loads((path / TREE).read_text(encoding="utf-8"))
        state: dict[str, Any] = decode(tree, load_file(path / TENSORS), rows)
        return state

    def put_back(self, checkpoints: Path) -> None:
        """Make a stage's checkpoints those of the state that it goes on from; none where it begins anew."""
        if self.found is None:
            shutil.rmtree(checkpoints, ignore_errors=True)
            return
        then = self.folder / name(self.found["step"]) / CHECKPOINTS
        if then.is_dir():
            try:
                link(then, checkpoints)
            except OSError as error:
                self.say(f"! checkpoints may be of later steps: those of the state could not be put back ({error.strerror})")

    def write(self, step: int, state: Mapping[str, Any], rows: Mapping[str, Sequence[Episode]]) -> None:
        """Write the state after `step`: rank 0 does. Where that fails (a full disk), it is told, and those before it stay."""
        from safetensors import SafetensorError

        from rlx import world
        from rlx.encoding import NotStorable

        if not world.leads():
            return
        began, beside = time.monotonic(), self.folder / f"{name(step)}.partial"
        try:
            beside.mkdir(parents=True, exist_ok=True)
            self._fill(beside, step, state, rows)
            beside.rename(self.folder / name(step))
            sync(self.folder)
        except (OSError, SafetensorError, NotStorable) as error:
            shutil.rmtree(beside, ignore_errors=True)
            kept = next((f"that of step {number(path)} stays" for path in self.all()), "there is none before it")
            reason = getattr(error, "strerror", None) or error
            self.say(f"! the state of step {step} could not be written ({reason}); {kept}")
        for path in self.all()[self.save.keep :]:
            remove(path)
        self.last = time.monotonic()
        self.took = self.last - began

    def _fill(self, beside: Path, step: int, state: Mapping[str, Any], rows: Mapping[str, Sequence[Episode]]) -> None:
        from safetensors.torch import save_file

        from rlx.encoding import encode

        tree, tensors = encode(state, rows)
        save_file({key: x.cpu().contiguous() for key, x in tensors.items()}, beside / TENSORS)
        (beside / TREE).write_text(json.dumps(tree), encoding="utf-8")
        files = {file: {"bytes": (beside / file).stat().st_size, "sha256": digest(beside / file)} for file in (TREE, TENSORS)}
        manifest = {
            "version": VERSION,
            "step": step,
            "code": self.code,
            "files": files,
            "logs": {path.name: path.stat().st_size for path in self.logs},
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        link(self.folder.with_name(CHECKPOINTS), beside / CHECKPOINTS)
        for path in self.logs:
            sync(path)
        sync_all(beside)


def name(step: int) -> str:
    """The folder of a step's state."""
    return f"step-{step:06d}"


def number(path: Path) -> int:
    """The step of a folder."""
    return int(path.name[5:])


def remove(path: Path) -> None:
    """Remove a state: under another name, so that what has the name of a state is whole whenever the process is killed."""
    beside = path.with_name(f"{path.name}.old.partial")
    with contextlib.suppress(OSError):
        path.rename(beside)
        shutil.rmtree(beside)


def link(source: Path, to: Path) -> None:
    """Make `to` a folder of hard links to the files of `source`, which need not exist. Raises OSError where that fails.

    Models are saved as new files, so that what is saved into one of the folders later is not in the other.
    """
    beside = to.with_name(f"{to.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    if source.is_dir():
        unfinished = shutil.ignore_patterns("*.partial", "*.old")
        shutil.copytree(source, beside, copy_function=linked, ignore=unfinished, dirs_exist_ok=True)
    shutil.rmtree(to, ignore_errors=True)
    beside.rename(to)


def linked(source: str, to: str) -> None:
    """A hard link to a file, or a copy where the disk has no links."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)


def verified(path: Path, logs: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """The manifest of a state and what is wrong with it. Raises ConfigError where another rlx wrote it, or none can read it."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise ConfigError(
                f"{path}: a state of version {manifest['version']}, and this rlx reads {VERSION}; go on with the one that "
                "wrote it, or remove it to begin the stage anew"
            )
        if (manifest["step"], type(manifest["code"])) != (number(path), str):
            return {}, f"{MANIFEST} is of another state"
        for file in (TREE, TENSORS):
            wanted = manifest["files"][file]
            size = (path / file).stat().st_size
            if size != wanted["bytes"]:
                return {}, f"{file} has {size} bytes instead of {wanted['bytes']}"
            if digest(path / file) != wanted["sha256"]:
                return {}, f"{file} is not what was written"
        for log in logs:
            if log.stat().st_size < manifest["logs"][log.name]:
                return {}, f"{log.name} has lost lines"
    except OSError as error:
        if not isinstance(error, FileNotFoundError):  # it may be whole: a disk that does not answer is no reason to begin anew
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return {}, f"{Path(error.filename).name} is missing"
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        return {}, f"{getattr(error, 'filename', None) or MANIFEST} cannot be read ({type(error).__name__})"
    return manifest, ""


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have what was written on the disk, so that a machine that loses power keeps it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # a file system that syncs files alone
            raise
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """The same for a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
