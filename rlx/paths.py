"""Where things are: conf/ and recipes/ beside the package in a checkout and inside it in a wheel, runs below runs/."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

from rlx.types import ConfigError

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "_shipped" if (PACKAGE / "_shipped").is_dir() else PACKAGE.parent
CONF, RECIPES = SHIPPED / "conf", SHIPPED / "recipes"


def default_run_dir(recipe: str) -> Path:
    """runs/<recipe>/<time>, unused."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    base = Path("runs") / recipe / stamp
    return next(p for i in range(1000) if not (p := base.with_name(f"{stamp}_{i}") if i else base).exists())


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """The directory of a run or sweep, made. Raises ConfigError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"run_dir={folder}: cannot be written ({error.strerror}); choose another with run_dir=DIR") from error
