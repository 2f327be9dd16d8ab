"""Start a script in one process, or in two ranks under some stages of ZeRO, as a launcher would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rlx.ranks import free_port


def run(script: Path, file: Path, *stages: str) -> None:
    """Run `script FILE STAGE...` to its end: it writes the file. In one process where no stage is named."""
    ranks = 2 if stages else 1
    own = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), str(file), *stages]
    children = [subprocess.Popen(command, env={**own, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(ranks)]
    assert [child.wait() for child in children] == [0] * ranks
