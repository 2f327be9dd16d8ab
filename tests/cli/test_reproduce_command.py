"""`rlx reproduce` from a recipe to its verdict, once: every stage is trained in the first test run and taken up after that."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlx.compose import compose
from rlx.run import alone
from rlx.source import claim_hash

RECIPE = """\
purpose: "two steps more"
model: {name: tiny, layers: 2, hidden: 32, heads: 2, kv_heads: 2, ffn: 64}
task: {name: arithmetic, digits: 2}
stages:
  base: {kind: fit, data: "@task/demos", loss: [{name: nll}], steps: 1, rows_per_step: 4, lr: 1e-3}
  more:
    kind: fit
    policy: "@base"
    data: "@task/demos"
    loss: [{name: nll}]
    steps: 9
    rows_per_step: 4
    lr: 1e-2
    log_every: 1
"""
FIRST = ["reproduce", "claimed", "scale=smoke", "--jobs", "2"]


def claim(path: str = "mine/claimed.yaml", **check: object) -> None:
    """Write the recipe with a claim of one check: its arm `frozen` learns nothing."""
    checks = [{"metric": "more/loss", "minus": "frozen", **check}]
    node = {"says": "training helps", "arms": {"frozen": {"stages.more.lr": 0.0}}, "checks": checks, "max_seeds": 4}
    Path(path).write_text(RECIPE + yaml.safe_dump({"claim": node}))


def data(folder: str) -> dict:
    return json.loads(Path(folder, "claimed.json").read_text())


def test_a_claim_and_its_verdicts(rlx):
    # Reproduced: the page, its plot, its numbers.
    claim(max=5.0)
    first = rlx(*FIRST, "--out", "docs/results")
    assert (first.status, first.err) == (0, "")
    assert first.out.startswith("claim: 2 arms x 3 seeds\n9 stages to run, 0 done before\n")  # the arms share base: 3, not 6
    assert re.search(r"^  \d/9  base of method, seed 2 and 1 more  \d+ s   about \d+ min left$", first.out, re.M)
    assert re.search(r"^  \d/9  more of frozen, seed 2  \d+ s   about \d+ min left$", first.out, re.M)
    page = Path("docs/results/claimed.md").read_text()
    assert page.splitlines()[:5] == [
        "# claimed (stand-in, scale=smoke: says nothing about the claim)",
        "",
        "Claim: training helps.",
        "",
        "**Verdict: reproduced** (3 seeds: 0, 1, 2)",
    ]
    assert "| more/loss (last) of method minus frozen <= 5 | -" in page
    assert "\n| arm | more/loss | steps | rollouts |\n" in page
    assert "\n![Curves of every arm and seed](claimed.png)\n" in page
    assert "`rlx reproduce claimed scale=smoke --jobs 2 --out docs/results --recipes mine`" in page
    code = claim_hash(compose(["claimed", "scale=smoke"], Path("mine")).config)
    assert f"by code `{code}`, settings `" in page
    assert Path("docs/results/claimed.png").read_bytes().startswith(b"\x89PNG")
    found = data("docs/results")
    assert (found["verdict"], found["seeds"], found["tuned"]) == ("reproduced", [0, 1, 2], {"method": {}, "frozen": {}})
    assert [[len(found["curves"][arm][s]["more/loss"]) for s in "012"] for arm in ("method", "frozen")] == [[2, 2, 2]] * 2
    (check,) = found["checks"]
    curves = found["curves"]
    last = [curves["method"][s]["more/loss"][-1][1] - curves["frozen"][s]["more/loss"][-1][1] for s in "012"]
    assert check["values"] == last
    starts = {curves[arm]["0"]["more/loss"][0][1] for arm in curves}
    assert len(starts) == 1  # the same weights and the same rows

    # What the table of recipes says of it (scale=smoke is not the recipe), now and after the code has changed.
    assert "[reproduced, stale: other settings]\n" in rlx("list", "claimed", "--results").out
    Path("docs/results/claimed.md").write_text(page.replace(code, "0" * 16))
    assert "[reproduced, stale: other code and settings]\n" in rlx("list", "claimed", "--results").out
    assert "[no result]\n" in rlx("list", "small", "--results").out

    # Not reproduced, by another bound: nothing is trained again; changed settings leave docs/results alone.
    claim(min=5.0)
    second = rlx(*FIRST)
    assert second.status == 3
    assert "stages to run" not in second.out
    assert "**Verdict: not reproduced** (3 seeds: 0, 1, 2)" in second.out
    root = "runs/reproduce/claimed"
    assert second.out.endswith(f"result: {root}/claimed.md   runs: {root}/runs\n")
    assert (data(root)["verdict"], data("docs/results")["verdict"]) == ("not reproduced", "reproduced")

    # Inconclusive: what does not learn is better on its second rows in the mean, but not on each seed. A seed is added.
    claim(arm="frozen", minus_at="first", max=0.0)
    third = rlx(*FIRST)
    assert third.status == 4
    assert "inconclusive at 3 seeds; adding seed 3" in third.out


def test_a_claim_is_run_by_one_process_at_a_time(rlx):
    claim(max=5.0)
    command = [sys.executable, "-m", "rlx.cli", *FIRST, "--recipes", "mine"]
    lock = Path("runs/reproduce/claimed/.lock")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) as first:
        try:
            while first.poll() is None and not (lock.is_file() and lock.read_text()):
                time.sleep(0.02)
            second = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            assert first.poll() is None
        finally:
            first.terminate()
    said = f"rlx: runs/reproduce/claimed: this claim is being run already (pid {first.pid}); wait for it to end\n"
    assert (second.returncode, second.stdout, second.stderr) == (1, "", said)
    with alone(lock.parent, "claim"):
        assert lock.read_text() == str(os.getpid())


def test_an_interrupted_claim_says_how_to_go_on(rlx):
    claim(max=5.0)
    command = [sys.executable, "-m", "rlx.cli", *FIRST, "--recipes", "mine"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
        while child.poll() is None and not any(Path("runs").glob("reproduce/claimed/stages/*")):
            time.sleep(0.02)
        child.terminate()
        _, err = child.communicate()
    said = "rlx: interrupted; the same command goes on, stages that are done are not run again\n"
    assert (child.returncode, err) == (143, said)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ({"max": 0.0, "minus": "frosen"}, "claim.checks.0: no arm 'frosen'; did you mean 'frozen'? (known: method, frozen)"),
        ({"max": 0.0, "metric": "mor/loss"}, "claim: metric 'mor/loss' names no stage of the recipe"),
    ],
)
def test_a_claim_with_a_mistake_trains_nothing(rlx, check, said):
    claim(**check)
    wrong = rlx(*FIRST)
    assert (wrong.status, wrong.out, wrong.err) == (2, "", f"rlx: {said}\n")
    assert not Path("runs").exists()
    every = rlx("check", "--all")
    assert (every.status, every.err) == (2, f"rlx: claimed: {said}\n")


def test_a_metric_that_nothing_logs_ends_the_claim_at_its_first_seeds(rlx):
    claim(max=0.0, metric="more/los")
    wrong = rlx(*FIRST)
    assert wrong.status == 2
    assert wrong.said == "\n".join(
        f"rlx: claim: no run of arm {arm} logged 'more/los'; did you mean 'more/loss'?".removeprefix(
            "rlx: " * (arm != "method")
        )
        for arm in ("method", "frozen")
    )
    assert "adding seed" not in wrong.out


def test_an_arm_that_does_not_bind_trains_nothing(rlx):
    claim(max=0.0)
    text = Path("mine/claimed.yaml").read_text().replace("stages.more.lr: 0.0", "stages.more.lrr: 0.0")
    Path("mine/claimed.yaml").write_text(text)
    wrong = rlx(*FIRST)
    assert (wrong.status, wrong.said) == (
        2,
        "rlx: claim, arm frozen: stages.more.lrr: stage kind 'fit' takes no 'lrr'; did you mean 'lr'?",
    )
    every = rlx("check", "--all")
    assert every.said == "rlx: claimed: claim, arm frozen: stages.more.lrr: stage kind 'fit' takes no 'lrr'; did you mean 'lr'?"


def test_a_recipe_without_a_claim(rlx):
    none = rlx("reproduce", "small")
    said = "rlx: recipe 'small' makes no claim (it has no `claim:`); see docs/writing_a_recipe.md\n"
    assert (none.status, none.err) == (2, said)


def test_a_claim_at_published_settings_is_the_one_of_the_paper_recipe(rlx):
    claim(max=5.0)
    Path("mine/paper").mkdir()
    Path("mine/paper/claimed.yaml").write_text("defaults: [/recipe/claimed]\npurpose: published\n")
    none = rlx("reproduce", "claimed", "--paper")
    said = "rlx: recipe 'paper/claimed' makes no claim (it has no `claim:`); see docs/writing_a_recipe.md\n"
    assert (none.status, none.err) == (2, said)
