"""States of a stage on disk: broken ones are set aside, those of another rlx refused. What is done is on the disk for good."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rlx.plan import plan
from rlx.resume import Save, States, link, verified
from rlx.run import run
from rlx.types import ConfigError


def states(folder: Path, said: list[str] | None = None) -> States:
    return States(folder / "state", Save(keep=3), [folder / "metrics.jsonl"], (said if said is not None else []).append, "code")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    made = states(tmp_path)
    for step in (1, 2, 3):
        made.write(step, {"weight": torch.full((2,), float(step))}, {})
    return tmp_path


def change(path: Path, **values: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **values}))


def test_the_newest_whole_state_is_read(folder: Path) -> None:
    saved = states(folder).read({})
    assert saved is not None
    assert saved["weight"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("values", [{"step": 7}, {"code": None}, {"files": {}}], ids=str)
def test_a_broken_state_is_set_aside_and_the_one_before_it_read(folder: Path, values: dict[str, object]) -> None:
    change(folder / "state" / "step-000003", **values)
    said: list[str] = []
    saved = states(folder, said).read({})
    assert saved is not None
    assert saved["weight"].tolist() == [2.0, 2.0]
    assert [line.startswith("! the state of step 3 is skipped: ") for line in said] == [True]
    assert len(list((folder / "state").glob("step-000003.*.broken"))) == 1


def test_a_removal_that_is_cut_short_leaves_whole_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, **_: object) -> None:
        if path.is_dir():
            (path / "tensors.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            states(folder).write(4, {"weight": torch.zeros(2)}, {})
    left = states(folder).all()
    assert [path.name for path in left] == ["step-000004", "step-000003", "step-000002"]
    assert [verified(path, [])[1] for path in left] == ["", "", ""]
    assert not list((folder / "state").glob("*.partial"))


def test_a_stage_that_goes_on_has_the_checkpoints_of_its_state(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    best, later = checkpoints / "best" / "weights", checkpoints / "step-000005" / "weights"
    best.parent.mkdir(parents=True)
    best.write_text("of step 4")
    states(folder).write(4, {}, {})
    for path in (best, later):  # as models are saved: a new folder is put where the old one was
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        path.write_text("of step 5")
    states(folder).put_back(checkpoints)
    assert best.read_text() == "of step 4"
    assert not later.exists()
    shutil.rmtree(folder / "state")
    states(folder).put_back(checkpoints)
    assert not checkpoints.exists()


def test_a_state_of_another_version_is_refused_and_stays(folder: Path) -> None:
    newest = folder / "state" / "step-000003"
    change(newest, version=2)
    with pytest.raises(ConfigError, match="a state of version 2, and this rlx reads 1"):
        states(folder)
    assert newest.is_dir()


def test_a_stage_is_done_once_the_disk_has_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    fit = {"kind": "fit", "data": "@task/demos", "loss": ["nll"], "steps": 1, "rows_per_step": 2, "lr": 1e-3}
    model = {"name": "tiny", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 32}
    run(plan({"model": model, "task": {"name": "arithmetic"}, "seed": 0, "recipe": "fit", "stages": {"fit": fit}}), tmp_path)
    folder = tmp_path / "fit"
    done = synced.index(str(folder / "DONE.partial"))
    wanted = {str(path) for path in (folder, *folder.rglob("*"))} - {str(folder / "DONE")}
    assert str(folder / "out" / "model.safetensors") in wanted
    assert not wanted - set(synced[:done])
    assert str(folder) in synced[done:]


def test_checkpoints_are_copied_where_the_disk_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    (tmp_path / "checkpoints" / "best" / "weights").write_text("1")
    link(tmp_path / "checkpoints", tmp_path / "kept")
    assert (tmp_path / "kept" / "best" / "weights").read_text() == "1"
    assert not (tmp_path / "kept.partial").exists()
