"""Write recipes/README.md from the recipes."""

from __future__ import annotations

from rlx.compose import recipes
from rlx.paths import RECIPES
from rlx.show import table_of_recipes

if __name__ == "__main__":
    (RECIPES / "README.md").write_text(table_of_recipes(recipes()), encoding="utf-8")
