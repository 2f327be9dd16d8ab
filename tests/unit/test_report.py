import json
import math
from pathlib import Path

import pytest
import yaml

from rlx.report import page, plots, read, tables
from rlx.types import ConfigError

SFT = {"kind": "fit", "steps": 40}
RL = {"kind": "online", "steps": 60}


def fake_run(path: Path, *, seed: int = 0, lr: str = "3e-4", status: str = "finished", error: str | None = None) -> Path:
    """A run as `rlx train` leaves it: SFT, then GRPO, then an evaluation of both policies."""
    scale = {"1e-4": 0.5, "3e-4": 1.0, "1e-3": 0.8}[lr]
    stages = {"sft": SFT, "rl": RL, "test": {"kind": "evaluate"}}
    config = {"recipe": "grpo_math", "paper": {"title": "DeepSeekMath", "year": 2024}, "seed": seed}
    config |= {"model": {"name": "tiny"}, "task": {"name": "arithmetic"}, "objective": "rl/eval/accuracy"}
    info = {"recipe": "grpo_math", "purpose": "GRPO repairs what wrong demonstrations taught.", "status": status}
    info |= {"command": "rlx train recipe=grpo_math", "error": error, "seed": seed, "seconds": 203.4, "git": None}
    info |= {"versions": {"rlx": "0.1.0", "torch": "2.13.0"}, "hardware": "2 CPU cores", "objective": None}
    info |= {
        "overrides": [f"seed={seed}", f"stages.rl.lr={lr}", "model=tiny", f"run_dir={path}"],
        "created": "2025-01-01T00:00:00",
    }
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "stages": stages}, sort_keys=False))
    (path / "run.json").write_text(json.dumps(info))

    def wave(step: int) -> float:
        return math.sin(1.7 * step + seed) + math.sin(0.61 * step * (seed + 1))

    sft = [{"step": s, "seconds": 0.2 * s, "loss": 2.5 * math.exp(-s / 12) + 0.4 + 0.03 * wave(s)} for s in range(1, 41)]
    rl: list[dict[str, object]] = []
    for step in range(61):
        skill = 0.58 - 0.01 * seed + 0.38 * scale * (1 - math.exp(-step / 18))
        row: dict[str, object] = {"step": step}
        if step:
            row |= {"seconds": 1.5 * step, "loss": 0.002 * wave(step), "grad_norm": 0.4 + 0.05 * wave(step)}
            row |= {"reward": skill + 0.04 * wave(step), "reward/answer_match": skill + 0.04 * wave(step)}
            row |= {"reward/format": min(1.0, 0.9 + step / 300), "entropy": 0.7 * math.exp(-step / 25)}
            row |= {"groups/no_signal": 0.3 + 0.1 * wave(step), "tokens_per_second": 4100 + 60 * wave(step)}
        if step % 10 == 0:
            row |= {"eval/accuracy": skill, "eval/pass@8": min(1.0, skill + 0.12)}
        rl.append(row)
    test = [{"step": 0, "policy": p, "accuracy": a, "n": 500.0} for p, a in [("sft", 0.712), ("rl", 0.91)]]
    for evaluated, (low, high) in zip(test, [(0.671, 0.75), (0.882, 0.932)], strict=True):
        evaluated |= {"accuracy/low": low, "accuracy/high": high}
    samples = [
        {
            "step": step,
            "prompt": "57+68=",
            "completion": "7+8=15, write 5\n5+6+1=12\n#### 125" if i % 3 else "<script>alert(1)</script>\n#### 115",
            "answer": "125",
            "rewards": {"answer_match": float(i % 3 > 0), "format": 1.0},
            "reward": float(i % 3 > 0) + 0.1,
            "advantage": 0.7,
            "status": "truncated" if i == 6 else "finished",
        }
        for step in (10, 60)
        for i in range(8)
    ]
    for name, rows in {"sft": sft, "rl": rl, "test": test}.items():
        write_lines(path / name / "metrics.jsonl", rows)
        (path / name / "DONE").write_text(json.dumps({"summary": {}, "kind": stages[name]["kind"]}))
    write_lines(path / "rl" / "samples.jsonl", samples)
    write_lines(path / "test" / "samples.jsonl", [{**s, "step": 0, "policy": p} for p in ("sft", "rl") for s in samples[:4]])
    return path


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> read.Run:
    return read.load_run(fake_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[read.Run]:
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    for job, (lr, seed) in enumerate([("3e-4", 0), ("3e-4", 1), ("3e-4", 2), ("1e-4", 0), ("1e-4", 1)]):
        fake_run(folder / str(job), lr=lr, seed=seed)
    write_lines(folder / "jobs.jsonl", [{"job": job, "overrides": ["model=tiny"], "exit": int(job == 10)} for job in (0, 10)])
    fake_run(folder / "10", lr="1e-4", seed=2, status="failed", error="RuntimeError: loss is nan\n  at step 3")
    found = read.load(folder)
    assert isinstance(found, list)
    return found


# --------------------------------------------------------------------------- reading
def test_stages_stand_in_the_order_of_the_config(run):
    assert [(stage.name, stage.kind, stage.done) for stage in run.stages] == [
        ("sft", "fit", True),
        ("rl", "online", True),
        ("test", "evaluate", True),
    ]


def test_jobs_of_a_sweep_are_ordered_by_number(sweep):
    assert [job.path.name for job in sweep] == ["0", "1", "2", "3", "4", "10"]


def test_a_folder_that_is_no_run_says_what_was_expected(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read.load(tmp_path)
    assert str(caught.value) == f"{tmp_path} is no run: it has no run.json, and no folder in it has one"
    with pytest.raises(ConfigError) as caught:
        read.load(tmp_path / "nothing")
    assert str(caught.value) == f"{tmp_path}/nothing is no directory: expected a run directory or a sweep directory"


def test_half_written_files_read_as_far_as_they_go(tmp_path):
    (tmp_path / "rl").mkdir()
    (tmp_path / "run.json").write_text('{"recipe": "grpo')
    (tmp_path / "config.yaml").write_text("stages: {rl: {kind: [online")
    (tmp_path / "rl" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rewa')
    (tmp_path / "rl" / "DONE").write_text("")
    run = read.load(tmp_path)
    assert isinstance(run, read.Run)
    assert run.info == run.config == {}
    assert run.stages == [read.StageLog("rl", "", [{"step": 1, "reward": 0.5}], [], True)]


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    rows = [{"step": 0, "eval/accuracy": 0.5}, {"step": 1, "reward": 0.1}, {"step": 1, "reward": 0.3}]
    write_lines(tmp_path / "rl" / "metrics.jsonl", [*rows, {"step": 0, "reward": 0.2}])
    (tmp_path / "run.json").write_text("{}")
    run = read.load_run(tmp_path)
    assert run.stages[0].metrics == [{"step": 0, "eval/accuracy": 0.5, "reward": 0.2}, {"step": 1, "reward": 0.3}]


def test_value_finds_metrics_of_trained_and_evaluate_stages(tmp_path):
    rl = [{"step": s, "eval/accuracy": a, "loss": -a} for s, a in enumerate([0.5, 0.9, math.nan, 0.2, 0.7])]
    write_lines(tmp_path / "rl" / "metrics.jsonl", rl)
    test = [{"step": 0, "policy": p, "accuracy": a} for p, a in [("org/base", 0.3), ("rl", 0.8)]]
    write_lines(tmp_path / "test" / "metrics.jsonl", test)
    (tmp_path / "config.yaml").write_text("stages: {rl: {kind: online}, test: {kind: evaluate}}")
    run = read.load_run(tmp_path)
    ats = ["first", "last", "best", "max", "min"]
    assert [read.value(run, "rl/eval/accuracy", at) for at in ats] == [0.5, 0.7, 0.9, 0.9, 0.2]
    assert read.value(run, "rl/loss", "best") == -0.9
    assert read.value(run, "test/rl/accuracy", "last") == 0.8
    assert read.value(run, "test/org/base/accuracy", "last") == 0.3
    assert [read.value(run, metric, "last") for metric in ("rl/none", "none/x", "test/no/accuracy", "rl")] == [None] * 4


# --------------------------------------------------------------------------- tables
def test_final_table(run):
    assert tables.final_table(run) == (
        "test (500 tasks) with 95 % interval\n"
        "policy             accuracy\n"
        "sft     71.2 % [67.1, 75.0]\n"
        "rl      91.0 % [88.2, 93.2]\n"
        "\n"
        "first -> last\n"
        "stage  kind    steps        time            reward     eval/accuracy             loss\n"
        "sft    fit        40       8.0 s                 -                 -  2.747 -> 0.4422\n"
        "rl     online     60  1 min 30 s  0.6631 -> 0.9506  58.0 % -> 94.6 %                -"
    )


def test_headline_is_from_the_first_to_the_last_evaluated_policy(run):
    assert str(tables.headline(run)) == (
        "test accuracy: 71.2 % (sft) -> 91.0 % (rl) (+19.8 points; the 95 % intervals do not overlap)"
    )
    control = {"policy": "more_sft", "accuracy": 0.72}
    test = read.StageLog("test", "evaluate", [*run.stages[2].metrics, control], [], True)
    assert tables.headline(read.Run(run.path, {}, run.config, [test])) == tables.headline(run)
    no_test = read.Run(run.path, run.info, run.config, run.stages[:2])
    assert str(tables.headline(no_test)) == "rl/eval/accuracy: 58.0 % -> 94.6 % (+36.6 points)"
    assert tables.headline(read.Run(run.path, {}, {}, [])) is None


def test_intervals_that_overlap_are_said_to():
    rows = [
        {"policy": p, "accuracy": a, "accuracy/low": a - 0.1, "accuracy/high": a + 0.1} for p, a in [("a", 0.5), ("b", 0.6)]
    ]
    found = tables.headline(read.Run(Path(), {}, {}, [read.StageLog("test", "evaluate", rows, [], True)]))
    assert found is not None
    assert found.remark == "+10.0 points; the 95 % intervals overlap"


def test_sweep_table(sweep):
    text = tables.sweep_table(sweep, "rl/eval/accuracy")
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[2] == ("0    finished  seed=0 stages.rl.lr=3e-4            94.6 %  3 min 23 s")
    assert "10 failed: RuntimeError: loss is nan\n" in text
    assert text.endswith(
        "settings: mean +- 95 % interval over seeds\n"
        "setting             seeds  rl/eval/accuracy\n"
        "stages.rl.lr=3e-4       3     93.6 +- 2.5 %\n"
        "stages.rl.lr=1e-4  2 of 3     75.8 +- 6.4 %"
    )


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("rl/eval/accuracy", False),
        ("rl/reward", False),
        ("rl/reward/failures", True),
        ("rl/reward/length", False),
        ("rl/eval/length", True),
        ("test/rl/wrong_length", True),
        ("rl/eval/excess_length", True),
        ("rl/grad_variance", True),
        ("rl/truncated", True),
        ("rm/loss/margin", True),
        ("loss", True),
        ("reward/loss", True),
        ("entropy", False),
    ],
)
def test_which_way_a_metric_is_better(metric, lower):
    assert read.lower_is_better(metric) is lower


def test_rows_keep_what_was_logged_without_a_value(tmp_path):
    stages = {"rl": {"kind": "online"}, "test": {"kind": "evaluate"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "run.json").write_text("{}")
    rl = [{"step": 0, "x": 1.0}, {"step": 1, "x": None}, {"step": 2}, {"step": 3, "x": 3}]
    test = [{"step": 0, "policy": "a", "x": None}, {"step": 0, "policy": "a/b", "x": 2.0}, {"step": 0, "policy": "c"}]
    write_lines(tmp_path / "rl" / "metrics.jsonl", rl)
    write_lines(tmp_path / "test" / "metrics.jsonl", test)
    run = read.load_run(tmp_path)
    names = ["rl/x", "test/a/x", "test/a/b/x", "test/c/x", "rl/y", "none/x"]
    assert [str(read.rows(run, name)) for name in names] == ["[1.0, nan, 3.0]", "[nan]", "[2.0]", "[]", "[]", "[]"]
    assert [read.value(run, name, "last") for name in names] == [3.0, None, 2.0, None, None, None]


def test_what_was_spent_is_no_metric(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    write_lines(tmp_path / "rl" / "metrics.jsonl", [{"step": 1, "reward": 0.5, "spent/tokens": 9.0}])
    assert tables.metric_names(read.load_run(tmp_path).stages[0]) == ["reward"]


def test_headline_of_a_sweep_is_its_best_setting(sweep):
    assert str(tables.sweep_headline(sweep, "rl/eval/accuracy")) == (
        "rl/eval/accuracy, best of 2 settings: 93.6 +- 2.5 % (stages.rl.lr=3e-4, mean over 3 seeds with 95 % interval)"
    )
    assert str(tables.sweep_headline(sweep[3:4], "rl/eval/accuracy")) == (
        "rl/eval/accuracy: 76.3 % (one seed) (stages.rl.lr=1e-4 model=tiny)"
    )
    assert tables.sweep_headline(sweep[5:], "rl/eval/accuracy") is None


def test_mean_interval_is_students():
    mean, half = tables.mean_interval([0.8, 0.9, 1.0])
    assert mean == pytest.approx(0.9, abs=1e-12)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3), abs=1e-9)
    assert math.isnan(tables.mean_interval([0.5])[1])
    assert tables.spread("accuracy", [0.5]) == "50.0 % (one seed)"
    assert tables.student_t(31) == pytest.approx(2.0395, abs=1e-3)
    assert tables.student_t(120) == pytest.approx(1.9799, abs=1e-3)


def test_a_wide_table_goes_on_below_with_its_first_column_and_in_ascii():
    table = tables.Table("", ["policy", *(f"metric{i}" for i in range(8))], [["rl\u00e9", *["1" * 16] * 8]], notes=["x\ny"])
    lines = tables.text(table).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines] == ["policy", "rl\\xe9", "policy", "rl\\xe9", "x"]
    assert [len(line.split()) for line in lines] == [6, 6, 4, 4, 2]


