"""Two processes under DeepSpeed's launcher, for real: the same metrics as one process, and an end when one is in trouble.

A start takes seconds, so that each launch is looked at from several sides.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

RECIPE = """\
purpose: "each kind of stage that computes something, for five steps"
model: {name: tiny, layers: 2, hidden: 32, heads: 2, kv_heads: 2, ffn: 64}
task: {name: arithmetic, digits: 2}
objective: rl/eval/accuracy
stages:
  sft: {kind: fit, data: "@task/demos", loss: [nll], steps: 5, rows_per_step: 5, lr: 1e-3, log_every: 1, token_budget: 64}
  single: {kind: fit, policy: "@sft", data: "@task/demos", loss: [nll], steps: 5, rows_per_step: 1, lr: 1e-3, log_every: 1}
  coupled:
    kind: fit
    policy: "@sft"
    data: "@task/demos"
    loss: [{name: "./own.py:spread"}]
    steps: 5
    rows_per_step: 5
    lr: 1e-3
    log_every: 1
    token_budget: 64
  pairs: {kind: collect, policy: "@sft", data: "@task/train", reward: [{name: length}], rows: pairs, group_size: 4, limit: 8,
          margin: -1, max_new_tokens: 6}
  together: {kind: collect, policy: "@sft", data: "@task/train", sampler: {name: "./own.py:regrouped"}, reward: [length],
             rows: best, group_size: 2, limit: 4, max_new_tokens: 6}
  dpo:
    kind: fit
    policy: "@sft"
    reference: "@sft"
    data: "@pairs"
    loss: [{name: dpo}]
    steps: 5
    rows_per_step: 3
    lr: 1e-3
    log_every: 1
    token_budget: 64
  rl:
    kind: online
    policy: "@sft"
    reference: "@sft"
    value: "@sft"
    data: "@task/train"
    reward: [{name: format}, {name: length}]
    derive: [{name: kl_penalty, coef: 0.05, into: reward, add: true}, {name: lambda_returns, into: returns}]
    advantage: [{name: gae}]
    updates:
      value: {train: critic, loss: [{name: clipped_value}], lr: 1e-3}
      policy: {loss: [clipped_surrogate], minibatches: 2, epochs: 2, lr: 1e-3, optim: {name: adamw, schedule: linear, clip: 1}}
    watch: [{name: entropy}]
    prompts_per_step: 3
    group_size: 4
    max_new_tokens: 8
    steps: 5
    token_budget: 96
    eval: {every: 2, data: "@task/dev", metrics: [accuracy], limit: 5}
  test: {kind: evaluate, policies: {rl: "@rl"}, data: "@task/test", metrics: [accuracy, pass@8], limit: 5, max_new_tokens: 8}
"""

OWN = """\
import os, signal, time, torch
from rlx.learner import stateful, whole_batch
from rlx.rollout.samplers import plain
from rlx.types import Episode

SECOND = os.environ.get("RANK") == "1"


@whole_batch
@stateful("level", 0.0, lambda level, logp, mask: 0.5 * level + 0.5 * logp[mask].mean())
def spread(logp, mask, level):
    x = torch.where(mask, logp, 0.0).sum(1)
    return (x - x.mean()).square().mean() + (x.mean() - level).square()


def regrouped(play, rows, n):
    return plain(play, [Episode(row.task, 100 + i) for i, row in enumerate(rows)], n)


regrouped.together = True


def hungry(logp, mask):
    if SECOND and len(mask) > 2:
        raise torch.OutOfMemoryError("too many rows")
    return -logp


def raises(episodes):
    if SECOND:
        raise ValueError("a reward of mine")
    return [0.0 for _ in episodes]


def dies(logp, mask):
    if SECOND:
        os.kill(os.getpid(), signal.SIGKILL)
    return -logp


def stalls(logp, mask):
    if SECOND:
        time.sleep(1000)
    return -logp
"""

FIT = """\
purpose: "one loss"
model: {name: tiny, layers: 2, hidden: 32, heads: 2, kv_heads: 2, ffn: 64}
task: {name: arithmetic, digits: 2}
stages:
  fit: {kind: fit, data: "@task/demos", loss: [{name: nll}], steps: 3, rows_per_step: 8, lr: 1e-3, log_every: 1}
  rl: {kind: online, policy: "@fit", data: "@task/train", reward: [{name: format}], advantage: [{name: group_mean}],
       loss: [{name: policy_gradient}], prompts_per_step: 2, group_size: 2, max_new_tokens: 4, steps: 3, lr: 1e-3}
"""

TWO = ["launch=zero2", "launch.gpus=2"]
# What the process that the user starts imports, said at its end.
STARTER = "import sys; from rlx import cli\ntry: cli.main()\nfinally: print('torch:', 'torch' in sys.modules)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    (path / "all.yaml").write_text(RECIPE)
    (path / "fit.yaml").write_text(FIT)
    (path / "own.py").write_text(OWN)
    divide_all = {"stage3_param_persistence_threshold": 0}
    (path / "ds.json").write_text(json.dumps({"zero_optimization": divide_all, "zero_allow_untested_optimizer": "auto"}))
    return path


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", STARTER, "train", "--trust", "./own.py", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def rlx(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit status and what is said, without Python's warnings."""
    child = start(folder, *words)
    out, err = child.communicate(timeout=250)
    return child.returncode, out, err


