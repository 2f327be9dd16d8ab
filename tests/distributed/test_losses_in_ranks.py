"""Two ranks get the loss, gradient and metrics of one process, for every loss of the catalogue under every reduction."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from started import run

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from catalogued import cases, check

SCRIPT = Path(__file__).with_name("walk.py")


def walked(file: Path, *stages: str) -> Any:
    run(SCRIPT, file, *stages)
    return torch.load(file)


def test_every_loss_is_the_same_in_two_ranks(tmp_path: Path) -> None:
    """A start takes seconds, so that there is one for all; tokens are shared unequally, and in a second step one has none."""
    expected, ranks = walked(tmp_path / "one"), walked(tmp_path / "two", "2", "3")
    assert list(ranks) == ["2", "3"]
    for stage, found in ranks.items():
        assert list(found) == list(expected) == [str(case) for case in cases()]
        assert sum(tokens[0] != tokens[1] for (_, tokens), _ in found.values()) > len(found) / 2
        for case, steps in found.items():
            for what, (step, tokens), (there, _) in zip(("a batch", "a rank without"), steps, expected[case], strict=True):
                assert (min(tokens) > 0) == (what == "a batch"), (stage, case, tokens)
                check(f"ZeRO-{stage}, {case}, {what}", step, there)
