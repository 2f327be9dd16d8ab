"""What holds the tree together: who may import whom, the catalogue, the recipes, and what the wheel carries."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from hatchling.builders.wheel import WheelBuilder

from rlx.app import claim_mistakes
from rlx.build import GROUP_OF, signature
from rlx.catalogue import CATALOGUE
from rlx.check import components
from rlx.cli import by_path
from rlx.compose import as_written, compose, recipes
from rlx.paths import CONF, PACKAGE, RECIPES
from rlx.plan import plan
from rlx.show import first_line, table_of_recipes
from rlx.types import FIELDS, Component

ROOT = PACKAGE.parent

# A module imports from the rows above its own, and from its own package; data, envs and rewards from one another, too.
# A new module of rlx/ gets its place here.
LAYERS = """
types
world
tensors encoding marks memory offload modules
losses advantages reduce filters derive
models
data envs rewards
metrics
rollout
llm
methods
optim
terms units
learner
partitions
zero
paths catalogue health track report stopping resume
source
build
launch
unroll
references relations
plan
compose
ranks
stages
check probes
first_batch run
claims graph
reproduce
result evaluate
worker
app
show
cli
"""
# These know nothing of what is above them but the types, so that anything may use them.
APART = {
    "catalogue": set(),
    "paths": {"types"},
    "source": {"catalogue", "paths"},
    "health": set(),
    "track": {"types"},
    "report": {"types"},
    "encoding": {"types"},
    "stopping": set(),
    "resume": {"types", "world", "encoding"},
    "modules": {"types"},
    "build": {"types", "catalogue", "modules"},
    "world": set(),
    "offload": set(),
    "launch": {"types", "build"},
    "ranks": {"types", "stopping", "launch"},
    "unroll": {"build"},
    "references": {"types", "build"},
    "relations": {"types", "build", "launch"},
    "plan": {"types", "catalogue", "build", "paths", "unroll", "resume", "references", "relations"},
    "compose": {"types", "build", "catalogue", "paths"},
    "claims": {"types", "build", "report", "unroll"},
}
TOGETHER = {"data", "envs", "rewards"}
# Slow to import, or not needed by most commands: imported inside the functions that use them.
HEAVY = {
    "transformers",
    "hydra",
    "omegaconf",
    "wandb",
    "deepspeed",
    "datasets",
    "peft",
    "matplotlib",
    "gymnasium",
    "minigrid",
    "vllm",
}
# Parameters that a recipe's `read:` renames to fields, or that name a head or a sampler's stream.
RENAMED = {
    "log_ratio": {"of", "over"},
    "value_in_use": {"old_guide_value", "guide_critic_mask"},
    "utterance_td": {"q", "target_v"},
    "value_of_fresh": {"v", "target_q"},
    "utterance_advantage": {"critic_q", "critic_q2", "critic_v", "critic_v2"},
}


def modules() -> dict[str, ast.Module]:
    """Dotted name inside rlx -> syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return {name: tree for name, tree in found.items() if name}


