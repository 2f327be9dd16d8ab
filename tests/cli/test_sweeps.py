"""Sweeps: a process a job, a row a job, restarts, and what Hydra leaves behind (nothing)."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml

OTHER = (
    "rlx: run_dir=sweep holds the jobs of another sweep; start it with the same overrides or choose another directory. "
    "What differs (there -> now):\n"
)


def written() -> dict[Path, int]:
    """Every file of the sweep and when it was written."""
    return {path: path.stat().st_mtime_ns for path in Path("sweep").rglob("*") if path.is_file() and path.name != ".lock"}


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
    assert sorted(p.name for p in Path("sweep").iterdir()) == ["0", "1", "2", "3", "jobs.jsonl", "multirun.yaml", "sweep.json"]
    assert sorted(p.name for p in Path().iterdir()) == ["mine", "sweep"]
    info = json.loads(Path("sweep/2/run.json").read_text())
    assert (info["sweep"], "--job-of" in info["command"]) == ("sweep", False)
    page = rlx("report", "sweep")
    assert (page.status, page.out) == (0, "sweep/report.html\n")
    assert "stages.rl.lr=0.0003" in Path("sweep/report.html").read_text()

    # Other overrides are refused at once, and nothing in the directory changes.
    before = written()
    for changed, said in (
        (["seed=0,2", "stages.rl.lr=1e-4,3e-4"], "seed: 0,1 -> 0,2"),
        (["seed=0,1"], "stages.rl.lr: 1e-4,3e-4 -> (absent)"),
        (["seed=0,1", "stages.rl.lr=1e-4,3e-4", "~stages.test"], "~stages.test: (absent) -> "),
        (["stages.rl.lr=1e-4,3e-4", "seed=0,1"], "order: recipe seed stages.rl.lr -> recipe stages.rl.lr seed"),
    ):
        other = rlx("train", "-m", "small", *changed, "run_dir=sweep")
        assert (other.status, other.out, other.err) == (2, "", f"{OTHER}  {said}\n")
    assert written() == before

    # The same sweep skips what has finished and runs the rest; where it runs and what it logs to may change.
    shutil.rmtree("sweep/2")
    free = ["hydra/launcher=basic", "track=none"]
    again = rlx("train", "-m", "small", "seed=0,1", "stages.rl.lr=1e-4,3e-4", *free, "run_dir=sweep")
    assert (again.status, again.err) == (0, "")
    assert again.out.count(": finished before; nothing is run again\n") == 3
    assert [status for status, _ in jobs("sweep").values()] == [0, 0, 0, 0]
    changed = {path.parts[1] for path, when in written().items() if before.get(path) != when and len(path.parts) > 2}
    assert changed == {"2"}


def test_a_sweep_that_never_began_leaves_its_directory_free(rlx):
    assert rlx("train", "-m", "small", "hydra/launcher=slurmm", "seed=0,1", "run_dir=sweep").status == 2
    assert rlx("train", "-m", "small", "stages.rl.group_size=1", "run_dir=sweep").status == 1
    assert rlx("train", "-m", "small", "seed=4", "run_dir=sweep").status == 0


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
