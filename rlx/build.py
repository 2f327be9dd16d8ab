"""The binder: plain config nodes -> components and stages. The signature is the schema; every mistake is reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union

from rlx import types as t
from rlx.catalogue import CATALOGUE, EXTRAS
from rlx.modules import load_module

# A parameter annotated Component[LossTerm] takes a name of the group "loss", and so on.
GROUP_OF: dict[Any, str] = {
    t.LossTerm: "loss",
    t.Advantage: "advantage",
    t.Derive: "derive",
    t.Watch: "watch",
    t.Reduce: "reduce",
    t.Reward: "reward",
    t.Keep: "keep",
    t.Metric: "metric",
    t.Sampler: "sampler",
    t.Data: "data",
    t.Model: "model",
    t.Optim: "optim",
    t.Rollout: "rollout",
    t.Backend: "llm",
}
# Keys that the framework takes out of a component's node before the rest is bound to its signature.
FRAMEWORK: dict[str, dict[str, Any]] = {
    "loss": {"weight": float, "reduce": t.Component[t.Reduce], "read": dict[str, str]},
    "advantage": {"weight": float, "read": dict[str, str]},
    "derive": {"into": str, "add": bool, "read": dict[str, str]},
    "watch": {"read": dict[str, str]},
    "reward": {"weight": float},
}
# Settings that name a file or a folder, or else something on the hub.
FILES = {
    "data": ("path",),
    "task": ("path", "train", "dev", "test", "demos"),
    "model": ("path",),
    "reward": ("path",),
    "llm": ("path",),
}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
# `pass@8` is a name and a number; an @ in the path of a file of the user's is not.
NUMBERED = re.compile(r"(.+)@(\w*)")
# What a language model computes, besides its heads.
LANGUAGE = frozenset({"logp", "entropy"})
# A list of known names longer than this is cut to the nearest dozen.
MANY, NEAREST = 30, 12
WORDS = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}


@dataclass
class Binder:
    """Binds nodes and collects what is wrong with them.

    `trusted` are the files, modules and models whose code the user allows to run. `swapped` are the paths whose component
    the command line replaced: there, keys that the new one does not take are dropped with a notice (their paths stand in
    `dropped`), but for those at or below a path of `given`, which the user wrote. `provided` holds components that come
    with this recipe, as (group, name); they stand before the catalogue's.
    """

    trusted: Sequence[str] = ()
    swapped: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    provided: Mapping[tuple[str, str], Callable[..., Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def component(self, group: str, node: Any, path: str) -> Any:
        """`name`, `name@8` or `{name: ..., key: value}` -> a Component, or None with the reasons in `errors`."""
        if isinstance(node, str):
            node = {"name": node}
        if not isinstance(node, Mapping):
            self.errors.append(f"{path}: expected the name of a {group} or a mapping with `name`, got {node!r}")
            return None
        node = {key: value for key, value in node.items() if value is not None}  # `key: null` drops an inherited key
        name = node.pop("name", None)
        if name is None:
            self.errors.append(f"{path}.name: missing; which {group}? (known: {', '.join(CATALOGUE[group])})")
            return None
        numbered_name = NUMBERED.fullmatch(str(name))
        name, number = numbered_name.groups() if numbered_name else (str(name), None)
        target = self.locate(group, name, f"{path}.name")
        if target is None:
            return None
        reads, params = signature(target)
        before = len(self.errors)
        package, extra = EXTRAS.get((group, name), ("", ""))
        if package and importlib.util.find_spec(package) is None:
            self.errors.append(f"{path}.name: {name!r} needs {package}, which is not installed: pip install 'rlx[{extra}]'")
        if number is not None:
            self.with_number(group, name, number, params, node, path)
        frame = {
            key: self.value(hint, node.pop(key), f"{path}.{key}")
            for key, hint in FRAMEWORK.get(group, {}).items()
            if key in node
        }
        settings = self.keywords(f"{group} '{name}'", params, node, path, [*params, *FRAMEWORK.get(group, {})])
        if group in FILES:
            self.errors += [f"{path}.{line}" for key in FILES[group] for line in missing(key, settings.get(key))]
        if settings.get("trust_remote_code") and not self.trusts(str(settings.get("path"))):
            self.errors.append(f"{path}.trust_remote_code: {untrusted(settings.get('path'))}")
        if group == "derive" and "into" not in frame:
            self.errors.append(f"{path}.into: required; the field that {name!r} writes, such as reward")
        if len(self.errors) > before:
            return None
        read = frame.pop("read", {})
        if unknown := [key for key in read if key not in reads]:
            self.errors.append(f"{path}.read.{unknown[0]}: {group} {name!r} reads {', '.join(reads)}")
        label = name.rpartition(":")[2] + (f"@{number}" if number is not None else "")  # own code goes by its function's name
        return t.Component(label, partial(target, **settings), tuple(read.get(r, r) for r in reads), settings=settings, **frame)

    def with_number(
        self, group: str, name: str, number: str, params: Mapping[str, Param], node: dict[str, Any], path: str
    ) -> None:
        """`pass@8` sets `k` of a component that has one."""
        if "k" not in params:
            self.errors.append(f"{path}.name: {group} {name!r} takes no number after an @")
        elif not re.fullmatch("[1-9][0-9]*", number):
            self.errors.append(f"{path}.name: '{name}@{number}': a whole number from 1 stands after the @, as in {name}@8")
        else:
            node["k"] = int(number)

    def record(self, cls: Any, what: str, node: Mapping[str, Any], path: str) -> Any:
        """A mapping -> the dataclass `cls`, field by field."""
        node = {key: value for key, value in node.items() if value is not None}
        names = {f.name.removesuffix("_"): f.name for f in dataclasses.fields(cls)}  # `from` and `as` are words of Python
        params = {f.name.removesuffix("_"): Param(*hint_and_default(cls, f)) for f in dataclasses.fields(cls)}
        before = len(self.errors)
        settings = self.keywords(what, params, node, path, list(params))
        return None if len(self.errors) > before else cls(**{names[key]: value for key, value in settings.items()})

    def keywords(
        self, what: str, params: Mapping[str, Param], node: Mapping[str, Any], path: str, known: Sequence[str]
    ) -> dict[str, Any]:
        """Each key of the node bound to its parameter's type."""
        settings = {}
        for key, value in node.items():
            where = f"{path}.{key}"
            if key in params:
                settings[key] = self.value(params[key].hint, value, where)
            elif path in self.swapped and not self.was_given(where):
                self.dropped.append(where)
                self.notices.append(f"{where}: dropped, because {what} takes no {key!r}")
            else:
                self.errors.append(f"{where}: {what} takes no {key!r}{hint(key, known)}")
        for key, param in params.items():
            if param.required and key not in node:
                self.errors.append(f"{path}.{key}: required by {what}, not given")
        return settings

    def value(self, hint_: Any, value: Any, path: str) -> Any:
        """A plain value checked against a type, components and nested records included."""
        origin, args = typing.get_origin(hint_), typing.get_args(hint_)
        if hint_ is Any or (value is None and type(None) in args):
            return value
        if origin in (Union, types.UnionType):
            return self.union([a for a in args if a is not type(None)], value, path)
        if origin is t.Component:
            return self.component(GROUP_OF[args[0]], value, path)
        if hint_ is t.ModelRef:
            return self.model_ref(value, path)
        if hint_ in (t.Policy, t.TextPolicy):
            return t.ModelName(self.scalar(str, value, path) or "")
        if hint_ is t.DataRef:
            if isinstance(value, str) and value.startswith("@task/"):
                return t.DataRef(split=value.removeprefix("@task/"))
            if isinstance(value, str) and value.startswith("@"):
                if not re.fullmatch("@[^/:]+(/[^/:]+)?", value):
                    self.errors.append(
                        f"{path}: expected @task/SPLIT or a data set such as {{name: jsonl, path: FILE}}, got {value!r}"
                    )
                stage, _, split = value[1:].partition("/")
                return t.DataRef(stage=stage, split=split)
            return t.DataRef(source=self.component("data", value, path))
        if dataclasses.is_dataclass(hint_):
            if not isinstance(value, Mapping):
                self.errors.append(f"{path}: expected a mapping, got {value!r}")
                return None
            last = path.rpartition(".")[2]
            what = f"a {getattr(hint_, '__name__', last).lower()}" if last.isdecimal() else f"`{last}`"
            return self.record(hint_, what, value, path)
        if typing.is_typeddict(hint_):
            if not isinstance(value, Mapping):
                self.errors.append(f"{path}: expected a mapping, got {value!r}")
                return None
            params = {key: Param(kind, False) for key, kind in typing.get_type_hints(hint_).items()}
            return self.keywords(f"`{path.rpartition('.')[2]}`", params, value, path, list(params))
        if origin is Literal:
            if value not in args:
                self.errors.append(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}")
            return value
        if origin in (list, Sequence) or origin is typing.get_origin(Sequence[int]):
            if not isinstance(value, list) and typing.get_origin(args[0]) is t.Component:
                value = [value]  # one component stands for a list of one
            if not isinstance(value, list):
                self.errors.append(f"{path}: expected a list, got {value!r}")
                return None
            return numbered([self.value(args[0], v, f"{path}.{i}") for i, v in enumerate(value)])
        if origin is dict or hint_ is dict:
            if not isinstance(value, Mapping):
                self.errors.append(f"{path}: expected a mapping, got {value!r}")
                return None
            return {
                k: self.value(args[1], v, f"{path}.{k}") if args else v
                for k, v in value.items()
                if v is not None or args[1:] == (Any,)
            }
        return self.scalar(hint_, value, path)

    def scalar(self, want: Any, value: Any, path: str) -> Any:
        """A number, text or truth value."""
        if want is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, want) and (want is bool or not isinstance(value, bool)):
            return value
        self.errors.append(f"{path}: expected {WORDS.get(want, want.__name__)}, got {value!r}")
        return None

    def union(self, members: list[Any], value: Any, path: str) -> Any:
        """The first member that takes the value; if none does, what the first one says (of a mapping, a record)."""
        said: list[list[str]] = []
        for member in members:
            trial = dataclasses.replace(self, errors=[], notices=[], dropped=[])
            bound = trial.value(member, value, path)
            if not trial.errors:
                self.notices += trial.notices
                self.dropped += trial.dropped
                return bound
            said.append(trial.errors)
        records = [i for i, member in enumerate(members) if isinstance(value, Mapping) and is_record(member)]
        self.errors += said[records[0] if records else 0]
        return None

    def model_ref(self, value: Any, path: str) -> t.ModelRef | None:
        """`@stage`, `@stage:best`, `@stage:step=80`, `@stage:20%`, each with `/model`; a directory or a hub id."""
        if not isinstance(value, str) or not value:
            self.errors.append(f"{path}: expected @stage, a directory or a hub id, got {value!r}")
            return None
        if not value.startswith("@"):
            if not Path(value).expanduser().exists() and (looks_local(value) or "/" not in value):
                self.errors.append(
                    f"{path}: {value!r} is no directory here and no hub id (owner/name); a stage's weights are written @STAGE"
                )
            return t.ModelRef(path=value)
        stage, _, pick = value[1:].partition(":")
        if pick and pick != "best" and not re.fullmatch(r"step=\d+|\d+(\.\d+)?%", pick):
            known = f"@{stage}, @{stage}:best, @{stage}:step=80, @{stage}:20%"
            self.errors.append(f"{path}: {value!r} asks for {pick!r}; known: {known}")
        stage, _, name = stage.partition("/")
        return t.ModelRef(stage=stage, pick=pick or "last", name=name or "policy")

    def locate(self, group: str, name: str, path: str) -> Callable[..., Any] | None:
        """The function or class of a name. Code from outside the catalogue runs only where the user trusts it by name."""
        if (group, name) in self.provided:
            return self.provided[group, name]
        if name in CATALOGUE[group]:
            module, _, attr = CATALOGUE[group][name].partition(":")
            return typing.cast(Callable[..., Any], getattr(importlib.import_module(module), attr))
        if ":" not in name:
            self.errors.append(f"{path}: no {group} is called {name!r}{hint(name, CATALOGUE[group])}")
            return None
        module, _, attr = name.rpartition(":")
        if not self.trusts(module):
            self.errors.append(f"{path}: {name!r} is code from outside rlx; to run it add --trust {module}")
            return None
        try:
            return typing.cast(Callable[..., Any], getattr(load_module(module), attr))
        except FileNotFoundError:
            self.errors.append(f"{path}: there is no file {module}")
        except AttributeError:
            self.errors.append(f"{path}: {module} defines no {attr!r}")
        except Exception as error:  # the user's own module, at import: say what it raised, whatever it was
            self.errors.append(f"{path}: importing {module} raised {type(error).__name__}: {error}")
        return None

    def trusts(self, name: str) -> bool:
        """Whether the user allows the code of a file, a module or a model."""
        return name in self.trusted or Path(name).resolve() in [Path(p).resolve() for p in self.trusted]

    def was_given(self, path: str) -> bool:
        """Whether the user wrote the value of a path, or one that holds it."""
        parts = path.split(".")
        return any(".".join(parts[: i + 1]) in self.given for i in range(len(parts)))


