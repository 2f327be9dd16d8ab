"""One rank of a run: `python -m rlx.worker FOLDER` under DeepSpeed's launcher. All that it knows is in FOLDER/job.json."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Train; end with 0, with 130 or 143 where the user ended it, or with an error in rank-N.error."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    (folder / f"rank-{rank}.pid").write_text(f"{os.getpid()} {socket.gethostname()}", encoding="utf-8")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started the ranks tells them
    if rank:
        speak_into(folder / f"rank-{rank}.log")
    if job["host"] == socket.gethostname():
        threading.Thread(target=end_with, args=(job["parent"],), daemon=True).start()
    status = 0
    try:
        train(job, folder)
    except KeyboardInterrupt as end:  # which the ranks have agreed on
        status = 128 + int(end.args[0])
    except BaseException as error:  # whatever it is, the other ranks wait for this one
        status = report(error, folder / f"rank-{rank}.error")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a process group in the middle of a collective would not end


def train(job: dict[str, Any], folder: Path) -> None:
    """Bind the resolved config and run it."""
    from rlx import world
    from rlx.launch import launch_of
    from rlx.plan import plan
    from rlx.run import alone, quiet, run

    launch = launch_of(job["config"])
    quiet()
    world.join(folder, launch.timeout)
    made = plan(job["config"], trusted=job["trust"], **job["known"])
    for line in made.notices:
        print(f"note: {line}")
    run_dir = Path(job["run_dir"])
    with alone(run_dir, "run") if world.leads() else contextlib.nullcontext():
        try:
            run(made, run_dir, share=job["share"], **job["how"])
        except KeyboardInterrupt:
            world.barrier()  # the launcher ends all ranks when one ends like this: rank 0 has written its state by then
            raise
    world.barrier()


def report(error: BaseException, path: Path) -> int:
    """Write what went wrong; the exit status of it. The message of an error of rlx's own is all there is to say."""
    import torch
    from torch.distributed import DistError

    from rlx.ranks import LOST, OWN
    from rlx.types import ConfigError, Failed

    status = 2 if isinstance(error, ConfigError) else error.status if isinstance(error, Failed) else 1
    known = isinstance(error, ConfigError | Failed)
    lines = traceback.format_exception(error)
    message = str(error) if known else "".join(lines)
    causes = (error, error.__cause__)
    record = {
        "kind": LOST if any(isinstance(e, DistError) or "by peer" in str(e) for e in causes) else OWN,
        "time": time.time(),
        "status": status,
        "message": message,
        "traceback": "".join(lines),
        "memory": any(isinstance(e, torch.OutOfMemoryError) for e in causes),
    }
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(record), encoding="utf-8")
    beside.rename(path)
    return status


def speak_into(path: Path) -> None:
    """What another rank than 0 prints, rank 0 prints as well; what it says on stderr is kept for the case that it dies."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    log = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(nowhere, 1)
    os.dup2(log, 2)


def end_with(parent: int) -> None:
    """End this rank where the process that started it is gone."""
    from rlx.ranks import alive

    while alive(parent):
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
