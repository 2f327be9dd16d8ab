"""Command line -> composed config: recipes as a Hydra config group, short words made whole, header keys kept to their file."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlx.build import hint
from rlx.catalogue import CATALOGUE
from rlx.paths import CONF, RECIPES
from rlx.types import ConfigError

# What a recipe says about itself. It belongs to its file: a recipe that starts from another does not inherit it.
HEADER = ("purpose", "paper", "claim", "published", "sources", "unverified", "requires")
# `model=x` and `task=x` are short for the name inside.
SHORT = ("model", "task")
NAME = re.compile(r"[A-Za-z0-9._-]+")
# `${oc.env:HOME}` would bring the environment into a saved config; `${stages.sft.lr}` is fine.
RESOLVER = re.compile(r"\$\{[^}]*:")


@dataclass(frozen=True)
class Composed:
    """A plain config; `swapped` and `given` are what plan() needs to tell an inherited key from one that the user gave."""

    config: dict[str, Any]
    overrides: list[str]
    swapped: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RecipeFile:
    """A YAML file of recipes/ or of the user's folder. `name` is `grpo_math` or `paper/grpo_math`."""

    name: str
    path: Path

    @property
    def family(self) -> str:
        """The folder that it stands in."""
        return self.path.parent.name

    def read(self) -> dict[str, Any]:
        """Its content, read once; raises ConfigError (file, line) where it is no YAML mapping or holds what recipes may not."""
        return self._content

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        text = self.path.read_text(encoding="utf-8")
        try:
            node = yaml.load(text, Loader=Numbers)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" line {mark.line + 1}" if mark else ""
            raise ConfigError(f"{self.path}{line}: is not YAML: {getattr(error, 'problem', error)}") from error
        if not isinstance(node, dict):
            raise ConfigError(f"{self.path}: a recipe is a mapping, got {type(node).__name__}")
        if "hydra" in node:
            raise ConfigError(f"{self.path}: `hydra:` is not for recipes")
        if node.get("run_dir") is not None:
            raise ConfigError(f"{self.path}: `run_dir` is for the command line (run_dir=DIR), not for recipes")
        refuse_resolvers(node, self.path)
        return node


def refuse_resolvers(node: Any, where: Path) -> None:
    """Raises ConfigError where a key or a value calls a resolver."""
    if isinstance(node, str) and (found := RESOLVER.search(node)):
        raise ConfigError(f"{where}: {found.group()!r} is a resolver; a recipe may only refer to its own keys")
    inside = itertools.chain(*node.items()) if isinstance(node, dict) else node if isinstance(node, list) else ()
    for part in inside:
        refuse_resolvers(part, where)


class Numbers(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # seven times as fast where there is C
    """Safe YAML in which 1e-4 is a number, and only true and false are truth values: `on:` is a key of an update."""


Numbers.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)$|[-+]?[0-9][0-9_]*\.[0-9_]*$|[-+]?\.[0-9_]+$"),
    list("-+0123456789."),
)
BOOL = "tag:yaml.org,2002:bool"
Numbers.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in found if tag != BOOL] for first, found in Numbers.yaml_implicit_resolvers.items()
}
Numbers.add_implicit_resolver(BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def recipes(extra: Path | None = None) -> dict[str, RecipeFile]:
    """Every recipe by name. Raises ConfigError where two have one name."""
    found: dict[str, RecipeFile] = {}
    for folder in (RECIPES, *([extra] if extra else [])):
        if not folder.exists():
            raise ConfigError(f"--recipes {folder}: is no directory")
        for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else [folder]:
            name = ("paper/" if path.parent.name == "paper" else "") + path.stem
            if not NAME.fullmatch(path.stem):
                raise ConfigError(f"{path}: a recipe's name is made of letters, digits, '.', '_' and '-'")
            if name in found:
                raise ConfigError(f"two recipes are called {name!r}: {found[name].path} and {path}")
            found[name] = RecipeFile(name, path)
    return found


def words(arguments: Sequence[str]) -> list[str]:
    """`grpo_math` is `recipe=grpo_math`; everything else is an override of the form key=value."""
    out = []
    for i, word in enumerate(arguments):
        if "=" in word or word.startswith("~"):
            out.append(word)
        elif i == 0:
            out.append(f"recipe={word}")
        else:
            raise ConfigError(f"{word!r}: expected key=value, such as seed=1 or stages.rl.lr=3e-4")
    return out


def override(text: str, groups: Sequence[str]) -> str:
    """A plain override as Hydra takes it: `++` adds a key that the YAML leaves at its default; plan() rejects unknown ones."""
    key, sign, value = text.partition("=")
    if key.startswith("~") or key in groups or is_hydra(key):
        return text
    key = key.lstrip("+")
    return f"++{key}.name{sign}{value}" if key in SHORT and value[:1] not in "{" else f"++{key}{sign}{value}"


def groups() -> dict[str, list[str]]:
    """The config groups of conf/ that a command line chooses from, with their options."""
    folders = [p for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "model")]
    return {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in folders}