def is_record(hint_: Any) -> bool:
    """Whether a type is written as a mapping of its fields."""
    return dataclasses.is_dataclass(hint_) and hint_ not in (t.ModelRef, t.DataRef)


def model_offers(model: t.Component[t.Model] | None) -> frozenset[str]:
    """What a model of the catalogue computes: its function's `offers`, else what a language model does."""
    found: frozenset[str] = getattr(getattr(model and model.call, "func", None), "offers", LANGUAGE)
    return found


@dataclass(frozen=True)
class Param:
    """A parameter's type and whether a recipe has to give it."""

    hint: Any
    required: bool


def signature(target: Callable[..., Any]) -> tuple[list[str], dict[str, Param]]:
    """What a component reads (positional parameters) and what it is set by (keyword-only parameters)."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    reads, params = [], {}
    for name, p in inspect.signature(target).parameters.items():
        if p.kind is p.KEYWORD_ONLY:
            params[name] = Param(hints.get(name, Any), p.default is p.empty)
        elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            reads.append(name)
    return reads, params


def hint_and_default(cls: Any, f: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """The resolved type of a dataclass field, and whether it has no default."""
    missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    return typing.get_type_hints(cls)[f.name], missing


def numbered(items: list[Any]) -> list[Any]:
    """Two components of one list never share a name: the second `length` is `length_2`."""
    seen: dict[str, int] = {}
    out = []
    for item in items:
        if isinstance(item, t.Component):
            seen[item.name] = seen.get(item.name, 0) + 1
            if seen[item.name] > 1:
                item = dataclasses.replace(item, name=f"{item.name}_{seen[item.name]}")
        out.append(item)
    return out


def untrusted(model: Any) -> str:
    """What to do where a model brings code that the user has not allowed."""
    return f"would run code that comes with the model; to allow it add --trust {model}"


def looks_local(path: str) -> bool:
    """Whether a text can only mean a path of this machine: a hub id has one slash."""
    return path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or path.count("/") > 1


def missing(key: str, value: Any) -> list[str]:
    """A line for a setting that names a file or folder of this machine that is not there."""
    if not isinstance(value, str) or not looks_local(value) or Path(value).expanduser().exists():
        return []
    return [f"{key}: there is no file or directory {value!r}"]


def likeness(word: str, name: str) -> float:
    """How alike a word is to a name, or to one of its parts: `cliped` means clipped_surrogate."""
    return max(difflib.SequenceMatcher(None, word, part).ratio() for part in [name, *re.split("[_/]", name)])


def hint(word: Any, known: Iterable[str], where: str = "rlx/catalogue.py") -> str:
    """The nearest known name, and all of them; of many the nearest dozen, and `where` all are to be seen."""
    names = list(known)
    ranked = sorted(names, key=lambda name: -likeness(str(word), name))
    near = ranked and ranked[0] != word and likeness(str(word), ranked[0]) >= 0.6
    said = f"; did you mean {ranked[0]!r}?" if near else ""
    if len(names) <= MANY:
        return f"{said} (known: {', '.join(names)})"
    return f"{said} (nearest of {len(names)}: {', '.join(ranked[:NEAREST])}; all: {where})"
