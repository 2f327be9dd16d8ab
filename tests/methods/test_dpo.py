"""DPO as a recipe: training begins at the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlx.compose import compose
from rlx.plan import plan
from rlx.run import run


def test_at_the_first_step_the_policy_is_its_reference(tmp_path: Path) -> None:
    """A margin that is not 0 there has another cause than training: other tokens, another dtype, dropout."""
    run(plan(compose(["dpo", "scale=smoke", "stages.dpo.log_every=1"]).config), tmp_path)
    first, last = (json.loads(x) for x in (tmp_path / "dpo/metrics.jsonl").read_text().splitlines() if '"loss"' in x)
    assert abs(first["dpo_margin"]) < 1e-3
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["loss"] != first["loss"]
