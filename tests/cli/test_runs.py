"""Runs on disk: what they write, how they end, and how they are taken up again."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlx.run import write_text
from rlx.source import code_hash


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def info(folder: str = "out") -> dict:
    return json.loads(Path(folder, "run.json").read_text())


def test_a_run_and_what_can_be_asked_of_it(rlx):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = rlx("train", "small", "seed=3", "run_dir=out")
    assert (first.status, first.err) == (0, "")
    assert first.out.endswith("run directory: out\nlook at it:    rlx report out\n")
    run = info()
    assert run["status"] == "finished"
    assert run["command"] == "rlx train small seed=3 run_dir=out --recipes mine"
    assert (run["seed"], run["objective"]) == (3, rows("out/rl/metrics.jsonl")[-1]["eval/accuracy"])
    assert run["versions"]["torch"]
    assert yaml.safe_load(Path("out/config.yaml").read_text())["stages"]["rl"]["group_size"] == 4
    assert [row["step"] for row in rows("out/sft/metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in rows("out/rl/metrics.jsonl")] == [0, 1, 2]
    assert {row["policy"] for row in rows("out/test/metrics.jsonl")} == {"rl"}
    for stage in ("sft", "rl"):
        AutoModelForCausalLM.from_pretrained(f"out/{stage}/out")
        AutoTokenizer.from_pretrained(f"out/{stage}/out")

    # A finished run is not run again, and its record stays.
    second = rlx("train", "small", "seed=3", "run_dir=out")
    assert second.status == 0
    assert "out: finished before; nothing is run again\n" in second.out
    assert info() == run

    # Another config is refused with what differs.
    third = rlx("train", "small", "seed=4", "stages.rl.lr=2e-3", "run_dir=out")
    assert (third.status, third.err) == (
        2,
        "rlx: run_dir=out holds a run of another config; start it with the same settings or choose another directory. "
        "What differs (there -> now):\n  seed: 3 -> 4\n  stages.rl.lr: 0.001 -> 0.002\n",
    )

    # Evaluation of the run, of one directory, and as JSON.
    measured = rlx("eval", "out", "limit=3", "max_new_tokens=4", "--json")
    assert measured.status == 0
    assert [(row["policy"], row["n"]) for row in json.loads(measured.out)] == [("sft", 3.0), ("rl", 3.0)]
    measured = rlx("eval", "out/rl/out", "task=arithmetic", "limit=3", "max_new_tokens=4")
    assert measured.status == 0
    assert "(3 tasks) with 95 % interval" in measured.out
    wrong = rlx("eval", "out", "limt=3")
    assert (wrong.status, wrong.err) == (
        2,
        "rlx: limt: rlx eval takes task, task.KEY, model.KEY, seed, "
        "metrics, limit, samples, temperature, max_new_tokens, split\n",
    )


def test_stages_that_are_done_are_skipped(rlx):
    assert rlx("train", "small", "run_dir=out").status == 0
    weights = Path("out/sft/out/model.safetensors")
    before = weights.stat().st_mtime_ns
    rl = rows("out/rl/metrics.jsonl")
    done = json.loads(Path("out/sft/DONE").read_text())
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    assert info()["code"] == code_hash(config)
    assert done["code"] == code_hash({**config, "stages": {"sft": config["stages"]["sft"]}})
    Path("out/rl/checkpoints/step-000077").mkdir()
    # What kill -9 leaves in the second stage: a status that says running, half a log, no DONE.
    Path("out/rl/DONE").unlink()
    Path("out/test/DONE").unlink()
    Path("out/run.json").write_text(json.dumps(info() | {"status": "running"}))
    again = rlx("train", "small", "run_dir=out")
    assert again.status == 0
    assert "[sft] done before; skipped\n" in again.out
    assert weights.stat().st_mtime_ns == before
    assert info()["status"] == "finished"
    clocks = {"seconds", "tokens_per_second"}
    assert not Path("out/rl/checkpoints/step-000077").exists()  # of steps that this run did not go through
    strip = [{k: v for k, v in row.items() if k not in clocks} for row in rl]
    assert [{k: v for k, v in row.items() if k not in clocks} for row in rows("out/rl/metrics.jsonl")] == strip


def test_a_loss_that_is_not_finite_is_one_line(rlx):
    result = rlx("train", "small", "stages.sft.lr=1e30", "stages.sft.steps=4", "stages.sft.optim={name: adamw}", "run_dir=out")
    assert result.status == 1
    message, where = result.err.splitlines()
    assert message.startswith("rlx: stages.sft: the loss or its gradient is not finite (")
    assert where == "the traceback is in out/error.txt"
    assert info()["status"] == "failed"
    assert info()["error"].startswith("stages.sft: the loss or its gradient is not finite")
    assert "NonFinite" in Path("out/error.txt").read_text()


def test_a_disk_that_takes_no_more_is_two_lines(rlx):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); from rlx import cli\n"
        "sys.argv = 'rlx train small --recipes mine run_dir=out'.split(); cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 1
    message, where = result.stderr.splitlines()
    assert message.startswith("rlx: stages.sft: SafetensorError: ")
    assert "File too large" in message
    assert where == "the traceback is in out/error.txt"
    assert info()["status"] == "failed"


def test_an_objective_that_training_never_logs_is_said(rlx):
    result = rlx("train", "small", "objective=rl/rewrd", "run_dir=out")
    assert result.status == 0
    assert "! objective: stage 'rl' logs no 'rewrd'; did you mean 'reward'?" in result.out
    assert info()["objective"] is None


SLOW = """\
import time
from pathlib import Path

