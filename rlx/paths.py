"""Where things are: conf/ and recipes/ beside the package in a checkout and inside it in a wheel, runs below runs/."""

from __future__ import annotations

import datetime
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "_shipped" if (PACKAGE / "_shipped").is_dir() else PACKAGE.parent
CONF, RECIPES = SHIPPED / "conf", SHIPPED / "recipes"


def default_run_dir(recipe: str) -> Path:
    """runs/<recipe>/<time>, unused."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    base = Path("runs") / recipe / stamp
    return next(p for i in range(1000) if not (p := base.with_name(f"{stamp}_{i}") if i else base).exists())