def prepare(arguments: Sequence[str], known: Mapping[str, RecipeFile], *, sweep: bool = False) -> list[str]:
    """The words as Hydra takes them. Raises ConfigError with all that it could not read, or would answer obscurely."""
    texts = words(arguments)
    options = {"recipe": list(known), **groups()}
    wrong = []
    if not any(text.startswith("recipe=") for text in texts):
        wrong.append(f"which recipe? Give its name, such as grpo_math{known_recipes('', known)}")
    out = [override(text, ["recipe", *options]) for text in texts]
    for text, given in zip(out, texts, strict=True):
        key, _, value = given.partition("=")
        if is_hydra(key):
            if not sweep:
                wrong.append(f"{given}: Hydra's own settings are for sweeps (rlx train -m)")
        elif RESOLVER.search(given):
            wrong.append(f"{given}: resolvers are not for configs; a value may only refer to keys of the recipe")
        elif (top := key.lstrip("+~").partition(".")[0]) in HEADER:
            wrong.append(f"{given}: `{top}` is what a recipe says about itself; change it in the recipe's file")
        elif said := unreadable(text, sweep=sweep):
            wrong.append(f"{given}: {said}")
        elif key in options and not any(c in value for c in "($"):
            for choice in value.split(",") if sweep else [value]:
                if choice.strip() not in options[key]:
                    list_of = known_recipes if key == "recipe" else hint
                    wrong.append(f"{key}={choice}: no {key} is called {choice!r}{list_of(choice, options[key])}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return out


def known_recipes(word: str, known: Iterable[str]) -> str:
    """The nearest recipes, and where the others are."""
    return hint(word, known, "`rlx list`") + "; recipes of your own: --recipes DIR"


def is_hydra(key: str) -> bool:
    """Whether a key is one of Hydra's own."""
    return key.lstrip("+~") == "hydra" or key.lstrip("+~").startswith(("hydra.", "hydra/"))


def unreadable(text: str, *, sweep: bool) -> str:
    """Why Hydra cannot read an override; empty where it can."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException:
        return "cannot be read as key=value; put quotes around a value with special characters: 'key=\"a: b\"'"
    if parsed.is_sweep_override() and not sweep:
        return "several values make a sweep, which -m runs; one value that is a list is written key=[1,2]"
    return ""


def store(known: Mapping[str, RecipeFile], chosen: Sequence[str] | None = None) -> None:
    """Put recipes (without their headers) into Hydra's ConfigStore as the group `recipe`, at the config's root."""
    from hydra.core.config_store import ConfigStore

    for recipe in known.values():
        if chosen is not None and recipe.name not in chosen:
            continue
        node = {k: v for k, v in recipe.read().items() if k not in HEADER}
        ConfigStore.instance().store(
            group="recipe/paper" if recipe.name.startswith("paper/") else "recipe",
            name=recipe.path.stem,
            node=node,
            package="_global_",
        )


def compose(arguments: Sequence[str], extra: Path | None = None) -> Composed:
    """The config that a command line means. Raises ConfigError."""
    known = recipes(extra)
    texts = prepare(arguments, known)
    name = next(t.partition("=")[2] for t in reversed(texts) if t.startswith("recipe="))
    store(known, ancestors(name, known))
    full = hydra_compose(texts)
    recipe_only = hydra_compose([f"recipe={name}"]) if len(texts) > 1 else full
    header = {k: v for k, v in known[name].read().items() if k in HEADER}
    config = resolved({**full, **header, "recipe": name}, known[name].path)
    small = (config.get("caps") or {}).pop("model", {})
    given = frozenset(path for t in texts for path in given_paths(t))
    notices = apply_caps(config, given)
    changed = frozenset(swapped(recipe_only, full))
    config["model"] = with_sizes(config.get("model"), given, swapped="model" in changed)
    whole, config["model"] = config["model"], shrunken_model(config["model"], small, given)
    if less := [f"{k} {v}" for k, v in config["model"].items() if whole.get(k) != v]:
        notices.append(f"scale={config['scale']} makes the model small: {', '.join(less)}")
    return Composed(config, list(arguments), changed, given, notices)


def as_written(name: str, known: Mapping[str, RecipeFile]) -> dict[str, Any]:
    """The config of `compose([name])` to look at, not to change, without Hydra, which takes a tenth of a second for each.

    Raises ConfigError.
    """
    nodes = {recipe: known[recipe].read() for recipe in ancestors(name, known)}
    run = yaml.load((CONF / "run.yaml").read_text(encoding="utf-8"), Loader=Numbers)
    config: dict[str, Any] = {}

    def add(node: Mapping[str, Any], left_out: Collection[str]) -> None:
        parents = node.get("defaults") or []
        parents = parents if isinstance(parents, list) else [parents]
        for parent in parents if "_self_" in parents else [*parents, "_self_"]:
            if parent == "_self_":
                config.update(merged(config, {k: v for k, v in node.items() if k not in ("defaults", *left_out)}))
            elif isinstance(parent, str):
                add(nodes[parent.removeprefix("/recipe/")], HEADER)
            elif "recipe" in parent:
                add(nodes[name], HEADER)
            else:
                ((group, option),) = parent.items()
                if not group.startswith("override "):
                    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
                    chosen = yaml.load(text, Loader=Numbers)
                    add(chosen if text.startswith("# @package _global_") else {group: chosen}, ())

    add(run, ["hydra"])
    config |= {k: v for k, v in nodes[name].items() if k in HEADER} | {"recipe": name}
    config = resolved(config, known[name].path) if "${" in str(config) else config
    apply_caps(config)
    config["model"] = with_sizes(config.get("model"), (), swapped=False)
    return config


def merged(old: Any, new: Any) -> Any:
    """`new` over `old`, mappings key by key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}
    return new


