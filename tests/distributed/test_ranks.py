"""Two processes under DeepSpeed's launcher, for real: the same metrics as one process, stopped, killed and resumed.

A start takes seconds, so that each launch is looked at from several sides.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

RECIPE = """\
purpose: "each kind of stage that computes something, for five steps"
model: {name: tiny, layers: 2, hidden: 32, heads: 2, kv_heads: 2, ffn: 64, activation_checkpointing: true}
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
    reward: [{name: format}, {name: length}, {name: "./own.py:paced"}]
    derive: [{name: kl_penalty, coef: 0.05, into: reward, add: true}, {name: lambda_returns, into: returns}]
    advantage: [{name: gae}]
    updates:
      value: {train: critic, loss: [{name: clipped_value}], lr: 1e-3}
      policy: {loss: [clipped_surrogate], minibatches: 2, epochs: 2, lr: 1e-3, optim: {name: adamw, schedule: linear, clip: 1}}
    watch: [{name: entropy}]
    prompts_per_step: 3
    group_size: 4
    max_new_tokens: 8
    steps: 8
    token_budget: 96
    eval: {every: 2, data: "@task/dev", metrics: [accuracy], limit: 5}
  test: {kind: evaluate, policies: {rl: "@rl"}, data: "@task/test", metrics: [accuracy, pass@8], limit: 5, max_new_tokens: 8}
"""

OWN = """\
import os, time, torch
from rlx.marks import stateful, whole_batch
from rlx.rollout.samplers import plain
from rlx.types import ConfigError, Episode

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


def refuses(episodes):
    if SECOND:
        raise ConfigError("a reward of mine")
    return [0.0 for _ in episodes]


def paced(episodes):
    # Where the file `hold` names a file and a number, nothing is paid once that file has so many lines.
    while True:
        try:
            name, _, number = open("hold").read().partition(" ")
            if open(name).read().count("\\n") < int(number):
                break
        except (OSError, ValueError):
            break
        time.sleep(0.01)
    return [0.0 for _ in episodes]


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

TWO = ["launch=zero2", "launch.gpus=2", "launch.deepspeed=ds.json"]
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


