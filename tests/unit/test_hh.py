"""HH-RLHF: raw dialogues to prompts and replies, masks of a multi-turn pair, and rows that do not fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from rlx.compose import compose
from rlx.data.hh import hh_rlhf, hh_task
from rlx.models.load import tiny
from rlx.plan import plan
from rlx.run import run
from rlx.types import ConfigError, DataError

REAL = Path(__file__).parents[3] / "shared" / "data" / "hh_rlhf" / "harmless_base_test.jsonl"
SHARED = "\n\nHuman: hi\n\nAssistant: hello: you\n\nHuman: what?\nHuman: is no speaker"
GOOD = {"chosen": f"{SHARED}\n\nAssistant: this", "rejected": f"{SHARED}\n\nAssistant: that"}


def written(folder: Path, *rows: object, name: str = "pairs.jsonl") -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_a_row_is_a_prompt_and_two_replies(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        import pyarrow
        from pyarrow import parquet

        path = str(tmp_path / name)
        parquet.write_table(pyarrow.Table.from_pylist([GOOD, GOOD]), path)
    else:
        path = written(tmp_path, GOOD, GOOD, name=name)
    rows = hh_rlhf(path=path)
    assert [(r.group, r.label, r.completion) for r in rows[:2]] == [(0, 1.0, "this"), (0, -1.0, "that")]
    assert [r.group for r in rows] == [0, 0, 1, 1]
    assert [(m.role, m.content) for m in rows[0].task.prompt] == [
        ("user", "hi"),
        ("assistant", "hello: you"),
        ("user", "what?\nHuman: is no speaker"),
    ]


def test_earlier_replies_are_prompt_and_only_the_last_is_trained_on(tmp_path: Path) -> None:
    model = tiny(layers=1, hidden=16, heads=1, kv_heads=1, ffn=16)
    made = model.tokenize(hh_rlhf(path=written(tmp_path, GOOD))[0])
    ids = np.concatenate([part for turn in made.turns for part in (turn.seen, turn.did)])
    text = "".join(model.pieces(ids))
    assert text == ("<|user|>hi<|assistant|>hello: you<|end|><|user|>what?\nHuman: is no speaker<|assistant|>this<|end|>")
    assert model.pieces(made.turns[0].did) == ["t", "h", "i", "s", "<|end|>"]
    assert len(made.turns) == 1
    batch = model.collate([made])
    assert batch["mask"].tolist() == [[True] * 5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": GOOD["chosen"]}, "line 2, column 'rejected': no such column; found chosen"),
        ({**GOOD, "rejected": 3}, "line 2, column 'rejected': expected the text of a dialogue, got 3 (int)"),
        ({**GOOD, "chosen": "Hi"}, "line 2, column 'chosen': expected a dialogue that begins with"),
        ({**GOOD, "chosen": "\n\nAssistant: a"}, "column 'chosen': message 1: expected the user's, got the assistant's"),
        ({**GOOD, "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}, "message 2: expected the assistant's, got the user's"),
        ({**GOOD, "chosen": "\n\nHuman: a\n\nAssistant: "}, "message 2: expected text that is not empty"),
        ({**GOOD, "chosen": "\n\nHuman: a"}, "expected the assistant's reply at the end, got 'a' (str)"),
        (
            {**GOOD, "rejected": GOOD["rejected"].replace("hi", "ho")},
            "line 2, column 'rejected': expected the dialogue of 'chosen'",
        ),
        ({**GOOD, "rejected": "\n\nHuman: hi\n\nAssistant: a"}, "up to the last reply; message 2 differs"),
    ],
)
def test_a_row_that_does_not_fit_names_file_line_and_column(tmp_path: Path, row: object, message: str) -> None:
    path = written(tmp_path, GOOD, row, GOOD)
    with pytest.raises(DataError) as found:
        hh_rlhf(path=path)
    assert message in str(found.value)
    assert str(found.value).startswith(f"{path} line 2, column ")
    assert [r.group for r in hh_rlhf(path=path, malformed="skip")] == [0, 0, 1, 1]


def test_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, GOOD, {"chosen": "x", "rejected": "y"})
    hh_rlhf(path=path, malformed="skip")
    assert "1 rows that do not fit are left out; the first: " in capsys.readouterr().out
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:20])
    with pytest.raises(DataError, match="not a whole gzip file"):
        hh_rlhf(path=str(tmp_path / "cut.jsonl.gz"))


def test_the_splits_of_the_task(tmp_path: Path) -> None:
    rows = [{k: v + str(i) for k, v in GOOD.items()} for i in range(6)]
    task = hh_task(path=written(tmp_path, *rows), dev=1, test=2)
    said = {name: [r.completion for r in task.splits[name]()] for name in task.splits}
    assert said["pairs"] == [w + str(i) for i in range(3) for w in ("this", "that")]
    assert said["chosen"] == ["this0", "this1", "this2"]
    assert said["dev_pairs"] == ["this3", "that3"]
    assert said["test_pairs"] == ["this4", "that4", "this5", "that5"]
    assert [(r.turns, r.label) for r in task.splits["test"]()] == [([], None)] * 2
    with pytest.raises(ConfigError, match="leave nothing"):
        hh_task(path=written(tmp_path, *rows), dev=4, test=2).splits["pairs"]()
    with pytest.raises(ConfigError, match="no verifier"):
        task.verifier(task.splits["test"]())


@pytest.mark.skipif(not REAL.is_file(), reason="the HH-RLHF sample is not here (../shared/data/hh_rlhf)")
@pytest.mark.parametrize("recipe", ["reward_model", "dpo"])
def test_twenty_steps_on_the_real_pairs(tmp_path: Path, recipe: str) -> None:
    stage = {"reward_model": "rm", "dpo": "dpo"}[recipe]
    words = [recipe, "task.name=hh_rlhf", f"task.path={REAL}", "task.malformed=skip", "stages.sft.data=@task/chosen"]
    sizes = ["model.layers=1", "model.hidden=16", "model.heads=1", "model.kv_heads=1", "model.ffn=32", "stages.sft.steps=1"]
    small = [f"stages.{s}.{k}" for s in ("sft", stage) for k in ("max_length=400", "rows_per_step=2")]
    gone = (
        ["stages.rm_test=null"]
        if recipe == "reward_model"
        else ["stages.test=null", "stages.dpo.eval=null", "stages.pairs=null", "stages.dpo.data=@task/pairs"]
    )
    made = compose(
        [*words, *sizes, *small, *gone, f"objective={stage}/loss", f"stages.{stage}.steps=20", f"stages.{stage}.log_every=1"]
    )
    done = run(plan(made.config, swapped=made.swapped, given=made.given), tmp_path / "run")
    assert done["status"] == "finished"
    lines = [json.loads(x) for x in (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
