"""Two ranks take the same steps as one process: any split, masks, groups, coupled terms, a rank without tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlx.ranks import free_port

SCRIPT = Path(__file__).with_name("learn.py")


def learned(file: Path, *stages: str) -> Any:
    ranks = 2 if stages else 1
    own = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(SCRIPT), str(file), *stages]
    children = [subprocess.Popen(command, env={**own, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(ranks)]
    assert [child.wait() for child in children] == [0] * ranks
    return json.loads(file.read_text())


def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    alone, found = learned(tmp_path / "alone.json"), learned(tmp_path / "ranks.json", "0", "1", "2", "3")
    assert list(found) == ["0", "1", "2", "3"]
    assert all(step["grad_norm"] > 1e-3 for step in alone if "grad_norm" in step)
    for stage, steps in found.items():
        assert len(steps) == len(alone) == 4 * 7
        for step, expected in zip(steps, alone, strict=True):
            assert step.keys() == expected.keys()
            for key, value in step.items():
                assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (stage, key)
