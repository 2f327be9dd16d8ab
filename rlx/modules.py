"""Code by name: a module that is installed, or a file of the user's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlx.types import ConfigError


def load_module(module: str) -> Any:
    """A trusted module by name, or a trusted file by path. Raises FileNotFoundError, ImportError and what its code raises."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).resolve()
    if not path.is_file():
        raise FileNotFoundError(module)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not Python source")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def place_of(function: Callable[..., Any]) -> tuple[str, str]:
    """The module or file of a function and its name there, by which another process finds it. Raises ConfigError: in none."""
    own = inspect.unwrap(function).__globals__
    name = function.__qualname__
    if "<" in name:
        raise ConfigError(f"{name} is in a function; another process only finds what stands in a module or file by its name")
    known = sys.modules.get(function.__module__)
    return (function.__module__ if known is not None and known.__dict__ is own else own["__file__"], name)


@functools.cache
def function_at(place: str, name: str) -> Callable[..., Any]:
    """The function that `place_of` was asked of; a file is run once."""
    found: Callable[..., Any] = functools.reduce(getattr, name.split("."), load_module(place))
    return found