def with_sizes(node: Any, given: Collection[str], *, swapped: bool) -> dict[str, Any]:
    """The model with what conf/model says under its name; keys of its own win.

    Sizes that a recipe or a scale gave to a model of conf/model mean nothing to the one that the user put in its place.
    """
    node = dict(node) if isinstance(node, Mapping) else {"name": node or "tiny"}
    files = {path.stem: path for path in (CONF / "model").glob("*.yaml")}
    presets = {name: yaml.load(path.read_text(encoding="utf-8"), Loader=Numbers) for name, path in files.items()}
    name = str(node.get("name") or "tiny")
    if name in presets:
        return {**presets[name], **node, "name": presets[name]["name"]}
    sizes = {key for preset in presets.values() for key in preset} - {"name"}
    return {k: v for k, v in node.items() if not swapped or k not in sizes or f"model.{k}" in given}


def shrunken_model(node: dict[str, Any], small: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The model at the sizes of `scale`, but for those that the user gave.

    A model of rlx's own keeps its kind; a pretrained one that the user did not name gives way to the scale's.
    """
    if node["name"] in CATALOGUE["model"]:
        return node | {k: v for k, v in small.items() if k in node and k != "name" and f"model.{k}" not in given}
    return node if "model.name" in given else node | small


def given_paths(text: str) -> list[str]:
    """The dotted paths whose values an override gives: of a mapping, which is merged, each of its own; of a list, the list."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    def paths(value: Any, path: str) -> list[str]:
        if isinstance(value, dict) and value:
            return [p for key, inside in value.items() for p in paths(inside, f"{path}.{key}")]
        return [path]

    override = OverridesParser.create().parse_override(text)
    return paths(override.value(), text.lstrip("+~").partition("=")[0])


def ancestors(name: str, known: Mapping[str, RecipeFile]) -> list[str]:
    """A recipe and all that it starts from. Raises ConfigError for a parent that does not exist."""
    out, waiting = [], [name]
    while waiting:
        here = waiting.pop()
        if here in out:
            continue
        out.append(here)
        parents = known[here].read().get("defaults") or []
        for parent in parents if isinstance(parents, list) else [parents]:
            if parent == "_self_":
                continue
            target = str(parent).removeprefix("/recipe/")
            if not str(parent).startswith("/recipe/") or target not in known:
                raise ConfigError(
                    f"{known[here].path}: defaults: {parent!r} is no recipe; write - /recipe/NAME{known_recipes(target, known)}"
                )
            waiting.append(target)
    return out


def hydra_compose(texts: Sequence[str]) -> dict[str, Any]:
    """Hydra's composition as plain, unresolved containers."""
    from hydra import compose as hydra_compose_api
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            config = hydra_compose_api("run", overrides=list(texts))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_lines(error)) from error
    plain = OmegaConf.to_container(config, resolve=False)
    return {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}


