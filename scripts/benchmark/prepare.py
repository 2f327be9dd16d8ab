"""What both sides start from, on disk: weights, tokenizer, rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmark.workloads import END, PAD, STOP, UNKNOWN, Workload, rows


def prepare(work: Workload, folder: Path) -> None:
    """Write `model/` and `rows.jsonl`; for a reward model also `classifier/`, the same weights with the head that rlx draws."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(work)), encoding="utf-8")
    tokenizer(work).save_pretrained(folder / "model")
    module(work).save_pretrained(folder / "model")
    if work.kind == "rm":
        classifier(work, folder)


def tokenizer(work: Workload) -> Any:
    """Words `w4`, `w5`, ... by their number, and no chat template: what is written is what is read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": PAD, "<end>": END, "<unknown>": UNKNOWN}
    vocabulary = special | {f"w{i}": i for i in range(STOP, work.vocab)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>")


def module(work: Workload) -> Any:
    """Random weights."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=work.vocab,
        hidden_size=work.layout.hidden,
        intermediate_size=work.layout.ffn,
        num_hidden_layers=work.layout.layers,
        num_attention_heads=work.layout.heads,
        num_key_value_heads=work.layout.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    made.generation_config.eos_token_id = [END, STOP][: work.ends]
    return made


def policy(work: Workload, folder: Path, device: str, *, seed: int = 0) -> Any:
    """The model as rlx has it. Not by its directory: there transformers gives every Qwen2 model the tokenizer of Qwen2."""
    from transformers import AutoModelForCausalLM

    from rlx.models.load import finish

    read = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    dtype: Any = "bf16" if work.bf16 else "fp32"
    return finish(read, words(folder), dtype=dtype, lora=None, device=device, seed=seed, source="bench")


def words(folder: Path) -> Any:
    """The tokenizer that `prepare` wrote."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder / "model")


def classifier(work: Workload, folder: Path) -> None:
    """The model with the head of a reward model, as TRL reads one."""
    from transformers import AutoModelForSequenceClassification

    scored = policy(work, folder, "cpu").with_heads({"score": "last"}, 0)
    config = scored.module.config
    config.num_labels = 1
    twin = AutoModelForSequenceClassification.from_config(config)
    twin.model.load_state_dict(scored.backbone.state_dict())
    twin.score.load_state_dict(scored.heads.linear["score"].state_dict())
    twin.save_pretrained(folder / "classifier")
