"""What a GPU could do at most, and how near a side comes: decoding against its memory, the update against its arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmark.floor import forward, packed, padded
from benchmark.workloads import Workload

# bf16 FLOPs without sparsity and bytes of memory a second, from NVIDIA's data sheets (SXM).
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}


def peaks(device: str) -> tuple[float, float]:
    """Of the card that torch calls so. Raises ValueError for one that is not listed."""
    for name, found in PEAKS.items():
        if name in device:
            return found
    raise ValueError(f"the limits of {device!r} are not known: add them to PEAKS in scripts/benchmark/cuda.py")


def limits(work: Workload, passes: Sequence[dict[str, Any]], flops: float, bandwidth: float) -> dict[str, Any]:
    """Medians over passes: sampled tokens a second, a decode step and its floor (seconds), MFU of the update.

    A decode step reads all weights once and the keys and values of every row, here at half of the longest answer. The MFU is
    given for the work that padded rows, packed rows and shared prompts need: the last is what is useful of it.
    """
    layout = work.layout
    steps = [max(c for _, cs in p["groups"] for c in cs) * work.steps for p in passes]
    at_half = [sum((prompt + max(cs) / 2) * len(cs) for prompt, cs in p["groups"]) / work.steps for p in passes]
    pair = 2 * 2 * layout.layers * layout.hidden * layout.kv_heads // layout.heads  # bytes a token, key and value in bf16
    weights = 2 * (layout.body + work.vocab * layout.hidden)

    def mfu(groups: Any, seconds: float) -> float:
        return 3 * forward(layout, work.vocab, groups) / seconds / flops

    return {
        "rollout_tokens_per_second": statistics.median(
            sum(sum(cs) for _, cs in p["groups"]) / p["phases"]["rollout"] for p in passes
        ),
        "decode_step": statistics.median(p["phases"]["rollout"] / n for p, n in zip(passes, steps, strict=True)),
        "decode_step_floor": statistics.median((weights + pair * n) / bandwidth for n in at_half),
        "update_mfu": {
            name: statistics.median(mfu(how(p["groups"]), p["phases"]["update"]) for p in passes)
            for name, how in (("padded", padded), ("packed", packed), ("prefix_shared", list))
        },
    }