def hydra_multirun(texts: Sequence[str], job: Callable[[Any], float | None]) -> None:
    """Hydra's sweeper and launcher on `job`. Raises ConfigError for what Hydra refuses."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            GlobalHydra.instance().hydra.multirun(config_name="run", task_function=job, overrides=list(texts))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_lines(error)) from error


def first_lines(error: Exception) -> str:
    """What Hydra says, without its advice and the sign that rlx puts before a key."""
    skipped = ("See https", "Set the env", "Config search path")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = list(itertools.takewhile(lambda line: not line.startswith(skipped), lines))
    more = "; more sweepers and launchers: pip install 'rlx[sweep]'" if "'hydra/" in kept[0] else ""
    return " ".join(kept).replace("++", "") + more


def resolved(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """`${stages.x}` replaced by what it names; nothing else is interpolated."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse_resolvers(config, source)
    try:
        plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def swapped(old: Any, new: Any, path: str = "") -> list[str]:
    """The paths of components whose `name` (or stages whose `kind`) the command line changed."""
    if isinstance(old, dict) and isinstance(new, dict):
        here = [path] if any(k in old and old[k] != new.get(k) for k in ("name", "kind")) else []
        return here + [s for k in new if k in old for s in swapped(old[k], new[k], f"{path}.{k}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list):
        return [s for i, (a, b) in enumerate(zip(old, new, strict=False)) for s in swapped(a, b, f"{path}.{i}")]
    return []


def apply_caps(config: dict[str, Any], given: Collection[str] = ()) -> list[str]:
    """Hold every stage to the sizes of `scale`, but for what the user has `given`; a line that says what is not as written."""
    caps: dict[str, Any] = config.pop("caps", None) or {}
    bites: dict[str, int] = {}
    changed: list[str] = []
    filled: dict[str, None] = {}

    def cap(node: Any, path: str) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list):
                cap(value, f"{path}.{key}")
            elif (size := str(key).rpartition(".")[2]) in caps and isinstance(value, int) and value > caps[size]:
                node[key] = value if f"{path}.{key}" in given else bites.setdefault(size, caps[size])

    stages = config.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    cap(stages, "stages")
    claim = config.get("claim")
    held = dict(bites)
    for key in ("common", "arms"):  # what a claim's arms change is held to the same sizes, without a word
        cap(claim.get(key) or {} if isinstance(claim, dict) else {}, f"claim.{key}")
    places = {f"stages.{name}": stage for name, stage in stages.items() if isinstance(stage, dict)}
    for path, stage in list(places.items()):  # the stages of a repeat are stages, too
        inner = stage.get("stages")
        places |= {f"{path}.stages.{name}": s for name, s in (inner if isinstance(inner, dict) else {}).items()}
    for path, stage in places.items():
        kind = stage.get("kind") if isinstance(stage, dict) else None
        for key, value in ((caps.get("set") or {}).get(kind) or {}).items():
            if f"{path}.{key}" not in given:
                changed += [f"{path}.{key} is {json.dumps(value)}"] if stage.get(key, value) != value else []
                stage[key] = value
        measures = stage.get("eval") if isinstance(stage, dict) else None
        for node, of in ((stage, kind), (measures, "evaluate")):
            for key, value in ((caps.get("unset") or {}).get(of) or {}).items():
                if isinstance(node, dict) and key not in node:
                    node[key] = value
                    filled[f"{key} {value}"] = None
    sizes = ", ".join(f"{size} {most}" for size, most in held.items())
    said = [
        *([f"holds the stages to at most {sizes}"] if sizes else []),
        *([f"sets {', '.join(filled)} where there is none"] if filled else []),
        *changed,
    ]
    return [f"scale={config.get('scale')} {'; '.join(said)}; what you give yourself stays"] if said else []
