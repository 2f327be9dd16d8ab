"""Sweeps: a process a job, a row a job, restarts, and what Hydra leaves behind (nothing)."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml


def jobs(folder: str) -> dict[str, tuple[int, str]]:
    """Exit status and varied overrides of each job, in the order in which they ended."""
    lines = [json.loads(line) for line in Path(folder, "jobs.jsonl").read_text().splitlines()]
    return {str(job["job"]): (job["exit"], " ".join(o for o in job["overrides"] if "recipe=" not in o)) for job in lines}


def table(out: str) -> list[list[str]]:
    """The rows of the table of jobs, cell by cell, without its column of times."""
    lines = out[out.index("\njobs\n") :].splitlines()
    return [line.split()[:4] for line in lines[3 : lines.index("", 3)]]


def test_four_jobs_a_report_and_a_restart(rlx):
    result = rlx("train", "-m", "recipe=small", "seed=0,1", "stages.rl.lr=1e-4,3e-4", "run_dir=sweep")
    assert (result.status, result.err) == (0, "")
    assert jobs("sweep") == {
        "0": (0, "seed=0 stages.rl.lr=0.0001"),
        "1": (0, "seed=0 stages.rl.lr=0.0003"),
        "2": (0, "seed=1 stages.rl.lr=0.0001"),
        "3": (0, "seed=1 stages.rl.lr=0.0003"),
    }
    assert [row[:3] for row in table(result.out)] == [
        ["0", "finished", "seed=0"],
        ["1", "finished", "seed=0"],
        ["2", "finished", "seed=1"],
        ["3", "finished", "seed=1"],
    ]
    assert sorted(p.name for p in Path("sweep").iterdir()) == ["0", "1", "2", "3", "jobs.jsonl", "multirun.yaml"]
    assert sorted(p.name for p in Path().iterdir()) == ["mine", "sweep"]
    assert json.loads(Path("sweep/2/run.json").read_text())["sweep"] == "sweep"
    page = rlx("report", "sweep")
    assert (page.status, page.out) == (0, "sweep/report.html\n")
    assert "stages.rl.lr=0.0003" in Path("sweep/report.html").read_text()

    # Started again with another second value: what is done is skipped, what has changed is refused.
    weights = Path("sweep/0/rl/out/model.safetensors").stat().st_mtime_ns
    result = rlx("train", "-m", "recipe=small", "seed=0", "stages.rl.lr=1e-4,5e-4", "run_dir=sweep")
    assert result.status == 1
    assert "sweep/0: finished before; nothing is run again\n" in result.out
    assert Path("sweep/0/rl/out/model.safetensors").stat().st_mtime_ns == weights
    assert "  stages.rl.lr: 0.0003 -> 0.0005\n" in result.err
    assert result.err.endswith("rlx: 1 of 2 jobs failed\n")


def test_a_failing_job_leaves_the_others(rlx):
    result = rlx("train", "-m", "small", "stages.rl.group_size=4,1,6", "run_dir=sweep")
    assert (result.status, result.err.splitlines()[-1]) == (1, "rlx: 1 of 3 jobs failed")
    assert [row[:3] for row in table(result.out)][:3] == [
        ["0", "finished", "stages.rl.group_size=4"],
        ["1", "failed", "stages.rl.group_size=1"],
        ["2", "finished", "stages.rl.group_size=6"],
    ]
    assert "1 failed: before its run began; `rlx check` with its overrides says why\n" in result.out


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="needs the extra: pip install 'rlx[sweep]'"
)
def test_optuna_reads_the_objective(rlx):
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    result = rlx("train", "-m", "small", *sweeper, "stages.rl.lr=interval(1e-4,1e-3)", "objective=rl/length", "run_dir=sweep")
    assert result.status == 0
    lengths = [json.loads(Path(f"sweep/{job}/run.json").read_text())["objective"] for job in (0, 1)]
    found = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    assert found["best_value"] == max(lengths)
    (lr,) = found["best_params"].values()
    assert 1e-4 <= lr <= 1e-3


def test_a_launcher_that_is_not_installed(rlx):
    result = rlx("train", "-m", "small", "hydra/launcher=slurmm", "seed=0,1", "run_dir=sweep")
    assert result.status == 2
    assert result.err.startswith("rlx: In 'hydra/config': Could not find 'hydra/launcher/slurmm' Available options in ")
    assert result.err.endswith("; more sweepers and launchers: pip install 'rlx[sweep]'\n")
