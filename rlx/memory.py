"""How much memory a stage of the real model takes, from the sizes of the model and of its batches alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from rlx.types import ConfigError

# Bytes a scored position takes for each entry of the vocabulary: five float32 copies of its logits are alive at the peak
# of forward and backward (of packed sequences, where the entropy is wanted).
TRAINED_LOGIT = 20
# Where sequences are packed, up to so many logits (a quarter of a gibibyte in float32) exist at once; more are computed once
# more in the backward pass.
LARGEST = 2**26
# Bytes a sampled row takes for each entry of the vocabulary: logits and log-probs in float32, probabilities and their
# cumulative sum in float64.
SAMPLED_LOGIT = 24


@dataclass(frozen=True)
class Sizes:
    """What the memory of a model depends on. `cached` is the width of keys and values: kv_heads x head_dim.

    `recomputes`: its layers are computed once more in the backward pass (activation checkpointing).
    """

    weights: int
    trained: int
    layers: int
    hidden: int
    ffn: int
    cached: int
    vocabulary: int
    context: int | None
    bf16: bool
    recomputes: bool = False


def sizes(model: Any) -> Sizes:
    """The sizes of a model; `models.load.outline` makes one that takes no memory itself.

    Of a small network, which has no layers of tokens, the weights alone count.
    """
    weights = list(model.module.parameters())
    total, trained = sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)
    if not hasattr(model, "render"):
        return Sizes(total, trained, layers=0, hidden=0, ffn=0, cached=0, vocabulary=0, context=None, bf16=False)
    config = model.module.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Sizes(
        weights=total,
        trained=trained,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        cached=kv_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocabulary=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None),
        bf16=model.bf16,
        recomputes=model.recomputes,
    )


def states(model: Sizes, reference: Sizes | None) -> int:
    """Bytes of what stays: float32 weights, gradient and two AdamW moments where trained, the frozen reference's weights.

    4 weights + (4 + 8) trained + 4 reference; bfloat16 computes with a copy of the weights, 2 bytes each.
    """
    copies = 2 * model.weights if model.bf16 else 0
    return 4 * model.weights + 12 * model.trained + copies + (4 * reference.weights if reference else 0)


def divided_states(model: Sizes, reference: Sizes | None, stage: int, ranks: int) -> int:
    """The same on each of several ranks, under a stage of ZeRO.

    Whole weights on every rank: it samples with them. With bfloat16 they have 2 bytes each (from stage 1 on), and the
    optimiser's copy 4. Divided among ranks: from stage 1 the optimiser's 12 bytes (its weights and two moments; 8 in stage
    0), from stage 2 the gradient's 4; in stage 3 a second copy of the weights, which is trained.
    """
    optimiser = (12 if stage else 8) * model.trained
    parts = [(rollout_copy(model, stage) * (stage == 3), 3), (4 * model.trained, 2), (optimiser, 1)]
    shared = sum(math.ceil(size / ranks) if stage >= divided else size for size, divided in parts)
    return shared + rollout_copy(model, stage) + (4 * reference.weights if reference else 0)


def rollout_copy(model: Sizes, stage: int) -> int:
    """Bytes of the whole weights that each rank samples with."""
    return (2 if model.bf16 and stage > 0 else 4) * model.weights


def in_ranks(model: Sizes, reference: Sizes | None, stage: int, ranks: int, *, offloaded: bool = False) -> list[str]:
    """What stays on each rank, in words; the reference not where it is `offloaded`.

    Raises ConfigError where the whole weights exceed a GPU: they are read in float32.
    """
    copy, stays = rollout_copy(model, stage), divided_states(model, None if offloaded else reference, stage, ranks)
    room = min((torch.cuda.mem_get_info(i)[1] for i in range(torch.cuda.device_count())), default=None)
    if room is not None and 4 * model.weights > room:
        raise ConfigError(
            f"launch: each rank samples with whole weights, {amount(4 * model.weights)} when they are read, and a GPU has "
            f"{amount(room)}; take a smaller model; vLLM divides them where it "
            "samples (rollout=vllm_server), but a rank needs them whole to hand them over"
        )
    away = f"; {in_host(reference)} for each of them" if reference and offloaded else ""
    return [f"each of {ranks} ranks: {amount(stays)} stay, {amount(copy)} of them the whole weights to sample with{away}"]


def in_host(reference: Sizes) -> str:
    """Where an offloaded reference is, in words."""
    return f"reference {amount(4 * reference.weights)} in the host's memory"


def activations(model: Sizes, tokens: int) -> int:
    """Bytes that the backward needs of one unit of `tokens` tokens, padding counted: layers x tokens x (40 hidden + 4 b ffn).

    With activation checkpointing, each layer's input in float32 and the layer that is computed once more:
    tokens x (4 layers hidden + 40 hidden + 4 b ffn).

    The tensors that a Llama-like decoder layer saves: 10 of the hidden width in float32 (norms, queries, keys and values at
    full heads, the attention's output, the residual stream) and 4 of the feed-forward's in the compute type (b bytes: 4, or
    2 with bf16). Attention weights are not kept (sdpa); dense layers.
    """
    layer = tokens * (40 * model.hidden + 4 * (2 if model.bf16 else 4) * model.ffn)
    return model.layers * tokens * 4 * model.hidden + layer if model.recomputes else model.layers * layer


def of_key(model: Sizes) -> float:
    """What one more key and value in each layer takes, as a share of what a token does: of those that are packed, each
    sequence holds the keys of what it shares with others."""
    held = 1 if model.recomputes else model.layers
    return held * 2 * model.cached * (2 if model.bf16 else 4) / activations(model, 1)


def logits(model: Sizes, scored: int) -> int:
    """Bytes of the logits of `scored` positions that exist at once, padding counted: scored x vocabulary x 20."""
    return scored * model.vocabulary * TRAINED_LOGIT


def rollouts(model: Sizes, rows: int, tokens: int) -> int:
    """Bytes of `rows` sequences of `tokens` tokens that are decoded together: 2 layers x cached x b of cache a token, and
    the vocabulary x 24 of the token that is drawn."""
    return rows * (2 * model.layers * model.cached * (2 if model.bf16 else 4) * tokens + model.vocabulary * SAMPLED_LOGIT)


def estimate(
    real: Sizes,
    reference: Sizes | None,
    *,
    rows: int,
    prompt: int,
    answer: int,
    budget: int,
    packs: bool = False,
    decoded: int = 0,
    together: int = 1,
    offloaded: bool = False,
) -> list[str]:
    """The largest batch of an optimiser step in units, and the memory of training on it, in words.

    `rows` sequences of `prompt` + `answer` tokens, all as long as the longest; `decoded` of them are sampled at a time, and
    as many as `together` stay in one unit, whatever the budget. Where the model `packs`, a unit has as many tokens as the
    budget, or as what stays in one has, and logits exist for some positions at a time. Rollouts and training take turns, so
    the peak is what stays and the larger of the two. A reference that is `offloaded` takes its turn as well, with the logits of
    a unit. Evaluations are not counted.
    """
    longest, stays = prompt + answer, states(real, None if offloaded else reference)
    if packs:
        unit = min(rows * longest, max(budget, together * longest))
        scored = min(unit, rows * answer, max(1, LARGEST // real.vocabulary))
        split = f"in packed units of at most {many(unit, 'token')}"
    else:
        each = min(rows, max(together, budget // longest))
        unit, scored = each * longest, each * answer
        split = f"= {many(math.ceil(rows / each), 'unit')} of at most {many(each, 'row')}"
    heads, layers = logits(real, scored), activations(real, unit)
    cache = rollouts(real, decoded, prompt + answer)
    asked = 4 * reference.weights + heads if reference and offloaded else 0
    parts = [
        f"weights, gradient, AdamW{', reference' if reference and not offloaded else ''} {amount(stays)}",
        f"a unit's logits {amount(heads)} and activations {amount(layers)}",
        *([f"rollouts of {decoded} rows {amount(cache)}"] if decoded else []),
        *([in_host(reference)] if reference and offloaded else []),
        f"at the peak {amount(stays + max(heads + layers, cache, asked))}",
    ]
    return [
        f"largest batch: {many(rows, 'row')} of {prompt} + {answer} tokens {split} (token_budget {budget})",
        f"memory of {real.weights:,} weights: {'; '.join(parts)}",
    ]


def machine() -> str:
    """What this machine has."""
    host = f"{amount(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} of memory"
    cards = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        cards.append(f"{torch.cuda.get_device_name(i)} with {amount(free)} of {amount(total)} free")
    return f"{host}, {', '.join(cards) or 'no GPU'}"


def amount(size: int) -> str:
    """Bytes in units of 1e9, or of 1e6 where they are few, one decimal."""
    return f"{size / 1e9:.1f} GB" if size >= 0.99995e9 else f"{size / 1e6:.1f} MB"


def many(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
