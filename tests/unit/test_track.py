"""The record of a stage, and a tracker that may fail without anything happening to it."""

import json
from pathlib import Path

import pytest
import wandb

from rlx.track import Lines, Log, NoTracker, Wandb, clock, headline
from rlx.types import Episode, Message, Task


class Recorder:
    """What wandb.init returns, as far as it is used."""

    def __init__(self, fail: bool = False) -> None:
        self.fail, self.rows, self.steps, self.axes, self.finished = fail, [], [], [], False

    def log(self, row, step):
        if self.fail:
            raise ConnectionError("gone")
        self.rows.append(row)
        self.steps.append(step)

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def finish(self):
        self.finished = True


def tracker(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> tuple[Wandb, dict]:
    given: dict = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: given.update(settings) or recorder)
    made = Wandb({"mode": "offline", "group": "sweep"}, {"seed": 3}, Path("runs/one"), "abc123")
    return made, given


def log(folder: Path, sink) -> Log:
    return Log(folder, "rl", display=Lines(0.0), tracker=sink, health=lambda stage, metrics, history: [])


def episode() -> Episode:
    return Episode(Task((Message("user", "1+1"),), "2"), 0, rewards={"format": 1.0}, reward=1.0)


def test_wandb_gets_config_identity_group_and_axes(monkeypatch, tmp_path):
    recorder = Recorder()
    sink, given = tracker(monkeypatch, recorder)
    out = log(tmp_path, sink)
    out.begin(2)
    out.step(1, {"reward": 0.5}, [episode()])
    out.step(2, {"reward": 0.6}, [])
    wanted = {"id": "abc123", "resume": "allow", "group": "sweep", "mode": "offline", "config": {"seed": 3}, "project": "rlx"}
    assert {key: given[key] for key in wanted} == wanted
    assert recorder.axes == [("rl/*", "rl/step")]
    assert recorder.rows[0] == {"rl/reward": 0.5, "rl/step": 1}
    table = recorder.rows[1]["rl/samples"]
    assert table.columns == ["step", "prompt", "completion", "reward", "advantage", "rewards"]
    assert table.data == [[1, "1+1", "", "1.0", "None", "{'format': 1.0}"]]
    assert recorder.rows[2] == {"rl/reward": 0.6, "rl/step": 2}
    assert recorder.steps == [1, 1, 2]
    sink.go_on(7)  # lines that the files have: those after them may be there, and are not added again
    out.step(3, {"reward": 0.7}, [])
    assert recorder.steps[-1] == 8
    sink.finish()
    assert recorder.finished


def written(folder: Path, sink) -> list[dict]:
    out = log(folder, sink)
    out.begin(2)
    for step in (1, 2):
        out.step(step, {"reward": step / 2, "loss": float("nan")}, [episode()])
    out.close()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_a_tracker_that_fails_changes_nothing(monkeypatch, tmp_path, capsys):
    sink, _ = tracker(monkeypatch, Recorder(fail=True))
    without = written(tmp_path / "without", NoTracker())
    assert written(tmp_path / "with", sink) == without
    assert without == [{"step": 1, "reward": 0.5, "loss": None}, {"step": 2, "reward": 1.0, "loss": None}]
    assert capsys.readouterr().err == "wandb stopped (ConnectionError: gone); metrics go on in the run directory\n"


def test_metrics_are_on_disk_as_they_come(tmp_path):
    out = log(tmp_path, NoTracker())
    out.begin(2)
    out.step(1, {"reward": 0.5}, [episode()])
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["reward"] == 0.5
    sample = json.loads((tmp_path / "samples.jsonl").read_text())
    assert (sample["prompt"], sample["rewards"], sample["status"]) == ("1+1", {"format": 1.0}, "running")


def test_a_policy_gradient_loss_is_never_the_headline():
    assert headline({"reward": 0.25, "loss": 1e-9, "tokens_per_second": 1234.5}) == "reward 0.250  tok/s 1,234"
    assert headline({"loss": 2.5}) == "loss 2.500"
    assert headline({"reward": 0.25, "reward/failures": 0.0}) == "reward 0.250"
    assert headline({"reward": 0.25, "reward/failures": 3.0}) == "reward 0.250  reward failures 3"
    assert headline({"loss": 2.5, "eval/accuracy": 0.5, "eval/pass@8": 0.75}) == "loss 2.500  accuracy 0.500  pass@8 0.750"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.9, "1:01"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_health_is_told_the_history_before_the_step(tmp_path):
    told = []

    def health(stage, metrics, history):
        told.append((metrics["reward"], [row["reward"] for row in history]))
        return []

    out = Log(tmp_path, "rl", display=Lines(0.0), tracker=NoTracker(), health=health)
    for step in (1, 2, 3):
        out.step(step, {"reward": step / 2}, [])
    assert told == [(0.5, []), (1.0, [0.5]), (1.5, [0.5, 1.0])]
