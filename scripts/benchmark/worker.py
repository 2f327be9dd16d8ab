"""One side in a process of its own: `python -m benchmark.worker JSON`. What libraries print goes to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmark.clock import Clock, Passes
from benchmark.cuda import peaks
from benchmark.workloads import CUDA, MEMORY, WORKLOADS, Setting, groups, settings

TABLES = {"cpu": WORKLOADS, "memory": MEMORY, "cuda": CUDA}


def machine(table: str) -> dict[str, Any]:
    """What the numbers are measured on, and its limits: FLOPs a second in float32 of one thread, or those of the GPU."""
    import trl

    from rlx.run import hardware, versions

    about = {"versions": {**versions(), "trl": trl.__version__}, "hardware": hardware()}
    if table == "cuda":
        flops, bandwidth = peaks(torch.cuda.get_device_name())
        return {**about, "flops": flops, "bandwidth": bandwidth}
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    spent = []
    for _ in range(20):
        start = time.process_time()
        torch.mm(a, b)
        spent.append(time.process_time() - start)
    return {**about, "flops": 2 * 1024**3 / min(spent)}


def main() -> None:
    """Do what the parent asks for, in one thread."""
    asked = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    if asked["do"] == "machine":
        out.write(json.dumps(machine(asked["table"])) + "\n")
        return
    work, folder = TABLES[asked["table"]][asked["workload"]], Path(asked["folder"])
    if asked["do"] == "prepare":
        from benchmark.prepare import prepare

        prepare(work, folder)
        out.write("{}\n")
    elif asked["do"] == "equal":
        from benchmark.equal import differences

        out.write(json.dumps(differences(work, folder)) + "\n")
    else:
        clock = Clock("cuda" if asked["table"] == "cuda" else "cpu")
        passes = Passes(clock, work.steps, [] if work.kind == "grpo" else groups(work), out, sys.stdin)
        if asked["do"] == "rlx":
            from benchmark import rlx_side

            rlx_side.run(work, folder, clock, passes)
        else:
            from benchmark import trl_side

            setting: Setting = settings(work)[asked["setting"]]
            trl_side.run(work, folder, clock, passes, setting)


if __name__ == "__main__":
    main()
