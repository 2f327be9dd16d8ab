"""A recipe by the path of its file, and what a claim's metrics, an adapter's keys and a scale's notes say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlx.paths import RECIPES

GRPO = (RECIPES / "reasoning" / "grpo_math.yaml").read_text(encoding="utf-8")
SFT = (RECIPES / "supervised" / "sft_math.yaml").read_text(encoding="utf-8")


def rlx(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPES.parent)}
    return subprocess.run([sys.executable, "-m", "rlx.cli", *words], cwd=cwd, env=env, capture_output=True, text=True)


def test_a_recipe_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "capitals.yaml").write_text(SFT)
    for word in ("mine/capitals.yaml", "recipe=./mine/capitals.yaml"):
        done = rlx("train", word, "scale=smoke", "seed=1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "note: scale=smoke holds the stages to at most steps 2, rows_per_step 2; sets limit 64" in done.stdout
    runs = list((tmp_path / "runs" / "capitals").iterdir())
    assert len(runs) == 2
    sweep = rlx("train", "-m", "mine/capitals.yaml", "scale=smoke", "seed=1,2", "run_dir=sweep", cwd=tmp_path)
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml"], "rlx: recipe none.yaml: there is no such file\n"),
        (["a.yaml", "--recipes", "."], "rlx: recipe a.yaml: give the recipe's name beside --recipes\n"),
        (
            ["grpo_math", "claim.says=x"],
            "rlx: claim.says=x: `claim` is what a recipe says about itself; change it in the recipe's file\n",
        ),
        (["grpo_math", "model.lora={r: two}"], "rlx: model.lora.r: expected a whole number, got 'two'\n"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "a.yaml").write_text(SFT)
    done = rlx("check", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, message)


def test_a_misspelt_adapter_key_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    done = rlx("check", "grpo_math", "model.lora={rr: 16}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("rlx: model.lora.rr: `lora` takes no 'rr'; did you mean 'r'? (known: r, lora_alpha, ")


def test_a_misspelt_metric_of_a_claim_is_found_by_check(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GRPO.replace("metric: test/rl/accuracy, arm", "metric: test/rl/acuracy, arm"))
    done = rlx("check", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("rlx: claim, arm method: stage 'test' measures no 'rl/acuracy'; write stage/metric")
    assert "did you mean 'test/rl/accuracy'?" in done.stderr
