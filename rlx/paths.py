"""Where conf/ and recipes/ are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "_shipped" if (PACKAGE / "_shipped").is_dir() else PACKAGE.parent
CONF, RECIPES = SHIPPED / "conf", SHIPPED / "recipes"
