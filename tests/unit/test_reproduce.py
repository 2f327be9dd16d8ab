"""Arms and seeds as a graph of stages: what an arm changes, what two arms share, what was spent, how a stage fails."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlx import graph as stages
from rlx.claims import Check, Claim
from rlx.graph import Node, content_hash, done, execute, files, graph, stage_code, tail
from rlx.report.read import Run, StageLog
from rlx.reproduce import arm_config, arm_run, core_seconds, equal_budget, put, spent
from rlx.types import ConfigError

CONFIG = {
    "recipe": "x",
    "seed": 0,
    "run_dir": None,
    "model": {"name": "tiny", "layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64},
    "task": {"name": "arithmetic", "digits": 2},
    "objective": "more/loss",
    "claim": {"says": "so"},
    "stages": {
        "base": {"kind": "fit", "data": "@task/demos", "loss": [{"name": "nll"}], "steps": 1, "rows_per_step": 2, "lr": 1e-3},
        "more": {
            "kind": "fit",
            "policy": "@base",
            "data": "@task/demos",
            "loss": [{"name": "nll"}],
            "steps": 1,
            "rows_per_step": 2,
            "lr": 1e-3,
        },
        "other": {"kind": "fit", "data": "@task/demos", "loss": [{"name": "nll"}], "steps": 1, "rows_per_step": 2, "lr": 1e-3},
    },
}


def claim(**keys) -> Claim:
    return Claim(says="so", checks=[Check(metric="more/loss", max=9.0)], **keys)


def keys(needs: tuple[str, ...] = ("more",), seed: int = 0, **changes) -> dict[str, str]:
    """The key of every stage that `needs` takes; `stages_more_lr=1` changes stages.more.lr."""
    own = {path.replace("_", ".", 2): value for path, value in changes.items()}
    config = arm_config(CONFIG, claim(arms={"arm": own}), "arm", {}, seed)
    return {node.stage: node.key for node in graph(config, needs)}


def log(stage: str, *rows: dict) -> StageLog:
    return StageLog(stage, "online", list(rows), [], True)


# --------------------------------------------------------------------------- what an arm changes
@pytest.mark.parametrize(
    ("path", "value", "left"),
    [
        ("a.x", 2, {"a": {"x": 2}, "b": [{"n": 1}, {"n": 2}]}),
        ("a.new", [1], {"a": {"x": 1, "new": [1]}, "b": [{"n": 1}, {"n": 2}]}),
        ("b.1.n", 5, {"a": {"x": 1}, "b": [{"n": 1}, {"n": 5}]}),
        ("b.0", {"m": 3}, {"a": {"x": 1}, "b": [{"m": 3}, {"n": 2}]}),
        ("b", [], {"a": {"x": 1}, "b": []}),
        ("a.x", None, {"a": {}, "b": [{"n": 1}, {"n": 2}]}),
        ("a.y", None, {"a": {"x": 1}, "b": [{"n": 1}, {"n": 2}]}),
    ],
)
def test_put(path, value, left):
    node = {"a": {"x": 1}, "b": [{"n": 1}, {"n": 2}]}
    put(node, path, value)
    assert node == left


@pytest.mark.parametrize(("path", "part"), [("c.x", "c"), ("b.2.n", "2"), ("b.one.n", "one"), ("a.x.y.z", "y")])
def test_a_path_that_leads_nowhere(path, part):
    with pytest.raises(KeyError) as caught:
        put({"a": {"x": 1}, "b": [{"n": 1}, {"n": 2}]}, path, 0)
    assert caught.value.args == (part,)


def test_an_arm_whose_path_leads_nowhere():
    with pytest.raises(ConfigError) as caught:
        arm_config(CONFIG, claim(arms={"a": {"stages.moer.lr": 1.0}}), "a", {}, 0)
    assert str(caught.value) == "claim, arm a: 'stages.moer.lr': the recipe has no 'moer' there"


def test_an_arm_is_the_recipe_with_what_all_change_then_its_own_then_what_is_tuned():
    before = copy.deepcopy(CONFIG)
    made = claim(
        common={"stages.more.steps": 2, "stages.more.lr": 0.1, "stages.base.lr": 0.1},
        arms={"slow": {"stages.more.lr": 0.2, "stages.base.lr": 0.2}},
    )
    slow = arm_config(CONFIG, made, "slow", {"stages.more.lr": 0.3}, 7)
    stages = slow["stages"]
    assert (stages["more"]["steps"], stages["more"]["lr"], stages["base"]["lr"]) == (2, 0.3, 0.2)
    assert slow["seed"] == 7
    method = arm_config(CONFIG, made, "method", {}, 7)
    assert (method["stages"]["more"]["lr"], method["stages"]["base"]["lr"]) == (0.1, 0.1)
    assert slow.keys() == method.keys() == CONFIG.keys() - {"claim", "run_dir"}
    assert before == CONFIG


def test_arms_do_not_share_the_nodes_that_a_claim_adds():
    made = claim(common={"stages.extra": {"kind": "fit", "lr": 1.0}}, arms={"a": {"stages.extra.lr": 2.0}})
    assert arm_config(CONFIG, made, "a", {}, 0)["stages"]["extra"]["lr"] == 2.0
    assert arm_config(CONFIG, made, "method", {}, 0)["stages"]["extra"]["lr"] == 1.0


# --------------------------------------------------------------------------- the graph
def test_a_graph_holds_what_is_needed_and_what_that_starts_from():
    nodes = graph(arm_config(CONFIG, claim(), "method", {}, 0), ["more"])
    assert [node.stage for node in nodes] == ["base", "more"]
    assert nodes[1].inputs == (nodes[0],)
    assert nodes[0].key.startswith("base-")
    assert nodes[1].folder(Path("root")) == Path("root/stages") / nodes[1].key


def test_arms_share_the_stages_before_what_they_change():
    assert keys() == keys()
    later = keys(stages_more_lr=2e-3)
    assert later["base"] == keys()["base"]
    assert later["more"] != keys()["more"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"stages_base_lr": 2e-3}, {"model_layers": 1}, {"task_digits": 3}])
def test_a_key_changes_with_all_that_decides_the_stage_and_what_it_starts_from(change):
    changed = keys(**change)
    assert changed["base"] != keys()["base"]
    assert changed["more"] != keys()["more"]


def test_a_key_does_not_change_with_a_stage_that_it_does_not_start_from():
    assert keys(stages_other_lr=2e-3) == keys()


def test_a_key_changes_with_the_code(monkeypatch):
    before = keys()
    monkeypatch.setattr(stages, "code_hash", lambda *_: "other")
    assert keys()["base"] != before["base"]


def test_a_key_does_not_change_with_the_code_of_another_stage():
    changed = keys(stages_more_loss=[{"name": "entropy"}])
    assert changed["base"] == keys()["base"]
    assert changed["more"] != keys()["more"]


def test_a_graph_of_a_config_with_a_mistake():
    with pytest.raises(ConfigError) as caught:
        keys(stages_more_policy="@bass")
    said = "stages.more.policy: '@bass' refers to no stage of the recipe; did you mean 'base'? (known: base, more, other)"
    assert str(caught.value) == said


# --------------------------------------------------------------------------- what was spent
def test_spent_adds_the_stages_that_train():
    sft = log("sft", {"step": 10, "spent/updates": 10.0, "spent/tokens": 5.0}, {"step": 20, "spent/updates": 20.0})
    rl = log("rl", {"step": 0, "accuracy": 0.1}, {"step": 2, "spent/updates": 8.0, "spent/rollouts": 64.0, "spent/tokens": 9.0})
    test = log("test", {"step": 0, "policy": "rl", "accuracy": 0.5})
    assert spent(Run(Path("x"), {}, {}, [sft, rl, test])) == {"steps": 28.0, "rollouts": 64.0, "tokens": 9.0}


def test_a_control_with_less_than_the_method_is_refused():
    def runs(control: float) -> dict[tuple[str, int], Run]:
        row = {"step": 10, "spent/updates": 10.0, "spent/rollouts": 100.0}
        return {
            ("method", 3): Run(Path("x"), {}, {}, [log("rl", row)]),
            ("short", 3): Run(Path("x"), {}, {}, [log("rl", {**row, "spent/rollouts": control})]),
        }

    made = claim(arms={"short": {}}, equal="rollouts")
    for allowed in (99.0, 150.0):  # 2 % less, or more
        equal_budget(made, runs(allowed), [3])
    equal_budget(claim(arms={"short": {}}, equal="steps"), runs(50.0), [3])
    equal_budget(claim(arms={"short": {}}, equal="none"), runs(50.0), [3])
    with pytest.raises(ConfigError) as caught:
        equal_budget(made, runs(50.0), [3])
    said = "claim.equal: no arm may have fewer rollouts than the method, but on seed 3: method 100, short 50"
    assert str(caught.value) == said


def test_a_key_holds_the_content_of_the_files_that_a_stage_names(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("one")
    node = {"data": {"name": "jsonl", "path": str(rows)}, "reward": [f"{rows}:score"], "policy": "@base", "lr": 1e-3}
    before = files(node)
    assert before == {str(rows): content_hash(rows), f"{rows}:score": content_hash(rows)}
    rows.write_text("two")
    assert files(node) != before


def finished(root: Path, key: str, stage: str, seconds: str) -> Node:
    """A stage as a process of `reproduce` leaves it."""
    node = Node(key, stage, {"recipe": "x", "stages": {stage: {"kind": "fit"}}}, "", ())
    folder = node.folder(root) / stage
    folder.mkdir(parents=True)
    (folder / "DONE").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (node.folder(root) / "seconds").write_text(seconds)
    return node


def test_a_run_of_an_arm_is_links_to_its_stages_and_each_is_paid_for_once(tmp_path):
    base, more = finished(tmp_path, "base-1", "base", "3.0"), finished(tmp_path, "more-1", "more", "4.5")
    finished(tmp_path, "more-2", "more", "100.0")  # of another claim, or of other code
    run = arm_run(tmp_path, "method", 5, [base, more])
    arm_run(tmp_path, "zscore", 5, [base])
    assert run.path == tmp_path / "runs/method-seed5"
    assert (run.stages[0].name, run.stages[0].metrics) == ("base", [{"step": 1, "loss": 2.5}])
    assert (run.path / "more").resolve() == (tmp_path / "stages/more-1/more").resolve()
    info = json.loads((run.path / "run.json").read_text())
    assert (info["recipe"], info["seed"], info["overrides"]) == ("x", 5, ["arm=method", "seed=5"])
    assert core_seconds(tmp_path) == 7.5
    assert arm_run(tmp_path, "method", 5, [base]).path == run.path
    assert not (run.path / "more").exists()


# --------------------------------------------------------------------------- processes
def test_stages_that_are_done_are_not_run(tmp_path, capsys):
    node = finished(tmp_path, "base-1", "base", "1.0")
    assert done(node, tmp_path)
    execute({"a": [node, node], "b": [node]}, tmp_path, 1)
    assert capsys.readouterr().out == ""


def test_a_stage_that_fails_is_told_with_the_end_of_its_log_and_what_follows_is_not_run(tmp_path, capsys):
    wrong = Node("base-0", "base", {"recipe": "x", "seed": 0, "stages": {"base": {"kind": "fitt"}}}, "", ())
    wrong = replace(wrong, code=stage_code(wrong.config, "base"))
    after = Node("more-0", "more", wrong.config, wrong.code, (wrong,))
    with pytest.raises(ConfigError) as caught:
        execute({"method, seed 0": [wrong, after], "control, seed 0": [wrong]}, tmp_path, 2)
    first, *shown = str(caught.value).splitlines()
    assert first == f"stage base of method, seed 0 failed (exit status 1); its log is {tmp_path}/stages/base-0/log.txt:"
    assert shown[-1].startswith("rlx.types.ConfigError: stages.base.kind: no stage kind is called 'fitt'; did you mean 'fit'?")
    assert len(shown) == 8
    assert capsys.readouterr().out == "2 stages to run, 0 done before\n"
    assert not (tmp_path / "stages/more-0").exists()


def test_the_end_of_a_log(tmp_path):
    (tmp_path / "log.txt").write_text("".join(f"{i}\n" for i in range(10)))
    assert tail(tmp_path / "log.txt", 3) == "7\n8\n9"
