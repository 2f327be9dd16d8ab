"""What a reference says of a row is computed once, and is on disk what it was in memory; what is not whole is not read."""

from __future__ import annotations

import copy
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_stages import SIZES, TASK, context, demo, record
from torch import Tensor

from rlx.losses import preference, watch
from rlx.models.heads import Heads
from rlx.models.language import LanguageModel
from rlx.models.load import pretrained, tiny
from rlx.stages import frozen as module
from rlx.stages.context import Context
from rlx.stages.fit import Fit
from rlx.stages.frozen import Rows, frozen, model_key
from rlx.stages.models import ModelSpec, Refresh
from rlx.types import Batch, Component, DataRef, Episode, TaskSource

FIELDS = ("logp", "ref_logp", "mask", "group", "label")
DPO = Component("dpo", preference.dpo, FIELDS)
MARGIN = Component("margin", watch.dpo_margin, FIELDS)
PAIRS = [
    dataclasses.replace(demo(question, answer, i), label=label)
    for i, question in enumerate("abcdef")
    for answer, label in ((str(i) * (i + 1), 1.0), ("7", -1.0))
]


class Counting(LanguageModel):
    """Counts the tokens that it reads."""

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        self.read += sum(x.length for x in batch.inputs)
        return super().forward(batch, want, temperature)


class Watched(Context):
    """A context whose reference counts what it reads, and which keeps what it has noted."""

    def models(self, *args: Any) -> dict[str, Any]:
        made = super().models(*args)
        self.reference = made["reference"]
        self.reference.__class__, self.reference.read = Counting, 0
        return made


def random(seed: int = 7, **settings: Any) -> ModelSpec:
    return ModelSpec(model=Component("tiny", lambda **_: tiny(**SIZES, seed=seed), settings={"seed": seed}), **settings)


