"""The embedded engine: batched decoding with any causal transformers model, with exact log-probs of what it samples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.models.language import LanguageModel
from rlx.rollout.noise import uniforms
from rlx.types import ConfigError, Message, Sampling, Turn, View


def generate(policy: LanguageModel, views: list[View], keys: list[list[int]], sampling: Sampling) -> list[list[Turn]]:
    """`len(keys[i])` next turns of each view; views are decoded together while they have at most `sampling.rows` samples."""
    played: list[list[Turn]] = []
    start = 0
    while start < len(views):
        end, rows = start + 1, len(keys[start])
        while end < len(views) and rows + len(keys[end]) <= sampling.rows:
            rows += len(keys[end])
            end += 1
        played += decode(policy, views[start:end], keys[start:end], sampling)
        start = end
    return played


@torch.inference_mode()
def decode(policy: LanguageModel, views: list[View], keys: list[list[int]], sampling: Sampling) -> list[list[Turn]]:
    """`len(keys[i])` next turns of each view; a turn's `info["truncated"]` says that the limit cut it.

    Each view is read once and its cache repeated for its samples; a finished row leaves the batch. Draws are by
    inverse CDF on uniforms that depend on a sample's key and the position alone. `logp` is that of the tokens under
    softmax(logits / temperature) before top-k and top-p (which cut the tail of what is drawn, not what is scored), or at
    temperature 1 for greedy decoding: what the training forward computes.
    """
    owner = np.repeat(np.arange(len(views)), [len(k) for k in keys])
    flat = [k for row in keys for k in row]
    noise = torch.from_numpy(uniforms(flat, sampling.max_new_tokens)).to(policy.device)
    ends = torch.tensor(policy.end_ids, device=policy.device)
    logits, cache, attend = prefill(policy, views, sampling.max_new_tokens)
    rows = torch.from_numpy(owner).to(policy.device)
    if any(len(k) != 1 for k in keys):
        cache.batch_select_indices(rows)
        logits, attend = logits[rows], attend[rows]
    alive = torch.arange(len(rows), device=policy.device)
    did = torch.zeros(len(rows), sampling.max_new_tokens, dtype=torch.long, device=policy.device)
    logp = torch.zeros(did.shape, device=policy.device)
    length = torch.zeros(len(rows), dtype=torch.long, device=policy.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=policy.device)
    for t in range(sampling.max_new_tokens):
        token, token_logp = draw(logits, noise[alive, t], sampling)
        did[alive, t], logp[alive, t], length[alive] = token, token_logp, t + 1
        stop = torch.isin(token, ends)
        ended[alive] = stop
        left = (~stop).nonzero()[:, 0]
        if len(left) == 0 or t + 1 == sampling.max_new_tokens:
            break
        if len(left) < len(alive):
            alive, token, attend = alive[left], token[left], attend[left]
            cache.batch_select_indices(left)
        attend = torch.nn.functional.pad(attend, (0, 1), value=1)
        with policy.autocast():
            logits = policy.module(
                input_ids=token[:, None],
                attention_mask=attend,
                position_ids=attend.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
    turns = to_turns(policy, views, owner, did.cpu().numpy(), logp.cpu().numpy(), length.cpu().numpy(), ended.cpu().numpy())
    starts = np.cumsum([0, *(len(k) for k in keys)]).tolist()
    return [turns[a:b] for a, b in itertools.pairwise(starts)]


def prefill(policy: LanguageModel, views: list[View], max_new_tokens: int) -> tuple[Tensor, Any, Tensor]:
    """Next-token logits (U,V), the key/value cache and the attention mask (U,P) of left-padded views.

    Raises ConfigError where a prompt and its answer do not fit into the model's context.
    """
    from transformers import DynamicCache

    prompts = [np.concatenate([view.ids, view.prefix]) for view in views]
    width = max(len(p) for p in prompts)
    room = getattr(policy.module.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and width + max_new_tokens > room:
        raise ConfigError(
            f"model {policy.source!r}: a prompt of {width} tokens and max_new_tokens={max_new_tokens} "
            f"exceed its context of {room}"
        )
    ids = torch.full((len(prompts), width), int(policy.tokenizer.pad_token_id))
    attend = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt)
        attend[i, width - len(prompt) :] = 1
    ids, attend = ids.to(policy.device), attend.to(policy.device)
    cache = DynamicCache(config=policy.module.config)
    with policy.autocast():
        out = policy.module(
            input_ids=ids,
            attention_mask=attend,
            position_ids=(attend.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **policy.image_inputs([view.images for view in views]),
        )
    return out.logits[:, -1], cache, attend


def draw(logits: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob. logits (R,V), noise (R,) uniforms."""
    scores = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), -1)
    if sampling.temperature == 0.0:
        token = scores.argmax(-1)
    else:
        probs = cut(scores.exp(), sampling).double()
        cdf = probs.cumsum(-1)
        token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, scores.gather(-1, token[:, None])[:, 0]


def cut(probs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (R,V) with all but the top-k, and all past the top-p mass, set to 0."""
    if sampling.top_k:
        floor = probs.topk(min(sampling.top_k, probs.shape[-1]), -1).values[:, -1:]
        probs = torch.where(probs < floor, 0.0, probs)
    if sampling.top_p < 1.0:
        order = probs.sort(-1, descending=True)
        before = order.values.cumsum(-1) - order.values  # mass of the likelier tokens
        probs = torch.zeros_like(probs).scatter(-1, order.indices, torch.where(before < sampling.top_p, order.values, 0.0))
    return probs


def to_turns(policy: LanguageModel, views: list[View], owner: Any, did: Any, logp: Any, length: Any, ended: Any) -> list[Turn]:
    """One Turn a sampled row."""
    texts = policy.tokenizer.batch_decode([did[i, : length[i]] for i in range(len(owner))], skip_special_tokens=True)
    return [
        Turn(
            seen=views[owner[i]].ids,
            did=did[i, : length[i]].copy(),
            logp=logp[i, : length[i]].copy(),
            said=Message("assistant", texts[i]),
            info={"truncated": not ended[i]},
        )
        for i in range(len(owner))
    ]
