"""The hash of the code that a config reaches: what changes it and what does not, on a copy of rlx/ that is edited."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlx import source
from rlx.catalogue import CATALOGUE
from rlx.source import claim_hash, code_hash

CONFIG = {
    "recipe": "gsm8k",  # a recipe may be called as a component is
    "model": {"name": "tiny"},
    "task": {"name": "arithmetic"},
    "stages": {
        "sft": {"kind": "fit", "data": "@task/demos", "loss": ["nll"]},
        "rl": {
            "kind": "online",
            "reward": [{"name": "format"}],
            "advantage": "rloo",
            "eval": {"metrics": ["pass@8"]},
        },
    },
    "claim": {"says": "so", "arms": {"filtered": {"stages.rl.keep.0.name": "correct"}}},
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(source, "PACKAGE", shutil.copytree(source.PACKAGE, tmp_path / "rlx"))
    forget()
    yield tmp_path / "rlx"
    forget()


def forget() -> None:
    """As a new process would."""
    for kept in (source.reach, source.imports, source.files_of, source.source, source.label):
        kept.cache_clear()


def edit(file: Path, text: str = "# touched\n") -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)
    forget()


@pytest.mark.parametrize(
    "file",
    [
        "run.py",
        "advantages.py",  # named
        "learner.py",  # imported by what is named
        "stages/context.py",
        "optim.py",  # `from rlx import optim`
        "rollout/native.py",  # imported inside a function
        "rewards/latex.py",  # imported by a worker process
        "losses/__init__.py",  # runs with every module of its package
        "__init__.py",
    ],
)
def test_what_a_config_reaches_changes_its_hash(tree, file):
    before = code_hash(CONFIG)
    edit(tree / file)
    assert code_hash(CONFIG) != before


@pytest.mark.parametrize(
    "file", ["data/gsm8k.py", "rewards/model.py", "losses/policy.py", "compose.py", "claims.py", "catalogue.py"]
)
def test_what_a_config_does_not_reach_leaves_its_hash(tree, file):
    before = code_hash(CONFIG)
    edit(tree / file)
    assert code_hash(CONFIG) == before


def test_a_method_of_another_paper_leaves_the_hash_and_one_that_is_named_is_in_it(tree, monkeypatch):
    before = code_hash(CONFIG), claim_hash(CONFIG)
    edit(tree / "methods/other.py", "def other(logp):\n    from rlx.probes import probe\n")
    monkeypatch.setitem(CATALOGUE["loss"], "other", "rlx.methods.other:other")
    assert (code_hash(CONFIG), claim_hash(CONFIG)) == before

    named = {**CONFIG, "stages": {"sft": {"kind": "fit", "loss": [{"name": "other"}]}}}
    before_edit = code_hash(named)
    edit(tree / "probes.py")
    after_edit = code_hash(named)
    assert after_edit != before_edit
    monkeypatch.setitem(CATALOGUE["loss"], "other", "rlx.methods.other:renamed")
    assert code_hash(named) != after_edit


@pytest.mark.parametrize(("group", "name", "other"), [("reward", "format", "metric"), ("metric", "pass", "reward")])
def test_a_name_means_the_component_of_the_group_that_its_key_names(tree, monkeypatch, group, name, other):
    before = code_hash(CONFIG)
    monkeypatch.setitem(CATALOGUE[other], name, "rlx.probes:of_another_group")
    assert code_hash(CONFIG) == before
    monkeypatch.setitem(CATALOGUE[group], name, "rlx.probes:moved")
    assert code_hash(CONFIG) != before


def test_a_name_under_any_other_key_may_mean_a_component_of_every_group(tree, monkeypatch):
    inside = {"stages": {"test": {"kind": "evaluate", "verifier": {"name": "correct"}}}}
    before = code_hash(inside)
    edit(tree / "filters.py")
    assert code_hash(inside) != before


@pytest.mark.parametrize("file", ["cli.py", "show.py", "result.py", "report/page.py", "report/plots.py", "report/result.py"])
def test_what_only_prints_leaves_the_hash_even_where_it_is_imported(tree, file):
    edit(tree / "run.py", "from rlx import cli, show, result\nfrom rlx.report import page, plots, result\n")
    edit(tree / "graph.py", "from rlx import run\n")
    before = code_hash(CONFIG), claim_hash(CONFIG)
    edit(tree / file, "from rlx import probes\n")
    assert (code_hash(CONFIG), claim_hash(CONFIG)) == before


@pytest.mark.parametrize("file", ["launch.py", "ranks.py", "worker.py", "zero.py"])
def test_what_runs_several_processes_leaves_the_hash_of_a_result(tree, file):
    before = code_hash(CONFIG), claim_hash(CONFIG)
    edit(tree / file, "from rlx import probes\n")
    assert (code_hash(CONFIG), claim_hash(CONFIG)) == before


def test_relative_imports(tree):
    edit(tree / "advantages.py", "from .methods import other\n")
    edit(tree / "methods/other.py", "from ..probes import probe\n")
    before = code_hash(CONFIG)
    edit(tree / "probes.py")
    assert code_hash(CONFIG) != before


@pytest.mark.parametrize("file", ["claims.py", "reproduce.py", "graph.py", "filters.py", "advantages.py"])
def test_a_verdict_depends_on_its_rule_and_on_what_the_arms_name(tree, file):
    before = claim_hash(CONFIG)
    edit(tree / file)
    assert claim_hash(CONFIG) != before


def test_code_of_the_users_and_what_it_imports(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"stages": {"rl": {"kind": "online", "reward": "./my_reward.py:score"}}}
    without = code_hash(config)
    found = [without]
    for touched, text in (
        ("my_reward.py", "def score(e): ...\n"),
        ("my_reward.py", "import rlx.probes\n"),
        ("rlx/probes.py", "1\n"),
    ):
        edit(tmp_path / touched, text)
        found.append(code_hash(config))
    assert len(set(found)) == 4
    edit(tmp_path / "my_reward.py", "def (\n")  # whoever imports it says what is wrong with it
    assert code_hash(config) not in found
