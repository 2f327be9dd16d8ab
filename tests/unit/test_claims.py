"""The claim engine: what a recipe may claim, the number that a curve gives, and the rule from differences to a verdict."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from rlx.claims import EXIT_STATUS, Check, Claim, Outcome, Shown, claim_of, outcomes, recorded_verdict, value_at, verdict
from rlx.report.read import Run, StageLog
from rlx.types import ConfigError

CHECK = {"metric": "rl/reward", "min": 0.0}
CURVE = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0, 5.0]


def claimed(**claim) -> Claim:
    """The claim of a recipe with the stages `sft`, `rl` and `test`."""
    config = {"recipe": "x", "stages": {"sft": {}, "rl": {}, "test": {}}}
    return claim_of(config | {"claim": {"says": "so", "checks": [CHECK], **claim}})


def refused(**claim) -> str:
    with pytest.raises(ConfigError) as caught:
        claimed(**claim)
    return str(caught.value)


def curve(*values: float | None, metric: str = "reward") -> Run:
    """A run whose stage `rl` logged these values of one metric."""
    rows = [{"step": i, metric: value} for i, value in enumerate(values)]
    return Run(Path("runs/x"), {}, {}, [StageLog("rl", "online", rows, [], True)])


def outcome(*values: float, **check) -> Outcome:
    """A check whose values are the plain differences, where it has `minus`."""
    return Outcome(Check(metric="rl/reward", **check), list(values), list(values) if "minus" in check else [])


# --------------------------------------------------------------------------- the claim of a recipe
def test_a_claim_and_its_defaults():
    claim = claimed(arms={"zscore": {"stages.rl.lr": 1e-3}}, checks=[{**CHECK, "minus": "zscore", "at": "tail"}])
    assert claim.checks == [Check(metric="rl/reward", at="tail", arm="method", minus="zscore", min=0.0)]
    assert claim.names == ["method", "zscore"]
    assert (claim.equal, claim.seeds, claim.max_seeds, claim.minutes) == ("steps", [0, 1, 2], 10, 20)
    assert (claim.tune, claim.tune_seeds, claim.settings()) == ({}, [1000], [{}])


def test_every_combination_of_what_is_tuned():
    claim = claimed(tune={"stages.rl.lr": [1e-3, 1e-4], "stages.rl.steps": [5, 10]})
    assert claim.settings() == [
        {"stages.rl.lr": 1e-3, "stages.rl.steps": 5},
        {"stages.rl.lr": 1e-3, "stages.rl.steps": 10},
        {"stages.rl.lr": 1e-4, "stages.rl.steps": 5},
        {"stages.rl.lr": 1e-4, "stages.rl.steps": 10},
    ]


def test_metrics_and_columns_are_named_once_checked_ones_first():
    claim = claimed(
        checks=[CHECK, {**CHECK, "at": "tail"}, {**CHECK, "minus": "method", "minus_metric": "sft/loss"}],
        show=[{"metric": "test/rl/accuracy"}, {"metric": "rl/reward", "at": "tail"}],
    )
    assert claim.show == [Shown(metric="test/rl/accuracy", at="last"), Shown(metric="rl/reward", at="tail")]
    assert claim.metrics == ["rl/reward", "sft/loss", "test/rl/accuracy"]
    assert claim.columns == [("rl/reward", "last"), ("rl/reward", "tail"), ("test/rl/accuracy", "last")]


def test_a_metric_may_be_of_a_stage_that_the_claim_adds():
    added = {"stages.extra": {"kind": "fit"}}
    assert claimed(common=added, checks=[{"metric": "extra/loss", "max": 1.0}]).metrics == ["extra/loss"]


def test_a_recipe_without_a_claim():
    with pytest.raises(ConfigError) as caught:
        claim_of({"recipe": "sft_math", "stages": {}})
    assert str(caught.value) == "recipe 'sft_math' makes no claim (it has no `claim:`); see docs/writing_a_recipe.md"


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"says": None}, "claim.says: required by a claim, not given"),
        ({"checks": ["rl/reward"]}, "claim.checks.0: expected a mapping, got 'rl/reward'"),
        ({"show": ["rl/reward"]}, "claim.show.0: expected a mapping, got 'rl/reward'"),
        ({"minutes": "long"}, "claim.minutes: expected a whole number, got 'long'"),
        ({"minutes": 121}, "claim.minutes: at most 120, got 121"),
        ({"seeds": [0, 1, 1]}, "claim.seeds: at least 3 different ones are run, got [0, 1, 1]"),
        ({"seeds": [0, 1, 1000]}, "claim.seeds: [1000] are the seeds that the arms are tuned on; take others"),
        ({"equal": "time"}, "claim.equal: 'time' is not one of 'steps', 'rollouts', 'tokens', 'none'"),
        ({"checks": [{"metric": "rl/reward"}]}, "claim.checks.0: needs min or max"),
        ({"checks": [{**CHECK, "minus": "zscore"}]}, "claim.checks.0: no arm 'zscore' (known: method)"),
        ({"checks": [{**CHECK, "arm": "a"}], "arms": {"b": {}}}, "claim.checks.0: no arm 'a' (known: method, b)"),
        ({"checks": [{"metric": "rk/reward", "min": 0.0}]}, "claim: metric 'rk/reward' names no stage of the recipe"),
        ({"show": [{"metric": "more/loss"}]}, "claim: metric 'more/loss' names no stage of the recipe"),
        (
            {"checks": [{**CHECK, "at": "end"}]},
            "claim.checks.0.at: 'end' is not one of first, last, best, head, tail, mean, growth, reach@LEVEL",
        ),
        (
            {"checks": [{**CHECK, "maxx": 1.0}]},
            "claim.checks.0.maxx: a check takes no 'maxx'; did you mean 'max'? "
            "(known: metric, less, at, arm, minus, minus_metric, minus_at, times, min, max)",
        ),
    ],
)
def test_mistakes_in_a_claim(claim, said):
    assert refused(**claim) == said


def test_all_mistakes_are_told_at_once():
    said = refused(seeds=[0], minutes=500, checks=[{"metric": "rl/reward"}, {**CHECK, "arm": "a"}])
    assert said.splitlines() == [
        "claim.checks.0: needs min or max",
        "claim.checks.1: no arm 'a' (known: method)",
        "claim.seeds: at least 3 different ones are run, got [0]",
        "claim.minutes: at most 120, got 500",
    ]


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ({"min": 0.5}, "rl/reward (last) of method >= 0.5"),
        ({"min": 0.0, "max": 1.0, "arm": "a"}, "rl/reward (last) of a >= 0 and <= 1"),
        ({"minus": "a", "at": "tail", "min": 0.1}, "rl/reward (tail) of method minus a >= 0.1"),
        ({"minus": "a", "minus_at": "head", "min": 0.1}, "rl/reward (last) of method minus rl/reward (head) of a >= 0.1"),
        ({"minus": "a", "minus_metric": "sft/x", "max": 0.0}, "rl/reward (last) of method minus sft/x (last) of a <= 0"),
        ({"minus": "a", "times": 0.5, "max": 0.0}, "rl/reward (last) of method minus 0.5 x a <= 0"),
        ({"minus": "a", "less": "sft/x", "min": 0.0}, "rl/reward less sft/x (last) of method minus a >= 0"),
    ],
)
def test_a_check_in_words(check, said):
    assert str(Check(metric="rl/reward", **check)) == said


# --------------------------------------------------------------------------- one number of a curve
@pytest.mark.parametrize(
    ("at", "value"),
    [("first", 3.0), ("last", 5.0), ("best", 9.0), ("mean", 4.0), ("head", 2.0), ("tail", 4.0), ("growth", 2.0)],
)
def test_value_at(at, value):
    assert value_at(curve(*CURVE), "rl/reward", at) == value  # head and tail: two of eleven


def test_the_step_at_which_a_curve_first_is_as_good_as_a_level():
    run = curve(0.1, 0.5, 0.4, 0.9)
    steps = [row["step"] for row in run.stages[0].metrics]
    assert value_at(run, "rl/reward", "reach@0.5") == steps[1]
    assert value_at(run, "rl/reward", "reach@0.8") == steps[3]
    assert value_at(run, "rl/reward", "reach@1") == math.inf
    assert value_at(curve(0.9, 0.5, 0.4, metric="loss"), "rl/loss", "reach@0.5") == steps[1]  # less is better


def test_a_tenth_of_a_short_curve_is_one_value():
    assert value_at(curve(1.0, 2.0, 4.0), "rl/reward", "head") == 1.0
    assert value_at(curve(1.0, 2.0, 4.0), "rl/reward", "growth") == 3.0


def test_steps_that_lack_the_metric_are_left_out_and_a_value_that_could_not_be_had_is_nan():
    rows = [{"step": 0, "other": 1.0}, {"step": 1, "reward": 2.0}, {"step": 2, "reward": 4.0}, {"step": 3, "other": 1.0}]
    run = Run(Path("runs/x"), {}, {}, [StageLog("rl", "online", rows, [], True)])
    assert (value_at(run, "rl/reward", "first"), value_at(run, "rl/reward", "mean")) == (2.0, 3.0)
    assert math.isnan(value_at(curve(1.0, 2.0, None), "rl/reward", "last"))
    assert value_at(curve(1.0, 2.0, None), "rl/reward", "best") == 2.0


def test_the_best_of_a_loss_is_the_lowest():
    assert value_at(curve(3.0, 1.0, 2.0, metric="loss"), "rl/loss", "best") == 1.0


def test_a_metric_of_one_policy_of_an_evaluation():
    rows = [{"step": 0, "policy": "sft", "accuracy": 0.25}, {"step": 0, "policy": "rl", "accuracy": 0.75}]
    run = Run(Path("runs/x"), {}, {}, [StageLog("test", "evaluate", rows, [], True)])
    assert value_at(run, "test/sft/accuracy", "last") == 0.25
    assert value_at(run, "test/rl/accuracy", "last") == 0.75
    assert math.isnan(value_at(run, "test/accuracy", "last"))


@pytest.mark.parametrize("metric", ["rl/length", "sft/reward"])
def test_a_metric_that_no_run_wrote(metric):
    assert math.isnan(value_at(curve(1.0), metric, "last"))


def test_a_value_that_could_not_be_had_decides_nothing():
    check = Check(metric="rl/reward", minus="control", min=0.1)
    assert verdict([Outcome(check, [math.nan, 0.5], [math.nan, 0.5])]) == "inconclusive"


# --------------------------------------------------------------------------- over seeds
def test_arms_are_paired_by_seed():
    runs = {("method", 0): curve(1.0, 6.0), ("method", 7): curve(2.0, 8.0), ("a", 0): curve(3.0), ("a", 7): curve(4.0)}
    checks = [
        Check(metric="rl/reward", min=0.0),
        Check(metric="rl/reward", minus="a", min=0.0),
        Check(metric="rl/reward", minus="method", minus_at="first", min=0.0),
        Check(metric="rl/reward", minus="a", times=0.5, min=0.0),
    ]
    found = outcomes(Claim(says="", checks=checks, arms={"a": {}}), runs, [0, 7])
    assert [o.values for o in found] == [[6.0, 8.0], [3.0, 4.0], [5.0, 6.0], [4.5, 6.0]]
    assert [o.paired for o in found] == [[], [3.0, 4.0], [5.0, 6.0], [3.0, 4.0]]
    assert [o.check for o in found] == checks


def test_one_metric_less_another_is_compared_between_arms():
    runs = {(arm, 0): curve(*values) for arm, values in {"method": (1.0, 6.0), "a": (3.0, 10.0)}.items()}
    check = Check(metric="rl/reward", less="rl/length", arm="a", minus="method", min=0.0)
    claim = Claim(says="", checks=[check], arms={"a": {}})
    assert claim.metrics == claim.read_of("a") == claim.read_of("method") == ["rl/reward", "rl/length"]
    assert claim.columns == [("rl/reward", "last"), ("rl/length", "last")]
    logs = {key: replace(run, stages=[longer(run.stages[0], 2.0 if key[0] == "a" else 1.0)]) for key, run in runs.items()}
    (found,) = outcomes(claim, logs, [0])
    assert found.values == found.paired == [(10.0 - 2.0) - (6.0 - 1.0)]


def longer(log, length):
    """A log with a metric `length` in each row."""
    return replace(log, metrics=[{**row, "length": length} for row in log.metrics])


@pytest.mark.parametrize(
    ("method", "control", "value"),
    [((0.1, 0.9), (0.1, 0.2), -math.inf), ((0.1, 0.2), (0.1, 0.9), math.inf), ((0.1, 0.2), (0.1, 0.2), math.inf)],
)
def test_a_level_that_is_not_reached(method, control, value):
    """By the control: the method is earlier. By the method, whatever the control does: it is not."""
    runs = {("method", 0): curve(*method), ("a", 0): curve(*control)}
    check = Check(metric="rl/reward", at="reach@0.8", minus="a", times=0.5, max=0.0)
    (found,) = outcomes(Claim(says="", checks=[check], arms={"a": {}}), runs, [0])
    assert found.values == found.paired == [value]
    assert verdict([found]) == ("reproduced" if value < 0 else "not reproduced")


def test_seeds_on_which_one_arm_or_the_other_never_gets_there():
    found = outcome(math.inf, -math.inf, -1.0, minus="a", max=0.0)
    assert math.isnan(found.mean)
    assert verdict([found]) == "not reproduced"


@pytest.mark.parametrize(
    ("values", "check", "in_the_mean", "on_each_seed"),
    [
        ((0.25, 0.125, 0.375), {"minus": "a", "min": 0.25}, True, True),  # a seed may miss the margin, not the sign
        ((0.5, -0.1, 0.5), {"minus": "a", "min": 0.2}, True, False),
        ((0.1, 0.1, 0.1), {"minus": "a", "min": 0.2}, False, True),
        ((-0.03, 0.01, 0.01), {"minus": "a", "min": -0.02}, True, True),  # a bound that allows either sign claims none
        ((-0.5, -0.5, -0.5), {"minus": "a", "min": -0.02}, False, True),
        ((-0.5, 0.1, -0.5), {"minus": "a", "max": -0.2}, True, False),
        ((-0.5, 0.0, -0.5), {"minus": "a", "max": 0.0}, True, True),
        ((-0.5, 0.1, -0.5), {"minus": "a", "times": 0.5, "max": 0.0}, True, False),
        ((-0.5, 0.1, -0.5), {"minus": "a", "times": 1.5, "max": 0.0}, True, True),  # within 1.5 times: a little more is fine
        ((0.5, -0.1, 0.5), {"minus": "a", "times": 1.5, "min": 0.0}, True, False),
        ((0.5, -0.1, 0.5), {"minus": "a", "times": 0.5, "min": 0.0}, True, True),  # at least half of it
        ((-math.inf, -1.0, -1.0), {"minus": "a", "max": 0.0}, True, True),  # the control never gets there on one seed
        ((-math.inf, 1.0, -1.0), {"minus": "a", "max": 0.0}, False, False),  # which does not decide for the others
        ((-1.0, 5.0, 5.0), {"min": 0.0}, True, True),  # not a difference: the mean decides
        ((0.0, 1.0, 1.0), {"min": 0.5, "max": 0.6}, False, True),
    ],
)
def test_a_check_over_seeds(values, check, in_the_mean, on_each_seed):
    found = outcome(*values, **check)
    assert (found.in_the_mean, found.on_each_seed) == (in_the_mean, on_each_seed)


def test_the_verdict():
    right = outcome(0.2, 0.1, 0.3, minus="a", min=0.1)
    wavering = outcome(0.9, -0.1, 0.3, minus="a", min=0.1)
    wrong = outcome(0.0, 0.1, 0.1, minus="a", min=0.1)
    assert verdict([right, right]) == "reproduced"
    assert verdict([right, wavering]) == "inconclusive"
    assert verdict([right, wavering, wrong]) == "not reproduced"
    assert verdict([right, wrong, outcome(math.nan, 1.0, 1.0, min=0.5)]) == "inconclusive"
    assert EXIT_STATUS == {"reproduced": 0, "not reproduced": 3, "inconclusive": 4}


# --------------------------------------------------------------------------- what was found before
def test_a_recorded_verdict_is_stale_once_the_code_or_the_recipe_has_changed(tmp_path):
    page = tmp_path / "x.md"
    assert recorded_verdict(page, "abc1", "def1") == "no result"
    made = "Made at r by code `abc1` with settings `def1` and y.\n"
    page.write_text(f"# x (stand-in)\n\n**Verdict: not reproduced** (3 seeds: 0, 1, 2)\n\n{made}")
    assert recorded_verdict(page, "abc1", "def1") == "not reproduced"
    assert recorded_verdict(page, "abc2", "def1") == "not reproduced, stale: other code"
    assert recorded_verdict(page, "abc1", "def2") == "not reproduced, stale: other settings"
    assert recorded_verdict(page, "abc2", "def2") == "not reproduced, stale: other code and settings"
    page.write_text(f"nothing of the kind; {made}")
    assert recorded_verdict(page, "abc1", "def1") == "unreadable"
