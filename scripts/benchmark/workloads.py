"""What is measured: shapes, lengths and the settings of TRL that are tried. Nothing heavy is imported here."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Literal

LR = 1e-6
BETA = 0.1  # of DPO
PAD, END, UNKNOWN, STOP, FIRST = 0, 1, 2, 3, 4  # ids; STOP ends an answer, too, where a model has two ends


@dataclass(frozen=True)
class Layout:
    """A decoder of the Qwen2 architecture with tied embeddings."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 512

    @property
    def body(self) -> int:
        """Weights of the matrices of all layers."""
        attention = self.hidden * (2 * self.hidden + 2 * self.hidden * self.kv_heads // self.heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)


@dataclass(frozen=True)
class Workload:
    """`rows` prompts, sequences or pairs an optimiser step; a pass over the data is `steps` steps.

    `prompt` holds the bounds of a prompt's length, drawn evenly; without it, prompts and answers have skewed lengths.
    `new` limits the answer, `ends` is how many ids end it: a random model draws each with a probability of about 1 / vocab.
    """

    name: str
    kind: Literal["grpo", "sft", "dpo", "rm"]
    vocab: int
    rows: int
    prompt: tuple[int, int] = (0, 0)
    new: int = 256
    group: int = 8
    ends: int = 1
    steps: int = 1
    layout: Layout = Layout()
    bf16: bool = False

    @property
    def sequences(self) -> int:
        """Sequences an optimiser step, as TRL counts its batch: a pair is one."""
        return self.rows * self.group if self.kind == "grpo" else self.rows


WORKLOADS = {
    w.name: w
    for w in (
        Workload("grpo_short", "grpo", vocab=64, rows=8, prompt=(32, 64), new=128, steps=2),
        Workload("grpo_long", "grpo", vocab=8192, rows=4, prompt=(128, 256), new=32, steps=2),
        Workload("grpo_tail", "grpo", vocab=128, rows=8, prompt=(256, 256), new=256, ends=2),
        Workload("sft_mixed", "sft", vocab=8192, rows=16, steps=4),
        Workload("dpo", "dpo", vocab=8192, rows=16, steps=2),
        Workload("rm", "rm", vocab=8192, rows=16, steps=4),
    )
}
MEMORY = {name: replace(WORKLOADS[name], vocab=150_000, steps=1) for name in ("sft_mixed", "dpo")}

QWEN_HALF = Layout(layers=24, hidden=896, heads=14, kv_heads=2, ffn=4864)
CUDA = {
    "grpo_cuda": Workload("grpo_cuda", "grpo", vocab=151_936, rows=8, prompt=(512, 512), new=1024, layout=QWEN_HALF, bf16=True)
}


# --------------------------------------------------------------------------- data
def length(rng: random.Random, bounds: tuple[int, int]) -> int:
    """Evenly between the bounds; without bounds log-normal with a median of 24 and a mean of 40, from 4 to 256."""
    return rng.randint(*bounds) if bounds[1] else min(256, max(4, round(rng.lognormvariate(3.178, 1.0))))


def ids(rng: random.Random, work: Workload, bounds: tuple[int, int] = (0, 0)) -> list[int]:
    """Random ids, none of them special."""
    return [rng.randrange(FIRST, work.vocab) for _ in range(length(rng, bounds))]


def text(tokens: list[int]) -> str:
    """One word an id: what the tokenizer of `prepare.py` reads as these ids."""
    return "".join(f" w{i}" for i in tokens)


def rows(work: Workload) -> list[dict[str, str]]:
    """The data of a pass, in the columns that rlx and TRL both read."""
    rng = random.Random(0)
    answers = {"grpo": (), "sft": ("completion",), "dpo": ("chosen", "rejected"), "rm": ("chosen", "rejected")}[work.kind]
    names = [("prompt", work.prompt), *((name, (0, 0)) for name in answers)]
    return [{name: text(ids(rng, work, bounds)) for name, bounds in names} for _ in range(work.rows * work.steps)]


def groups(work: Workload) -> list[tuple[int, list[int]]]:
    """(length of the prompt, lengths of its answers with their end) of each row of offline data."""

    def size(text: str) -> int:
        return text.count(" ")

    return [(size(row.pop("prompt")), [size(answer) + 1 for answer in row.values()]) for row in rows(work)]


# --------------------------------------------------------------------------- what TRL can be told
@dataclass(frozen=True)
class Setting:
    """How TRL is run: arguments of its config, the size of its micro-batches, and the environment of its process."""

    arguments: tuple[tuple[str, Any], ...] = ()
    micro: int = 8
    env: tuple[tuple[str, str], ...] = ()


def settings(work: Workload) -> dict[str, Setting]:
    """TRL's defaults (bf16 and checkpointing on, micro-batches of 8), and what may be faster, by name.

    Not among them, because they were far slower on a CPU (packing and padding_free 1.2 times, continuous batching 20
    times), or cannot be had: vLLM, kernels of Triton.
    """
    same = (("bf16", work.bf16), ("gradient_checkpointing", False))
    gqa = (("TRANSFORMERS_SDPA_FORCE_GQA", "1"),)
    sizes = sorted({8, 16, work.sequences} if work.kind == "grpo" else {2, 4, 8, work.sequences})
    found = {"default": Setting()}
    found |= {f"micro {n}": Setting(same, n) for n in sizes}
    found |= {f"micro {n}, gqa": Setting(same, n, gqa) for n in sizes if work.kind == "grpo"}
    if work.kind == "dpo":  # rlx computes the reference's log-probs once, in the warm-up
        found |= {f"micro {n}, kept": Setting((*same, ("precompute_ref_log_probs", True)), n) for n in sizes}
    if work.kind == "sft":
        found["by length"] = Setting((*same, ("train_sampling_strategy", "group_by_length")), 4)
    return found