def rows(run: Path) -> dict[str, list[dict[str, Any]]]:
    timed = ("seconds", "tokens_per_second")
    files = {file.parent.name: file.read_text().splitlines() for file in run.glob("*/metrics.jsonl")}
    return {s: [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines] for s, lines in files.items()}


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def info(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The run of one process."""
    status, _, err = rlx(folder, "all.yaml", "run_dir=one")
    assert status == 0, err
    return folder / "one"


def test_metrics_and_weights_are_those_of_one_process(folder: Path, one: Path) -> None:
    """A sweep over two stages of ZeRO; under stage 3 every weight is divided."""
    status, out, err = rlx(
        folder, "-m", "all.yaml", "launch=zero2,zero3", "launch.gpus=2", "launch.deepspeed=ds.json", "run_dir=sweep"
    )
    assert (status, "rlx:" in err) == (0, False), err
    assert out.count("[sft] 5 optimiser steps of 5 rows") == 2  # one rank speaks
    alone = rows(one)
    assert len(alone) == 8
    for job in ("0", "1"):
        run = folder / "sweep" / job
        assert files(run) == files(one)
        assert info(run)["status"] == "finished"
        assert info(run)["hardware"].endswith(", 2 ranks")
        for stage, lines in rows(run).items():
            assert len(lines) == len(alone[stage])
            for line, expected in zip(lines, alone[stage], strict=True):
                assert line.keys() == expected.keys()
                for key, value in line.items():
                    there = expected[key] if isinstance(value, str) else pytest.approx(expected[key], rel=1e-5, abs=1e-5)
                    assert value == there, (job, stage, expected["step"], key)
        for part in ("sft", "single", "coupled", "dpo", "rl", "rl/critic"):
            stage, _, name = part.partition("/")
            place = Path(stage, "out", *(["models", name] if name else []), "model.safetensors")
            mine, theirs = load_file(run / place), load_file(one / place)
            # A tenth of one step of AdamW, which moves a weight whose gradient is next to nothing by the sign of its rounding.
            assert max(float((mine[key] - theirs[key]).abs().max()) for key in theirs) < 1e-4, part
    assert sorted(p.name for p in (folder / "sweep").iterdir()) == ["0", "1", "jobs.jsonl", "multirun.yaml", "sweep.json"]
    assert any(row["loss/spread"] > 0 for row in alone["coupled"])


def test_out_of_memory_starts_again_and_an_error_is_told_once(folder: Path) -> None:
    """With half the token budget the first stage works; in the second, the reward of one rank raises."""
    loss, reward = "stages.fit.loss=[./own.py:hungry]", "stages.rl.reward=[./own.py:raises]"
    status, out, err = rlx(folder, "fit.yaml", *TWO, loss, reward, "run_dir=memory")
    assert status == 2, err
    assert err.startswith("rlx: stages.rl.reward: reward 'raises' raised ValueError: a reward of mine (own.py line ")
    assert err.count("\n") == 1
    assert out.count("! starts again with half of each stage's token_budget") == 1
    assert out.splitlines()[-1] == "torch: False"
    run = folder / "memory"
    assert [row["token_budget"] for row in rows(run)["fit"]] == [8192.0, 8192.0, 8192.0]
    assert info(run)["status"] == "failed"
    assert info(run)["error"] == err.removeprefix("rlx: ").strip()
    assert not list(folder.glob("memory.ranks-*"))


def test_a_rank_that_is_killed_ends_the_run(folder: Path) -> None:
    status, _, err = rlx(folder, "fit.yaml", *TWO, "stages.fit.loss=[./own.py:dies]", "run_dir=killed")
    assert status == 1
    said = "rank 1 has died (killed from outside, or out of memory) in an update in step 1 of stage 'fit'"
    assert err == f"rlx: {said}\n"
    assert (info(folder / "killed")["status"], info(folder / "killed")["error"]) == ("failed", said)


def test_a_rank_that_makes_no_progress_is_named_with_its_stacks(folder: Path) -> None:
    status, _, err = rlx(folder, "fit.yaml", *TWO, "stages.fit.loss=[./own.py:stalls]", "launch.timeout=8", "run_dir=stalled")
    assert status == 1, err
    lines = err.splitlines()
    assert lines[0] == "rlx: rank 1 made no progress in an update in step 1 of stage 'fit' for launch.timeout seconds"
    assert lines[1].startswith("rank 0: ")
    assert lines[2] == "rank 1: an update in step 1 of stage 'fit'"
    assert any("own.py" in line and line.endswith(" in stalls") for line in lines), err


def test_an_interrupt_saves_and_leaves_no_process(folder: Path) -> None:
    child = start(folder, "fit.yaml", *TWO, "stages.fit.steps=100000", "run_dir=stopped")
    metrics = folder / "stopped" / "fit" / "metrics.jsonl"
    while child.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    ranks = [int(path.read_text().split()[0]) for path in folder.glob("stopped.ranks-*/rank-*.pid")]
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "rlx: interrupted; go on with: rlx train --recipes fit.yaml --trust ./own.py recipe=fit launch=zero2" in err
    assert info(folder / "stopped")["status"] == "interrupted"
    assert (folder / "stopped" / "fit" / "checkpoints" / "interrupted" / "model.safetensors").is_file()
    assert len(ranks) == 2
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert math.isfinite(rows(folder / "stopped")["fit"][-1]["loss"])