def score(episodes):
    time.sleep(0.0 if Path("fast").exists() else 0.2)
    return [float(e.num_tokens) for e in episodes]
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_saves_and_goes_on(rlx, number, status):
    Path("r.py").write_text(SLOW)
    words = [
        "small",
        "stages.rl.reward=./r.py:score",
        "--trust",
        "./r.py",
        "stages.rl.steps=30",
        "~stages.rl.eval",
        "~objective",
    ]
    command = [sys.executable, "-m", "rlx.cli", "train", *words, "--recipes", "mine", "run_dir=out"]
    log = Path("out/rl/metrics.jsonl")
    with open("log.txt", "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ)
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == status
    said = Path("log.txt").read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "rlx: interrupted; go on with: rlx resume --trust ./r.py out"
    assert (info()["status"], info()["error"]) == ("interrupted", "in stage 'rl'")
    (state,) = Path("out/rl/state").iterdir()
    step, command = int(state.name.removeprefix("step-")), info()["command"]
    assert [row["step"] for row in rows("out/rl/metrics.jsonl")] == list(range(1, step + 1))
    Path("fast").touch()
    again = rlx("resume", "out", "--trust", "./r.py")
    assert (again.status, again.err) == (0, "")
    assert f"[rl] goes on after step {step}\n" in again.out
    assert (info()["status"], info()["command"]) == ("finished", command)
    assert [row["step"] for row in rows("out/rl/metrics.jsonl")] == list(range(1, 31))
    assert not Path("out/rl/state").exists()


@pytest.mark.parametrize(
    ("numbers", "ended"),
    [("INT INT", 2), ("TERM INT", 15), ("INT TERM INT", 2), ("TERM TERM", 0), ("INT TERM", 0)],
)
def test_ctrl_c_ends_a_step_at_once_whatever_asked_first(numbers, ended):
    """A scheduler that says SIGTERM twice waits for the state."""
    code = (
        "import os, signal, sys\nfrom rlx.stopping import stoppable\n"
        "try:\n    with stoppable() as stop:\n        stop.waits = True\n"
        "        for word in sys.argv[1:]:\n            os.kill(os.getpid(), getattr(signal, 'SIG' + word))\n"
        "    print(0)\nexcept KeyboardInterrupt as end:\n    print(int(end.args[0]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *numbers.split()], capture_output=True, text=True)
    assert done.stdout == f"{ended}\n"
    assert done.stderr == "\nends after this step, with its state saved; Ctrl-C once more ends at once\n"


def test_resume_takes_the_directory_of_a_run(rlx):
    wrong = rlx("resume", "nowhere")
    assert (wrong.status, wrong.err) == (
        2,
        "rlx: nowhere: holds no run (no config.yaml); expected the directory of one\n",
    )


def test_two_processes_do_not_run_one_directory(rlx):
    from rlx.run import alone

    with alone(Path("out"), "run"):
        second = rlx("train", "small", "run_dir=out")
    assert (second.status, second.err) == (
        1,
        f"rlx: out: this run is being run already (pid {os.getpid()}); wait for it to end\n",
    )
    assert rlx("train", "small", "run_dir=out", "~stages.rl", "~stages.test", "~objective").status == 0


def test_model_directory_task_files_and_a_reward_of_the_users(rlx):
    """The real-input path: a saved model, GSM8K-like rows, an inherited recipe, one line of own code."""
    import torch
    from safetensors.torch import load_file

    from rlx.models.load import tiny

    tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64).save(Path("model"))
    Path("data").mkdir()
    problems = [
        {
            "question": f"Ann has {n} pens and buys {n + 1} more. How many?",
            "answer": f"{n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}\n#### {2 * n + 1}",
        }
        for n in range(12)
    ]
    for split in ("train", "test"):
        Path(f"data/{split}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    Path("my_reward.py").write_text("def score(episodes):\n    return [float(len(set(e.completion))) for e in episodes]\n")
    Path("mine/own.yaml").write_text(
        'defaults: [/recipe/small]\npurpose: "mine"\nstages: {rl: {reward: "./my_reward.py:score", group_size: 6}}\n'
    )
    words = ["own", "model=model", "task=gsm8k", "task.path=./data", "task.dev=4", "task.limit=8"]
    result = rlx("train", *words, "--trust", "./my_reward.py", "run_dir=out")
    assert (result.status, result.err) == (0, "")
    for stage in ("sft", "rl"):
        steps = [row for row in rows(f"out/{stage}/metrics.jsonl") if row["step"]]
        assert len(steps) == 2
        assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in steps)
    start, sft, rl = (
        load_file(p) for p in ("model/model.safetensors", "out/sft/out/model.safetensors", "out/rl/out/model.safetensors")
    )
    assert start.keys() == sft.keys() == rl.keys()
    assert any(not torch.equal(start[k], sft[k]) for k in start)
    assert any(not torch.equal(sft[k], rl[k]) for k in sft)
    sample = next(row for row in rows("out/rl/samples.jsonl") if row["step"] == 1)
    assert sample["prompt"].startswith("Ann has ")
    assert list(sample["rewards"]) == ["score"]
    assert sample["reward"] == len(set(sample["completion"]))

    # The loss mask is the completion, and nothing else.
    shown = rlx("data", "show", *words, "--trust", "./my_reward.py", "--rows", "1")
    assert (shown.status, shown.err) == (0, "")
    demo = next(line for line in shown.out.splitlines() if line.startswith("  "))
    question, _, trained = demo.partition("<|assistant|>")
    assert "[" not in question
    assert trained.startswith("[")
    assert "".join(trained.strip()[1:-1].split("][")).startswith("0 + 1 = 1\\n#### 1")


def test_a_stage_that_other_code_made_is_said(rlx):
    assert rlx("train", "small", "run_dir=out").status == 0
    Path("out/test/DONE").unlink()
    Path("out/sft/DONE").write_text(json.dumps(json.loads(Path("out/sft/DONE").read_text()) | {"code": "0" * 16}))
    Path("out/run.json").write_text(json.dumps(info() | {"status": "running"}))
    again = rlx("train", "small", "run_dir=out")
    assert "[sft] done before by other code than this (delete its DONE to run it again); skipped\n" in again.out
    assert "[rl] done before; skipped\n" in again.out


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("old")

    def fails(self, text, encoding):
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "old"


def test_dropped_keys_are_gone_from_the_run_and_it_can_be_measured(rlx):
    Path("data").mkdir()
    problem = json.dumps({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}) + "\n"
    for split in ("train", "test"):
        Path(f"data/{split}.jsonl").write_text(8 * problem)
    first = rlx("train", "small", "task=gsm8k", "task.path=./data", "task.dev=4", "run_dir=out")
    assert (first.status, first.err) == (0, "")
    assert "note: task.digits: dropped, because task 'gsm8k' takes no 'digits'\n" in first.out
    assert yaml.safe_load(Path("out/config.yaml").read_text())["task"] == {"name": "gsm8k", "path": "./data", "dev": 4}
    measured = rlx("eval", "out", "limit=2", "max_new_tokens=4")
    assert (measured.status, measured.err) == (0, "")


def test_data_is_shown_without_reading_weights(rlx):
    from rlx.models.load import tiny

    tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64).save(Path("model"))
    Path("model/model.safetensors").unlink()
    shown = rlx("data", "show", "small", "model=model", "--rows", "1")
    assert (shown.status, shown.err) == (0, "")
    assert "@task/demos: " in shown.out


@pytest.mark.parametrize(("setting", "threads"), [(None, 1), ("2", 2)])
def test_a_small_model_on_the_cpu_takes_one_thread(rlx, setting, threads):
    code = (
        "import sys, torch; torch.set_num_threads(2); from rlx import cli\n"
        "sys.argv = 'rlx train small --recipes mine run_dir=out model.device=cpu ~stages.rl ~stages.test ~objective'.split()\n"
        "cli.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": setting} if setting else {}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert f", {threads} torch thread" in info()["hardware"]
