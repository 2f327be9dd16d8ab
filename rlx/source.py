"""The code behind a result: a hash of the source that a config can reach, and of no other.

A file or a line of the catalogue that a config does not use leaves its hash as it is.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlx.catalogue import CATALOGUE
from rlx.paths import PACKAGE

# Modules that only print: a result does not depend on them.
PRINTS = ("cli.py", "show.py", "result.py", "report/page.py", "report/plots.py", "report/result.py")
# Modules of runs in several processes: a result is of one.
SEVERAL = ("launch.py", "ranks.py", "worker.py", "zero.py")
# The catalogue names every component there is; the lines in use are hashed instead of it.
LEFT_OUT = (*PRINTS, *SEVERAL, "catalogue.py")
# The parts of a config that name components.
PARTS = ("model", "task", "rollout", "stages")


def code_hash(config: Mapping[str, Any], root: str = "rlx.run") -> str:
    """A hash of the source of `root` (the module that runs the config), of the components named, and of all their imports.

    Files are read once a process: what is hashed is what the process runs.
    """
    return reached_hash({part: config.get(part) for part in PARTS}, root)


def claim_hash(config: Mapping[str, Any]) -> str:
    """The same for a verdict: with the rule that decides it, and with what each arm of the claim names."""
    return reached_hash({part: config.get(part) for part in (*PARTS, "claim")}, "rlx.reproduce")


def reached_hash(node: Any, root: str) -> str:
    """A hash of the files that `root` and the components named in a node can reach, and of these components' lines."""
    lines, starts = set(), set(files_of(root))
    for key, text in named(node):
        for line in entries(key, text):
            lines.add(line)
            starts |= files_of(line.partition("=")[2].partition(":")[0])
        starts |= own_file(text)
    reached = sorted((label(file), source(file)) for file in frozenset[Path]().union(*map(reach, starts)))
    digest = hashlib.sha256("\n".join(sorted(lines)).encode())
    for name, content in reached:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def named(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a config with its key: (reward, x) of `reward: [{name: x}]` and of `stages.rl.reward.0.name: x`."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for path, value in node.items():
            words = [word for word in str(path).split(".") if word != "name" and not word.isdecimal()]
            yield from named(value, words[-1] if words else key)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from named(value, key)


def entries(key: str, text: str) -> list[str]:
    """The lines of the catalogue that a string can mean: in the group that its key names, else in every group."""
    name, group = text.partition("@")[0], "stage" if key == "kind" else key.removesuffix("s")
    groups = [group] if name in CATALOGUE.get(group, {}) else [g for g in CATALOGUE if name in CATALOGUE[g]]
    return [f"{g}.{name}={CATALOGUE[g][name]}" for g in groups]


def own_file(text: str) -> set[Path]:
    """The file of a component of the user's, `./my_reward.py:score`; nothing for any other string."""
    file = Path(text.rpartition(":")[0])
    return {file.resolve()} if file.suffix == ".py" and file.is_file() else set()


@functools.cache
def label(file: Path) -> str:
    """A file's name in the hash: the same on every machine."""
    return file.relative_to(PACKAGE).as_posix() if file.is_relative_to(PACKAGE) else file.name


@functools.cache
def reach(start: Path) -> frozenset[Path]:
    """A file, all that it imports, all that these import, and so on; what is left out of the hash leads no further."""
    found, waiting = set(), [start]
    while waiting:
        file = waiting.pop()
        if file not in found and label(file) not in LEFT_OUT:
            found.add(file)
            waiting += imports(file)
    return frozenset(found)


@functools.cache
def imports(file: Path) -> frozenset[Path]:
    """The files of rlx that a file imports, inside functions too."""
    try:
        tree = ast.parse(source(file))
    except SyntaxError:  # of a file of the user's; whoever imports it says so
        return frozenset()
    package = ".".join(["rlx", *Path(label(file)).parts[:-1]])
    found: set[Path] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = found.union(*(files_of(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found = found.union(*(files_of(f"{module}.{alias.name}") for alias in node.names))
    return frozenset(found)


@functools.cache
def files_of(name: str) -> frozenset[Path]:
    """The files that an import of `rlx.a.b` runs: those of rlx, rlx.a and rlx.a.b; none for what is not of rlx."""
    first, *parts = name.split(".")
    places = [PACKAGE.joinpath(*parts[:i]) for i in range(1, len(parts) + 1)]
    files = [PACKAGE / "__init__.py", *(file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))]
    return frozenset(file for file in files if first == "rlx" and file.is_file())


@functools.cache
def source(file: Path) -> bytes:
    """The content of a file."""
    return file.read_bytes()