def run(folder: Path, rows: list[Episode] = PAIRS, *, reference: ModelSpec | None = None, **settings: Any) -> Any:
    """Train on pairs for two epochs, the reference another model than the policy; the tokens that it has read, the metrics."""
    plain = context(folder, "dpo")
    ctx = Watched(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
    ctx.task = TaskSource({"pairs": lambda: rows}, TASK.verifier, TASK.make_env)
    stage = Fit(
        data=DataRef(split="pairs"),
        loss=[DPO],
        watch=[MARGIN],
        models={"reference": reference or random()},
        **{"steps": 4, "rows_per_step": 3, "lr": 1e-3, "log_every": 1, "token_budget": 40, **settings},
    )
    stage.run(ctx)
    return ctx.reference.read, record(folder, "dpo")


def close(found: Any, expected: Any) -> None:
    for row, there in zip(found, expected, strict=True):
        assert row == {name: pytest.approx(x, rel=1e-5, abs=1e-6) for name, x in there.items()}


def each_once() -> int:
    """The tokens of all rows."""
    return sum(len(turn.seen) + len(turn.did) for row in PAIRS for turn in tiny(**SIZES).tokenize(row).turns)


@pytest.fixture
def once(tmp_path: Path) -> tuple[Path, Any]:
    """A cache that one run has filled, and its metrics."""
    read, metrics = run(tmp_path / "once", cache=str(tmp_path / "cache"))
    assert read == each_once()
    return tmp_path / "cache", metrics


def test_a_row_is_read_once_in_all_epochs(tmp_path: Path) -> None:
    read, metrics = run(tmp_path / "kept")
    # one that may be renewed is asked each time
    twice, expected = run(tmp_path / "anew", reference=random(refresh=Refresh(every=100, to="reference")))
    assert (read, twice) == (each_once(), 2 * each_once())
    close(metrics, expected)
    assert any(abs(row["margin"]) > 1e-3 for row in expected[1:])
    assert list((tmp_path / "kept" / "dpo" / "cache").glob("*/*.npz"))


def test_one_epoch_needs_no_cache(tmp_path: Path) -> None:
    read, _ = run(tmp_path, steps=2)
    assert read == each_once()
    assert not (tmp_path / "dpo" / "cache").exists()


def test_another_run_reads_nothing(tmp_path: Path, once: tuple[Path, Any]) -> None:
    cache, metrics = once
    assert run(tmp_path / "again", cache=str(cache)) == (0, metrics)


def test_another_row_or_order_of_rows_is_met_row_by_row(tmp_path: Path, once: tuple[Path, Any]) -> None:
    other = [demo("another", "answer", 9), dataclasses.replace(demo("another", "b", 9), label=-1.0)]
    tokens = sum(len(t.seen) + len(t.did) for row in other for t in tiny(**SIZES).tokenize(row).turns)
    read, _ = run(tmp_path / "more", [*other, *PAIRS[::-1]], cache=str(once[0]), steps=5)
    assert read == tokens


def test_other_weights_share_nothing(tmp_path: Path, once: tuple[Path, Any]) -> None:
    read, _ = run(tmp_path / "other", cache=str(once[0]), reference=random(seed=8))
    assert read == each_once()


@pytest.mark.parametrize("broken", ["truncated", "empty", "changed"])
def test_a_file_that_is_not_whole_is_told_and_computed_anew(
    tmp_path: Path, once: tuple[Path, Any], broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, metrics = once
    path = sorted(cache.glob("*/*.npz"))[0]
    data = path.read_bytes()
    at = data.index(np.load(path)["values"].tobytes())
    path.write_bytes({"truncated": data[:-30], "empty": b"", "changed": data[:at] + b"\x01\x02" + data[at + 2 :]}[broken])
    read, found = run(tmp_path / "again", cache=str(cache))
    assert 0 < read < each_once()
    close(found, metrics)
    assert f"! {path}: not a whole file of the cache" in capsys.readouterr().out
    assert run(tmp_path / "third", cache=str(cache))[0] == 0  # it was written anew


def test_a_full_or_missing_disk_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    read, _ = run(tmp_path / "run", cache=str(tmp_path / "file"))
    assert read == 2 * each_once()
    assert capsys.readouterr().out.count("the cache cannot be written (Not a directory)") == 1


def test_a_cache_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 1000)
    read, _ = run(tmp_path / "run", cache=str(tmp_path / "cache"))
    assert each_once() < read < 2 * each_once()  # what could not be written is asked again
    assert len(list(tmp_path.glob("cache/*/*.npz"))) == 1
    assert capsys.readouterr().out.count("and no more is written") == 1
    assert run(tmp_path / "again", cache=str(tmp_path / "cache"))[0] > 0


def test_many_may_write_at_once(tmp_path: Path) -> None:
    rows = {f"{i:064x}": np.full((1, 1 + i % 5), i / 7, np.float32) for i in range(200)}
    parts = [dict(list(rows.items())[i : i + 8]) for i in range(0, 200, 8)]
    said: list[str] = []

    def write(number: int) -> None:
        own = Rows(tmp_path, "model", said.append)
        for part in parts[number:] + parts[:number]:
            own.add(part)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    found = Rows(tmp_path, "model", said.append).known
    assert said == []
    assert found.keys() == rows.keys()
    assert all(np.array_equal(found[key], row) for key, row in rows.items())
    assert len(list((tmp_path / "model").iterdir())) == len(parts)


# --------------------------------------------------------------------------- what is frozen, and which model it is
def test_what_changes_or_depends_on_more_than_the_row_is_not_kept(tmp_path: Path) -> None:
    made = tiny(**SIZES)
    critic = copy.copy(made)
    critic.heads = Heads({"value": "token"}, SIZES["hidden"], 0)
    specs = {
        "policy": ModelSpec(),
        "reference": ModelSpec(),
        "target": ModelSpec(ema="policy"),
        "old": ModelSpec(refresh=Refresh(every=2)),
        "both": ModelSpec(mix={"policy": 0.5, "reference": 0.5}),
        "critic": ModelSpec(),
        "unread": ModelSpec(),
    }
    models: dict[str, Any] = {**dict.fromkeys(specs, made), "critic": critic}
    reads = {f"{name}_logp" for name in specs if name != "unread"} | {"ref_logp", "ref_entropy", "critic_value"}
    (kept,) = frozen(specs, models, reads, tmp_path, print)
    assert kept.fields == {"ref_entropy": "entropy", "ref_logp": "logp"}


def test_the_key_of_a_model_is_that_of_its_numbers(tmp_path: Path) -> None:
    made = tiny(**SIZES)
    made.save(tmp_path / "here")
    made.save(tmp_path / "there")
    config = json.loads((tmp_path / "here" / "config.json").read_text())
    (tmp_path / "there" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    here, there = (pretrained(path=str(tmp_path / name)) for name in ("here", "there"))
    assert model_key(here) == model_key(pretrained(path=str(tmp_path / "here")))
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    assert model_key(here) == model_key(pretrained(path=str(tmp_path / "elsewhere")))
    assert model_key(here) != model_key(there)
    first, *others = (model_key(tiny(**SIZES, **more)) for more in ({}, {"seed": 1}, {"dtype": "bf16"}))
    assert first == model_key(tiny(**SIZES)) not in others
    with torch.no_grad():
        here.parameters()[3].flatten()[0] += 1e-3
    assert model_key(here) != model_key(pretrained(path=str(tmp_path / "elsewhere")))


def test_which_row_it_is_depends_on_ids_prompt_and_who_acted() -> None:
    ids = np.arange(6)
    acted = np.array([True, False, True])
    rows = [
        module.Tokens(x, n, a)
        for x, n, a in [(ids, 3, acted), (ids + 1, 3, acted), (ids, 2, np.append(True, acted)), (ids, 3, ~acted)]
    ]
    assert len({module.row_key(x) for x in rows}) == 4
    assert module.row_key(rows[0]) == module.row_key(module.Tokens(ids.copy(), 3, acted.copy()))


def test_equal_rows_of_a_batch_are_read_once(tmp_path: Path) -> None:
    """So that a run that is killed and goes on finds on disk what both rows had."""
    made: Any = tiny(**SIZES)
    made.__class__, made.read = Counting, 0
    rows = [made.tokenize(row) for row in (PAIRS[0], PAIRS[2], PAIRS[0])]
    (kept,) = frozen({"reference": random()}, {"reference": made}, {"ref_logp"}, tmp_path, print)
    batch = made.collate(rows)
    kept.fill(batch, 1000)
    assert made.read == sum(x.length for x in batch.inputs[:2])
    assert torch.equal(batch["ref_logp"][0], batch["ref_logp"][2])
    assert batch["ref_logp"][0].any()
