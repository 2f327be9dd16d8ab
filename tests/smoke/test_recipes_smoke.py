"""Every recipe runs from end to end at scale=smoke: two steps of each stage, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlx.compose import compose, recipes
from rlx.plan import plan
from rlx.run import run

NAMES = [name for name in recipes() if not name.startswith("paper/")]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(name: str, tmp_path: Path) -> None:
    made = plan(compose([name, "scale=smoke"]).config)
    info = run(made, tmp_path / "run")
    assert info["status"] == "finished"
    for stage in made.stages:
        folder = tmp_path / "run" / stage
        assert (folder / "DONE").is_file()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows
        assert not [key for row in rows for key, value in row.items() if key == "loss" and value is None]