def start(folder: Path, command: str, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, "-c", STARTER, command, "--trust", "./own.py", *words]
    return subprocess.Popen(
        whole, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def rlx(folder: Path, *words: str) -> tuple[int, str, str]:
    """Exit status and what is said, without Python's warnings."""
    child = start(folder, "train", *words)
    out, err = child.communicate(timeout=250)
    return child.returncode, out, err


def rows(run: Path) -> dict[str, list[dict[str, Any]]]:
    timed = ("seconds", "tokens_per_second")
    files = {file.parent.name: file.read_text().splitlines() for file in run.glob("*/metrics.jsonl")}
    return {s: [{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines] for s, lines in files.items()}


def files(run: Path) -> list[str]:
    """All but caches, which are named by weights that agree to rounding."""
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and "cache" not in p.parts)


def info(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The run of one process."""
    status, _, err = rlx(folder, "all.yaml", "run_dir=one")
    assert status == 0, err
    return folder / "one"


@pytest.fixture(scope="module")
def sweep(folder: Path) -> tuple[Path, str]:
    """A sweep over two stages of ZeRO, and what it said; under stage 3 weights are divided and references offloaded."""
    status, out, err = rlx(folder, "-m", "all.yaml", "launch=zero2,zero3", *TWO[1:], "run_dir=sweep")
    assert (status, "rlx:" in err) == (0, False), err
    return folder / "sweep", out


def close(run: Path, one: Path) -> None:
    """The same files, metrics to 1e-5 and weights to a tenth of a step."""
    alone, found = rows(one), rows(run)
    assert len(alone) == 8
    assert files(run) == files(one)
    assert info(run)["status"] == "finished"
    for stage, lines in found.items():
        assert len(lines) == len(alone[stage])
        for line, expected in zip(lines, alone[stage], strict=True):
            assert line.keys() == expected.keys()
            for key, value in line.items():
                there = expected[key] if isinstance(value, str) else pytest.approx(expected[key], rel=1e-5, abs=1e-5)
                assert value == there, (run.name, stage, expected["step"], key)
    for name, mine in weights(run).items():
        theirs = weights(one)[name]
        # A tenth of one step of AdamW, which moves a weight whose gradient is next to nothing by the sign of its rounding.
        assert max(float((mine[key] - theirs[key]).abs().max()) for key in theirs) < 1e-4, name


def weights(run: Path) -> dict[str, dict[str, Any]]:
    """What each stage wrote at its end."""
    return {str(path.relative_to(run)): load_file(path) for path in run.glob("*/out/**/*.safetensors")}


def test_metrics_and_weights_are_those_of_one_process(one: Path, sweep: tuple[Path, str]) -> None:
    folder, out = sweep
    assert out.count("[sft] 5 optimiser steps of 5 rows") == 2  # one rank speaks
    assert {"sft/out/model.safetensors", "rl/out/models/critic/model.safetensors"} < weights(one).keys()
    for job in ("0", "1"):
        close(folder / job, one)
        assert info(folder / job)["hardware"].endswith(", 2 ranks")
    launches = [yaml.safe_load((folder / job / "config.yaml").read_text())["launch"] for job in ("0", "1")]
    assert [(x["name"], x["offload_frozen"]) for x in launches] == [("zero2", False), ("zero3", True)]
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "jobs.jsonl", "multirun.yaml", "sweep.json"]
    assert any(row["loss/spread"] > 0 for row in rows(one)["coupled"])


# --------------------------------------------------------------------------- stopped, killed, resumed
def held(run: Path, *words: str, step: int) -> subprocess.Popen[str]:
    """A run both ranks of which are held within the step after this one of its stage `rl`."""
    # The first line is an evaluation before the first step.
    (run.parent / "hold").write_text(f"{run / 'rl' / 'metrics.jsonl'} {step + 1}")
    child = start(run.parent, *words)
    phases = [f"{run.name}.ranks-{child.pid}/rank-{i}.phase" for i in (0, 1)]
    until(lambda: all(f"step {step + 1} of stage 'rl'" in said(run.parent / path) for path in phases), child)
    return child


def said(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def until(reached: Callable[[], bool], child: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is the case; a run that ends before is shown."""
    while not reached():
        assert child is None or child.poll() is None, child.communicate()
        time.sleep(0.01)


def ranks(run: Path, child: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks that it has started."""
    folder = run.with_name(f"{run.name}.ranks-{child.pid}")
    return [int((folder / f"rank-{i}.pid").read_text().split()[0]) for i in (0, 1)]


def alive(pid: int) -> bool:
    """Whether a process runs: one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """A run of two ranks under ZeRO-2 that SIGTERM has ended in the third of eight steps of its stage `rl`."""
    run = folder / "stopped"
    child = held(run, "train", "all.yaml", *TWO, "save.minutes=0", f"run_dir={run}", step=2)
    pids = ranks(run, child)
    child.send_signal(signal.SIGTERM)
    until(lambda: any(folder.glob("stopped.ranks-*/stop")), child)
    (folder / "hold").unlink()
    _, err = child.communicate(timeout=120)
    assert child.returncode == 143
    assert err.splitlines()[-1] == f"rlx: interrupted; go on with: rlx resume --trust ./own.py {run}"
    assert "ends after this step, with its state saved" in err
    assert (info(run)["status"], info(run)["error"]) == ("interrupted", "in stage 'rl'")
    assert not any(map(alive, pids))
    assert not list(folder.glob("stopped.ranks-*"))
    assert [path.name for path in (run / "rl" / "state").iterdir()] == ["step-000003"]
    assert rows(run)["rl"][-1]["step"] == 3
    return run


def test_killed_and_resumed_is_the_unbroken_run(folder: Path, stopped: Path, sweep: tuple[Path, str]) -> None:
    """Bit for bit: first the process that the user started is killed, then a rank, each with SIGKILL."""
    unbroken, run = sweep[0] / "0", folder / "killed"
    shutil.copytree(stopped, run)

    child = held(run, "train", "all.yaml", *TWO, "save.steps=1", f"run_dir={run}", step=5)
    pids = ranks(run, child)
    child.kill()
    child.communicate()
    until(lambda: not any(map(alive, pids)))  # within a second, by themselves
    assert [path.name for path in sorted((run / "rl" / "state").iterdir())] == ["step-000004", "step-000005"]

    child = held(run, "resume", str(run), step=6)
    assert len(list(folder.glob("killed.ranks-*"))) == 1  # what the killed start left is gone
    os.kill(ranks(run, child)[1], signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert err.startswith("rlx: rank 1 has died (killed from outside, or out of memory) in ")
    assert err.endswith(" in step 7 of stage 'rl'\n")
    assert (info(run)["status"], info(run)["error"]) == ("failed", err.removeprefix("rlx: ").strip())
    (folder / "hold").unlink()

    child = start(folder, "resume", str(run))
    out, err = child.communicate(timeout=250)
    assert (child.returncode, "rlx:" in err) == (0, False), err
    assert "[rl] goes on after step 6\n" in out
    assert out.splitlines()[-1] == "torch: False"
    (run / "error.txt").unlink()
    assert files(run) == files(unbroken)
    assert rows(run) == rows(unbroken)
    assert (run / "rl" / "samples.jsonl").read_text() == (unbroken / "rl" / "samples.jsonl").read_text()
    for name, mine in weights(run).items():
        theirs = weights(unbroken)[name]
        assert all(bool((mine[key] == theirs[key]).all()) for key in theirs), name


@pytest.mark.parametrize("launch", ["zero3", "local"])
def test_a_run_goes_on_under_another_launch(folder: Path, stopped: Path, one: Path, launch: str) -> None:
    """Two ranks under ZeRO-2 had begun it: the metrics are those of one process all the same, to 1e-5."""
    run = folder / f"on-{launch}"
    shutil.copytree(stopped, run)
    more = ["launch=zero3", *TWO[1:]] if launch == "zero3" else []
    status, out, err = rlx(folder, "all.yaml", *more, f"run_dir={run}")
    assert status == 0, err
    assert "[rl] goes on after step 3\n" in out
    assert yaml.safe_load((run / "config.yaml").read_text())["launch"]["name"] == launch
    close(run, one)


# --------------------------------------------------------------------------- in trouble
def test_out_of_memory_starts_again_and_an_error_is_told_once(folder: Path) -> None:
    """With half the token budget the first stage works; in the second, the reward of one rank refuses what it is given."""
    loss, reward = "stages.fit.loss=[./own.py:hungry]", "stages.rl.reward=[./own.py:refuses]"
    status, out, err = rlx(folder, "fit.yaml", *TWO, loss, reward, "run_dir=memory")
    assert status == 2, err
    assert err == "rlx: a reward of mine\n"
    assert out.count("! starts again with half of each stage's token_budget") == 1
    assert out.splitlines()[-1] == "torch: False"
    run = folder / "memory"
    assert [row["token_budget"] for row in rows(run)["fit"]] == [8192.0, 8192.0, 8192.0]
    assert info(run)["status"] == "failed"
    assert info(run)["error"] == err.removeprefix("rlx: ").strip()
    assert not list(folder.glob("memory.ranks-*"))


def test_a_rank_that_makes_no_progress_is_named_with_its_stacks(folder: Path) -> None:
    status, _, err = rlx(folder, "fit.yaml", *TWO, "stages.fit.loss=[./own.py:stalls]", "launch.timeout=40", "run_dir=stalled")
    assert status == 1, err
    lines = err.splitlines()
    assert lines[0] == "rlx: rank 1 made no progress in an update in step 1 of stage 'fit' for launch.timeout seconds"
    assert lines[1].startswith("rank 0: ")
    assert lines[2] == "rank 1: an update in step 1 of stage 'fit'"
    assert any("own.py" in line and line.endswith(" in stalls") for line in lines), err
