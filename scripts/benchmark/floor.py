"""The arithmetic that a step cannot do without, each prompt read once: what the measured time is held against.

2 FLOPs a weight and token, 4 layers x width for each pair of positions that attend; the output matrix for scored positions
alone. Backward is twice the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.workloads import Layout, Workload

Groups = Sequence[tuple[int, Sequence[int]]]  # (prompt, answers) in tokens


def forward(layout: Layout, vocab: int, groups: Groups) -> float:
    """FLOPs of one forward over groups whose answers share their prompt; `vocab` 0: no output matrix."""
    tokens = sum(p + sum(cs) for p, cs in groups)
    pairs = sum(p * p / 2 + sum(p * c + c * c / 2 for c in cs) for p, cs in groups)
    scored = sum(sum(cs) for _, cs in groups)
    width = layout.layers * layout.hidden
    return 2.0 * layout.body * tokens + 4.0 * width * pairs + 2.0 * vocab * layout.hidden * scored


def packed(groups: Groups) -> Groups:
    """The same sequences, each with a prompt of its own."""
    return [(p, [c]) for p, cs in groups for c in cs]


def padded(groups: Groups) -> Groups:
    """The same sequences as one rectangle: all prompts and all answers as long as the longest."""
    alone = packed(groups)
    return [(max(p for p, _ in alone), [max(cs[0] for _, cs in alone)])] * len(alone)


def needed(work: Workload, groups: Groups) -> float:
    """FLOPs of the workload's steps on these groups: rollout, forwards and backwards. The reference's forwards were before."""
    once = forward(work.layout, 0 if work.kind == "rm" else work.vocab, groups)
    return {"grpo": 1 + 3, "sft": 3, "dpo": 3, "rm": 3}[work.kind] * once
