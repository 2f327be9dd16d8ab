"""What there is, and what it would do: the recipe table, a composed recipe, rows as tokens."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlx.catalogue import CATALOGUE
from rlx.compose import RecipeFile, as_written, compose, recipes
from rlx.paths import PACKAGE
from rlx.types import ConfigError

if TYPE_CHECKING:
    from rlx.types import Episode, TextPolicy


def list_recipes(text: str, family: str, arxiv: str, extra: Path | None, *, results: bool) -> None:
    """One line a recipe. Reads the files alone."""
    found = []
    known = recipes(extra)
    for recipe in known.values():
        node = recipe.read()
        paper = node.get("paper") or {}
        searched = f"{recipe.name} {node.get('purpose', '')} {paper.get('title', '')}".lower()
        if text.lower() in searched and family in ("", recipe.family) and arxiv in ("", str(paper.get("arxiv", ""))):
            found.append((recipe, node))
    if not found:
        print("no recipe matches; `rlx list` shows all")
        return
    found.sort(key=lambda pair: pair[0].family == "paper")  # what runs here first
    width = max(len(recipe.name) for recipe, _ in found)
    for recipe, node in found:
        verdict = f"  [{recorded(recipe.name, known)}]" if results else ""
        print(f"{recipe.name:{width}}  {node.get('purpose', '')}{verdict}")


def list_names(group: str, text: str) -> None:
    """One line a name of a group of the catalogue. Raises ConfigError where there is no such group."""
    if group not in CATALOGUE:
        raise ConfigError(f"--names {group}: there is no such group; groups are {', '.join(CATALOGUE)}")
    found = {name: first_line(target) for name, target in CATALOGUE[group].items()}
    shown = {name: line for name, line in found.items() if text.lower() in f"{name} {line}".lower()}
    for name, line in shown.items():
        print(f"{name:{max(map(len, shown))}}  {line}")


def first_line(target: str) -> str:
    """The first line of the docstring of a component, `module:attr`; the module is read, not imported."""
    module, _, attr = target.partition(":")
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == attr]
    return (ast.get_docstring(nodes[0]) or "").partition("\n")[0] if nodes else ""


def recorded(name: str, known: dict[str, RecipeFile]) -> str:
    """The verdict in docs/results, and whether the code has changed since."""
    from rlx.claims import recorded_verdict, settings_hash
    from rlx.source import claim_hash

    path = Path("docs/results") / f"{name.replace('/', '-')}.md"
    if not path.is_file():
        return recorded_verdict(path, "", "")
    config = as_written(name, known)
    return recorded_verdict(path, claim_hash(config), settings_hash(config))


def show_recipe(arguments: list[str], extra: Path | None) -> None:
    """The composed config as YAML, below what a reader should know first."""
    composed = compose(arguments, extra)
    config = {k: v for k, v in composed.config.items() if k not in ("run_dir", "recipe")}
    print(f"# {composed.config['recipe']}: {config.pop('purpose', '')}")
    if needs := config.pop("requires", None):
        print("# needs: " + ", ".join(f"{k} {v}" for k, v in needs.items()))
    for line in composed.notices:
        print(f"# note: {line}")
    for row in config.pop("published", None) or []:
        print(f"# published: {row['setting']}: {row['metric']} {row.get('control', '-')} -> {row['method']} ({row['source']})")
    for path, source in (config.pop("sources", None) or {}).items():
        print(f"# source of {path}: {source}")
    if unsure := config.pop("unverified", None):
        for line in textwrap.wrap("not verified against the paper: " + ", ".join(unsure), 110):
            print(f"# {line}")
    print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120), end="")


def show_data(arguments: list[str], extra: Path | None, trust: list[str], num: int) -> None:
    """A few rows of every data set of the recipe, token by token: [trained] in brackets, ends visible."""
    from rlx.app import planned
    from rlx.models.load import outline
    from rlx.run import quiet
    from rlx.stages.context import Sources
    from rlx.types import DataRef

    _, made = planned(arguments, extra, trust)
    quiet()
    shown: set[str] = set()
    policy = outline(made.model)  # tokens need no weights
    for name, stage in made.stages.items():
        ref = getattr(stage, "data", None)
        if not isinstance(ref, DataRef) or ref.stage or (ref.split or repr(ref.source)) in shown:
            continue
        shown.add(ref.split or repr(ref.source))
        sources = Sources(run_dir=Path(), name=name, seed=made.config["seed"], model=made.model, task=made.task)
        rows = sources.data(ref)
        print(f"\n{'@task/' + ref.split if ref.split else name + '.data'}: {len(rows)} rows")
        for row in rows[:num]:
            print("  " + marked(policy, row) + (f"   answer: {row.task.answer}" if row.task.answer is not None else ""))


def marked(policy: TextPolicy, row: Episode) -> str:
    """A row as the policy reads it; tokens that are trained on stand in [brackets]."""
    if not row.turns:
        return pieces(policy, policy.render(row.task.prompt), "{}")
    turns = policy.tokenize(row).turns
    label = "" if row.label in (None, 1.0) else f"({row.label:+g}) "
    return label + "".join(pieces(policy, t.seen, "{}") + pieces(policy, t.did, "[{}]") for t in turns)


def pieces(policy: TextPolicy, ids: Any, form: str) -> str:
    """Tokens one by one, white space visible."""
    return "".join(form.format(piece.replace("\n", "\\n")) for piece in policy.pieces(ids))


def table_of_recipes(known: dict[str, RecipeFile]) -> str:
    """recipes/README.md: a row a recipe, generated by scripts/recipe_table.py."""
    lines = [
        "# Recipes",
        "",
        "Generated by `python scripts/recipe_table.py`. `rlx show NAME` prints one composed, `rlx train NAME` runs it.",
        "",
        "| recipe | what it is for | paper | claim |",
        "|---|---|---|---|",
    ]
    for recipe in known.values():
        node = recipe.read()
        paper = node.get("paper") or {}
        link = f"[{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})" if paper.get("arxiv") else ""
        claim = (node.get("claim") or {}).get("says", "")
        name = f"[{recipe.name}]({recipe.family}/{recipe.path.name})"
        cells = [name, node.get("purpose", ""), f"{paper.get('title', '')} {link}".strip(), claim]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
