"""Write the three files of a new method: its function, its test and its recipe.

python scripts/new_method.py median_grpo --group advantage
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What each group's stub reads, and the lines that compute it.
STUBS = {
    "loss": ("logp: Tensor, adv: Tensor, mask: Tensor", "return -inside(adv, mask) * inside(logp, mask)"),
    "advantage": ("ret: Tensor, group: Tensor, mask: Tensor", "return spread(ret, mask)"),
    "derive": ("old_logp: Tensor, mask: Tensor", "return inside(old_logp, mask)"),
}
METHOD = '''"""TITLE (AUTHORS, YEAR, arXiv NUMBER)."""

from __future__ import annotations

from torch import Tensor

from rlx.tensors import {helper}


def {name}({reads}) -> Tensor:
    """FORMULA: (N,T), UNITS (equation NUMBER of the paper)."""
    {body}
'''
TEST = '''"""{name}: a value by hand, and masked positions change nothing."""

from __future__ import annotations

import torch

from rlx.methods.{name} import {name}


def test_value_by_hand() -> None:
    raise AssertionError("write down what the paper's formula gives on three numbers")
'''
RECIPE = """# What the method changes, and why.
purpose: "ONE LINE"
paper: {{title: "TITLE", year: YEAR, arxiv: "NUMBER"}}
defaults: [/recipe/{parent}]
stages:
  rl:
    {group}: [{{name: {name}}}]
"""


def main() -> None:
    """Write what is not there yet; print what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="such as median_grpo")
    parser.add_argument("--group", choices=sorted(STUBS), default="loss", help="what the function is (default: loss)")
    parser.add_argument("--family", default="reasoning", help="folder of recipes/ (default: reasoning)")
    parser.add_argument("--parent", default="grpo_math", help="the recipe that it starts from (default: grpo_math)")
    given = parser.parse_args()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", given.name):
        sys.exit(f"{given.name!r}: expected a lower-case Python name, such as median_grpo")
    reads, body = STUBS[given.group]
    words = {
        **vars(given),
        "reads": reads,
        "body": body,
        "helper": "spread" if given.group == "advantage" else "inside",
    }
    files = {
        f"rlx/methods/{given.name}.py": METHOD,
        f"tests/methods/test_{given.name}.py": TEST,
        f"recipes/{given.family}/{given.name}.yaml": RECIPE,
    }
    if there := [path for path in files if (ROOT / path).exists()]:
        sys.exit(f"{', '.join(there)}: there already; nothing is written")
    for path, text in files.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text.format(**words), encoding="utf-8")
        print(f"wrote {path}")
    print(f'\nadd to rlx/catalogue.py, under "{given.group}":')
    print(f'        "{given.name}": "rlx.methods.{given.name}:{given.name}",')
    print(f"then:\n  rlx check {given.name}\n  python -m pytest tests/methods/test_{given.name}.py")


if __name__ == "__main__":
    main()
