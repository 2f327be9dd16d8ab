"""A rank of several (learn.py, walk.py, fill.py); the first of them writes what was found to the file named."""

from __future__ import annotations

import os
import sys

import fill
import learn
import torch
import walk

from rlx import world

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {"learned": learn.in_ranks(), "walked": walk.in_ranks(), "filled": fill.in_ranks()}
    if world.leads():
        torch.save(found, sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