def imported(tree: ast.AST) -> set[str]:
    """Every module that a tree imports, dotted."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "rlx":
            found |= {f"rlx.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_nothing_imports_what_is_downstream_of_it() -> None:
    row = {name: i for i, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
    wrong = []
    for module, tree in modules().items():
        part = module.partition(".")[0]
        others = {name.split(".")[1] for name in imported(tree) if name.startswith("rlx.")} - {part}
        if part not in row or not others <= set(row):
            wrong.append(f"{module}: {({part} | others) - set(row)} has no row in LAYERS")
            continue
        below = {other for other in row if row[other] < row[part]}
        allowed = APART.get(part, below | (TOGETHER if part in TOGETHER else set()))
        wrong += [f"{module} imports {other}" for other in sorted(others - allowed)]
    assert wrong == []


def test_modules_name_their_heavy_imports_inside_functions() -> None:
    wrong = []
    for module, tree in modules().items():
        outside = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {name.partition(".")[0] for node in outside for name in imported(node)}
        wrong += [f"{module} imports {name}" for name in sorted(found & HEAVY)]
    assert wrong == []


def test_importing_the_whole_catalogue_loads_nothing_heavy() -> None:
    code = (
        "import importlib, json, sys\n"
        "from rlx.catalogue import CATALOGUE\n"
        "[importlib.import_module(t.partition(':')[0]) for names in CATALOGUE.values() for t in names.values()]\n"
        f"print(json.dumps(sorted({HEAVY} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("group", CATALOGUE)
def test_every_name_of_the_catalogue_is_there(group: str) -> None:
    for target in CATALOGUE[group].values():
        module, _, attr = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attr)), target
        assert first_line(target), f"{target} has no docstring for `rlx list --names {group}`"


def parameters(target: object) -> list[tuple[str, str]]:
    """Each parameter of a component, or of a record inside it, that takes components: its name and their group."""
    found = []
    waiting = list(get_type_hints(target).items())
    while waiting:
        name, hint = waiting.pop()
        if get_origin(hint) is Component:
            found.append((name, GROUP_OF[get_args(hint)[0]]))
        elif is_dataclass(hint):
            waiting += get_type_hints(hint).items()
        else:
            waiting += [(name, inside) for inside in get_args(hint)]
    return found


def test_a_key_that_is_called_as_a_group_takes_names_of_that_group() -> None:
    """rlx/source.py goes by it."""
    targets = [target.partition(":") for names in CATALOGUE.values() for target in names.values()]
    found = {pair for module, _, attr in targets for pair in parameters(getattr(importlib.import_module(module), attr))}
    assert len(found) >= 10
    assert [(key, group) for key, group in found if key.removesuffix("s") in CATALOGUE and key.removesuffix("s") != group] == []


@pytest.mark.parametrize("group", ["loss", "advantage", "derive", "watch"])
def test_components_read_fields_that_exist(group: str) -> None:
    for name, target in CATALOGUE[group].items():
        module, _, attr = target.partition(":")
        reads, _ = signature(getattr(importlib.import_module(module), attr))
        assert set(reads) - set(FIELDS) == RENAMED.get(name, set()), name


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_binds_and_its_parts_work_on_a_generated_batch(name: str) -> None:
    composed = compose([name])
    assert components(plan(composed.config, swapped=composed.swapped, given=composed.given)) == []
    assert composed.config["purpose"]
    assert as_written(name, recipes()) == composed.config
    assert claim_mistakes(composed.config) == []


def test_the_table_of_recipes_is_up_to_date() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert text == table_of_recipes(recipes()), "run: python scripts/recipe_table.py"


def test_code_and_configs_are_ascii() -> None:
    folders = (PACKAGE, CONF, RECIPES, ROOT / "scripts")
    files = [path for folder in folders for kind in ("*.py", "*.yaml", "*.j2") for path in folder.rglob(kind)]
    assert [str(path) for path in files if not path.read_text(encoding="utf-8").isascii()] == []


def test_an_installed_wheel_finds_its_configs_and_recipes(tmp_path: Path) -> None:
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    for folder, inside in ((CONF, "conf"), (RECIPES, "recipes")):
        for path in folder.rglob("*.yaml"):
            assert f"rlx/_shipped/{inside}/{path.relative_to(folder).as_posix()}" in names
    assert "rlx/report/page.html.j2" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = "from rlx.compose import compose, RECIPES; print(RECIPES, compose(['grpo_math']).config['recipe'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "rlx" / "_shipped" / "recipes"), "grpo_math"]


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a Markdown page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_commands_and_files_of_the_readme_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for folder in ("my_recipes", "path/to/model", "path/to/gsm8k"):
        (tmp_path / folder).mkdir(parents=True)
    for text in [*fenced(readme, "python"), *fenced(readme, "yaml")]:
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
    (tmp_path / "capitals.jsonl").write_text(fenced(readme, "json")[0], encoding="utf-8")
    lines = "".join(fenced(readme, "bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    bound = 0
    for name, *words in commands:
        if name not in ("train", "check", "show", "reproduce") or "-m" in words:
            continue
        trust = [words.pop(i + 1) for i, word in enumerate(words) if word == "--trust"]
        extra = [Path(words.pop(i + 1)) for i, word in enumerate(words) if word == "--recipes"]
        composed = compose(*by_path([word for word in words if not word.startswith("--")], next(iter(extra), None)))
        plan(composed.config, trusted=trust, swapped=composed.swapped, given=composed.given)
        bound += 1
    assert bound >= 10
