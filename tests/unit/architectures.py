"""Small random models of several architectures behind the Policy protocol, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from rlx.models.language import LanguageModel
from rlx.models.load import finish
from rlx.models.tokenizer import byte_tokenizer
from rlx.types import Episode, Message, Task, Turn

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
# latent attention: values are narrower than keys
LATENT = {
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1},
    **{"topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_method": "greedy"},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", GROUPED),
    "llama": ("LlamaConfig", GROUPED),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.3, "resid_pdrop": 0.3}),
    # two kinds of layers (a window of 8 tokens, and all of them), soft-capped attention and logits
    "gemma2": (
        "Gemma2Config",
        {**GROUPED, "sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
}

# attention that is not just queries of some heads on keys of as many or fewer
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("DeepseekV3Config", {**GROUPED, **LATENT}),
    "jetmoe": ("JetMoeConfig", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 8}),
    "jetmoe_of_one": ("JetMoeConfig", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 8}),
    "doge": ("DogeConfig", GROUPED),
}


def model(name: str, seed: int = 0) -> LanguageModel:
    """A policy whose weights are large enough for its distributions to be far from uniform."""
    kind, settings = (CONFIGS | ODD)[name]
    config = getattr(transformers, kind)(vocab_size=262, pad_token_id=0, bos_token_id=None, eos_token_id=1, **settings)
    torch.manual_seed(seed)
    attention = "eager" if name == "gemma2" else "sdpa"
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return finish(module, byte_tokenizer(), dtype="fp32", lora=None, device="cpu", seed=0, source=name)


def kept_bytes(policy: LanguageModel, forward: Callable[[], Any]) -> int:
    """Bytes that a forward keeps for the backward pass, weights not counted."""
    weights = {w.untyped_storage().data_ptr() for w in policy.module.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), policy.autocast():
        forward()
    return sum(x.untyped_storage().nbytes() for address, x in saved.items() if address not in weights)


def ids(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids as a turn holds them."""
    return np.array(values, np.int64)


def episode(*turns: tuple[list[int], list[int]], group: int = 0, reward: float = 0.0, logp: float | None = None) -> Episode:
    """An episode of (seen, did) pairs; with `logp`, as if each token had been sampled with that log-prob."""
    made = []
    for seen, did in turns:
        sampled = np.zeros(0 if logp is None else len(did), np.float32) + np.float32(logp or 0.0)
        made.append(Turn(ids(*seen), ids(*did), sampled, said=Message("assistant", "")))
    return Episode(Task((Message("user", ""),)), group, made, reward=reward)


def random_episodes(num: int, seed: int = 0, longest: int = 12) -> list[Episode]:
    """Episodes with prompts and answers of 1 to `longest` random tokens, groups of two, logp of a made-up sampler."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(num):
        seen, did = (rng.integers(2, 262, size=rng.integers(1, longest + 1)).tolist() for _ in range(2))
        made.append(episode((seen, did), group=i // 2, reward=float(rng.integers(0, 2)), logp=-1.0))
    return made