@pytest.mark.parametrize(
    ("seconds", "said"), [(8.46, "8.5 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (None, "-")]
)
def test_duration(seconds, said):
    assert tables.duration(seconds) == said


# --------------------------------------------------------------------------- charts
def test_reward_and_evaluations_come_first_and_the_loss_last(run):
    sft, rl, test = (plots.stage_charts(stage) for stage in run.stages)
    assert [chart.name for chart in rl[0]] == ["rl-evaluation", "rl-reward", "rl-reward_parts"]
    assert [chart.name for chart in rl[1]] == [
        *("rl-entropy", "rl-grad_norm", "rl-groups_no_signal", "rl-tokens_per_second", "rl-loss")
    ]
    assert [chart.name for chart in sft[0]] == ["sft-loss"]
    assert test == ([], [])


def test_noisy_metrics_are_smoothed_above_their_raw_values_and_evaluations_are_points(run):
    evaluation, reward, _ = plots.stage_charts(run.stages[1])[0]
    assert [line.points for line in evaluation.lines] == [True, True]
    assert evaluation.y == "share (%)"
    assert evaluation.lines[0].y[0] == pytest.approx(58.0, abs=1e-9)
    (line,) = reward.lines
    assert line.faint == (read.series(run.stages[1], "reward"),)
    assert line.y == plots.smooth(line.faint[0][1], 5)


def test_the_parts_of_a_reward_are_drawn_over_the_kl_to_the_reference():
    kl, proxy, gold = [0.0, 0.4, 0.2], [0.0, 3.0, 1.0], [0.0, -1.0, 2.0]
    names = ("step", "policy/ref_kl", "reward", "reward/model_score", "reward/verifier")
    rows = [dict(zip(names, values, strict=True)) for values in zip([1, 2, 3], kl, proxy, proxy, gold, strict=True)]
    main, _ = plots.stage_charts(read.StageLog("ppo", "online", rows, [], True))
    chart = main[-1]
    assert (chart.title, chart.x, chart.y) == ("ppo: reward parts over KL", "KL to the reference (nats a token)", "reward")
    assert [(line.label, line.x, line.y) for line in chart.lines] == [
        ("model score", [0.0, 0.2, 0.4], [0.0, 1.0, 3.0]),
        ("verifier", [0.0, 0.2, 0.4], [0.0, 2.0, -1.0]),
    ]
    assert "KL to the reference (nats a token)" in plots.svg(chart)


def test_smooth_is_the_mean_around_each_value():
    assert plots.smooth([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert plots.smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_a_sweeps_line_is_the_mean_over_seeds_and_leaves_out_failed_runs(sweep):
    loss, accuracy, _, reward = plots.sweep_charts(sweep)
    assert [c.name for c in (loss, accuracy, reward)] == ["sft-loss", "rl-eval_accuracy", "rl-reward"]
    assert [line.label for line in accuracy.lines] == ["stages.rl.lr=3e-4", "stages.rl.lr=1e-4"]
    assert [len(line.faint) for line in accuracy.lines] == [3, 2]
    assert plots.sweep_charts([run for run in sweep if run.info["status"] == "failed"]) == []


def test_svg_is_the_same_every_time_and_keeps_text_and_css_colours(run):
    chart = plots.stage_charts(run.stages[1])[0][0]
    drawn = plots.svg(chart)
    assert drawn == plots.svg(chart)
    assert drawn.startswith("<svg")
    assert ">pass@8</text>" in drawn
    assert "var(--line0)" in drawn
    assert not [colour for colour in plots.COLOURS.values() if colour in drawn]
    hostile = plots.Chart("x", "</svg><script>$a", "y", [plots.Line("a", [1.0], [2.0])])
    assert "<script>" not in plots.svg(hostile)


# --------------------------------------------------------------------------- the page
def test_page_of_a_run_is_one_file_and_escapes_what_the_model_wrote(run):
    file = page.write(run.path)
    html = file.read_text()
    assert file == run.path / "report.html"
    assert "71.2 % (sft)" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in html
    assert "GRPO repairs what wrong demonstrations taught." in html
    assert "objective: rl/eval/accuracy" in html
    headings = ["rl, step 60", "rl, step 10", "test, policy sft", "test, policy rl"]
    assert sorted(headings, key=html.index) == headings
    assert html.index("rl: evaluation") < html.index("rl: reward") < html.index("rl: loss")
    assert not [tag for tag in ("<link", "<img", "src=", "@import", "<script") if tag in html]
    assert (run.path / "report" / "rl-evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_page_of_a_sweep(sweep):
    html = page.write(sweep[0].path.parent).read_text()
    assert "sweep of 6: 5 finished, 1 failed" in html
    assert f"Directory: {sweep[0].path.parent}<" in html
    assert "10 failed: RuntimeError: loss is nan" in html
    assert "stages.rl.lr=3e-4" in html


def test_jobs_that_failed_before_their_run_began_are_rows_of_the_report(tmp_path):
    jobs = [{"job": job, "overrides": ["recipe=grpo_math", f"stages.rl.lr={lr}"], "exit": 2} for job, lr in enumerate("ab")]
    write_lines(tmp_path / "jobs.jsonl", [{**jobs[0], "exit": 0}, jobs[1]])
    fake_run(tmp_path / "0")
    html = page.write(tmp_path).read_text()
    assert "sweep of 2: 1 finished, 1 failed" in html
    assert "1 failed: before its run began; `rlx check` with its overrides says why" in html
    # The run of an earlier start, which this job was refused to take up, is not its result.
    write_lines(tmp_path / "jobs.jsonl", [jobs[0]])
    html = page.write(tmp_path).read_text()
    assert "sweep of 1: 1 failed" in html
    assert "<h1>grpo_math</h1>" in html


def test_a_folder_of_runs_that_no_sweep_made_is_called_runs(tmp_path):
    fake_run(tmp_path / "mine")
    fake_run(tmp_path / "yours")
    assert ">2 runs: 2 finished<" in page.write(tmp_path).read_text()
    (tmp_path / "multirun.yaml").touch()
    assert ">sweep of 2: 2 finished<" in page.write(tmp_path).read_text()


def test_page_of_an_interrupted_run_has_no_error(tmp_path):
    run = fake_run(tmp_path / "run", status="interrupted", error="in stage 'rl'")
    html = page.write(run).read_text()
    assert "This run was interrupted in stage &#39;rl&#39;: the page shows what it logged until then." in html
    assert "Error:" not in html
    assert 'badge bad">interrupted' not in html


def test_page_of_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "ppo", "status": "running"}')
    html = page.write(tmp_path, tmp_path / "elsewhere" / "page.html").read_text()
    assert "This run is still going" in html
    assert (tmp_path / "elsewhere" / "page.html").is_file()


def test_a_page_that_is_no_html_file_is_refused(run):
    with pytest.raises(ConfigError, match=r"^page: expected the name of a page, ending in \.html$"):
        page.write(run.path, Path("page"))


def test_a_stage_that_is_under_way_says_how_far_it_is(tmp_path):
    write_lines(tmp_path / "rl" / "metrics.jsonl", [{"step": 3, "reward": 0.5}])
    (tmp_path / "config.yaml").write_text("stages: {rl: {kind: online, steps: 10}, sft: {kind: fit}}")
    assert tables.final_table(read.load_run(tmp_path)).splitlines()[2:] == [
        "rl     online      3 of 10     -  0.5 -> 0.5",
        "sft    fit     not started     -           -",
    ]
    (tmp_path / "config.yaml").write_text("stages:")
    assert tables.final_table(read.load_run(tmp_path)).splitlines()[2] == "rl     -         3     -  0.5 -> 0.5"


@pytest.mark.parametrize(("status", "said"), [("interrupted", "interrupted"), ("failed", "failed"), ("running", "begun")])
def test_a_stage_that_logged_nothing_says_what_became_of_it(tmp_path, status, said):
    (tmp_path / "config.yaml").write_text("stages: {sft: {kind: fit, steps: 2}, rl: {kind: online}}")
    (tmp_path / "run.json").write_text(json.dumps({"status": status}))
    (tmp_path / "sft").mkdir()
    rows = [line.split() for line in tables.final_table(read.load_run(tmp_path)).splitlines()[2:]]
    assert rows == [["sft", "fit", said, "-"], ["rl", "online", "not", "started", "-"]]


def test_samples_shown_are_the_highest_and_lowest_in_reward(run):
    picked = page.pick([sample for sample in run.stages[1].samples if sample["step"] == 60])
    assert [sample["right"] for sample in picked["shown"]] == [True] * 3 + [False] * 3
    assert (picked["right"], picked["judged"], picked["logged"]) == (5, 8, 8)
    assert page.right({"rewards": {"length": -1.0}, "reward": -1.0}) is None
    assert page.right({"rewards": None}) is None
    assert [page.right({"rewards": {"verifier": x}}) for x in (1.0, 0.5, None)] == [True, False, None]


def test_long_text_is_cut():
    assert page.cut("a" * 8001) == "a" * 8000 + "\n[1 more characters]"
    assert page.cut("short") == "short"
