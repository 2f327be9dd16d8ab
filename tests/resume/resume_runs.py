"""Small runs of every kind of stage, and the process that carries one out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what optimisers import at their first step
import yaml

from rlx.models.load import tiny
from rlx.plan import plan
from rlx.run import run

PARTS = str(Path(__file__).with_name("resume_parts.py"))
MODEL = {"name": "tiny", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 32}
PROMPTS = {"data": "@task/train", "max_new_tokens": 4}

FIT = {
    "kind": "fit",
    "data": "@task/demos",
    "loss": [{"name": "nll"}],
    "steps": 10,
    "rows_per_step": 24,  # of 90 rows: the order begins anew within a batch
    "lr": 1e-2,
    "optim": {"name": "adamw", "schedule": "linear", "warmup": 3},
    "log_every": 2,
    "checkpoint_every": 4,
    "checkpoints": ["30%"],
    "eval": {"every": 3, "data": "@task/dev", "metrics": ["accuracy", "length"], "limit": 4, "max_new_tokens": 4},
}
ONLINE = {
    "kind": "online",
    **PROMPTS,
    "reward": [{"name": f"{PARTS}:noisy"}, {"name": f"{PARTS}:slow"}],
    "advantage": [{"name": "group_mean"}],
    "loss": [{"name": "clipped_surrogate"}, {"name": f"{PARTS}:against_mean", "weight": 0.1}],
    "watch": [{"name": "entropy"}],
    "epochs": 2,
    "minibatches": 2,
    "prompts_per_step": 3,
    "group_size": 4,
    "steps": 10,
    "lr": 1e-3,
    "samples_every": 3,
}
EVERYTHING = {
    **{key: value for key, value in ONLINE.items() if key not in ("loss", "advantage", "epochs", "minibatches", "watch")},
    "keep": [{"name": "mixed_groups"}],
    "refill": 2,
    "models": {
        "critic": {"from": "@model", "heads": {"q": "after_turn", "q2": "after_turn", "v": "before_turn", "v2": "before_turn"}},
        "target": {"ema": "critic", "decay": 0.8},
        "reference": {"from": "@model", "refresh": {"every": 4}},
    },
    "buffers": {
        "played": {"capacity": 40, "resample": "policy", "states": 6},
        "shown": {"capacity": 8, "as": "demonstration", "order": "newest", "save": True},
    },
    "updates": {
        "critic": {
            "train": "critic",
            "on": "played",
            "rows": 4,
            "steps": 2,
            "loss": [
                {"name": "utterance_td", "gamma": 0.9},
                {"name": "utterance_td", "gamma": 0.9, "read": {"q": "q2", "target_v": "target_v2"}},
                {"name": "value_of_fresh"},
                {"name": "value_of_fresh", "read": {"v": "v2", "target_q": "target_q2"}},
            ],
        },
        "actor": {
            "on": "played",
            "rows": 6,
            "start": 3,
            "advantage": [{"name": "utterance_advantage"}],
            "loss": [{"name": "policy_gradient"}],
        },
        "imitate": {"on": "shown", "rows": 4, "every": 2, "loss": [{"name": "nll"}]},
        "kept": {
            "epochs": 2,
            "minibatches": 2,
            "advantage": [{"name": "group_mean"}],
            "loss": [{"name": "clipped_surrogate"}, {"name": "kl", "weight": 0.1}],
        },
    },
    "eval": {"every": 2, "data": "@task/dev", "metrics": ["length"], "limit": 4, "max_new_tokens": 4, "patience": 20},
}
COLLECT = {
    "kind": "collect",
    **PROMPTS,
    "reward": ONLINE["reward"],
    "rows": "all_pairs",
    "margin": 0.01,
    "group_size": 3,
    "limit": 30,
    "prompts_per_step": 3,
}
DPO = {
    "kind": "fit",
    "policy": "@policy",
    "reference": "@policy",
    "data": "@pairs",
    "loss": [{"name": "dpo"}],
    "steps": 4,
    "rows_per_step": 4,
    "lr": 1e-3,
    "log_every": 1,
}
REPEAT = {
    "kind": "repeat",
    "times": 2,
    "carry": {"policy": "@sft"},
    "stages": {"pairs": {**COLLECT, "policy": "@policy", "limit": 9}, "dpo": DPO},
    "next": {"policy": "@dpo"},
}

STAGES: dict[str, dict[str, Any]] = {
    "fit": {"rl": FIT},
    "online": {"rl": ONLINE},
    "everything": {"rl": EVERYTHING},
    "collect": {"rl": COLLECT},
    "repeat": {"sft": {**FIT, "steps": 3}, "loop": REPEAT},
}
OBJECTIVE = {"fit": "rl/eval/length", "everything": "rl/eval/length"}


def config_of(kind: str, save: dict[str, Any], steps: int = 0) -> dict[str, Any]:
    """The config of one of the runs, of a round trip through YAML."""
    stages = STAGES[kind] if not steps else {"rl": {**STAGES[kind]["rl"], "steps": steps}}
    task = {"name": "arithmetic", "digits": 2}
    whole = {"recipe": kind, "model": MODEL, "task": task, "seed": 3, "save": save, "stages": stages}
    if kind in OBJECTIVE:
        whole["objective"] = OBJECTIVE[kind]
    made: dict[str, Any] = yaml.safe_load(yaml.safe_dump(whole))
    return made


def carry_out(config: dict[str, Any], run_dir: Path, said: Path, *, resume: bool = False, file_size: int = 0) -> None:
    """A run in this process; what it says is in a file. `file_size`: the most bytes that a file can have."""
    import resource

    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["RESUME_MARK"] = str(run_dir.with_suffix(".playing"))
    torch.set_num_threads(1)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        run(plan(config, trusted=[PARTS]), run_dir, resume=resume)
    except KeyboardInterrupt as end:
        sys.exit(128 + end.args[0])


# What a run imports, before processes are forked from the one that has imported this.
tiny(layers=1, hidden=16, heads=2, kv_heads=2, ffn=32)
