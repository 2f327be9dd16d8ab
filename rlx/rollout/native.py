"""The embedded engine: batched decoding with any language model of transformers, with exact log-probs of what it samples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlx.models.language import LanguageModel
from rlx.rollout.noise import uniforms
from rlx.types import Message, Sampling, Turn, View


def generate(policy: LanguageModel, views: list[View], keys: list[list[int]], sampling: Sampling) -> list[list[Turn]]:
    """`len(keys[i])` next turns of each view; views are decoded together while they have at most `sampling.rows` samples.

    Raises ValueError for a prefix that leaves no room for an id after it.
    """
    if long := [len(view.prefix) for view in views if len(view.prefix) >= sampling.max_new_tokens]:
        raise ValueError(f"a turn of at most {sampling.max_new_tokens} ids cannot go on after a prefix of {long[0]}")
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
    inverse CDF on uniforms that depend on a sample's key and the position in the turn alone. A view's prefix counts among
    the turn's `max_new_tokens` ids; the Turn has those after it. `logp` is that of the tokens under
    softmax(logits / temperature) before top-k and top-p (which cut the tail of what is drawn, not what is scored), or at
    temperature 1 for greedy decoding: what the training forward computes.
    """
    owner = np.repeat(np.arange(len(views)), [len(k) for k in keys])
    rows = torch.from_numpy(owner).to(policy.device)
    noise = torch.from_numpy(uniforms([k for row in keys for k in row], sampling.max_new_tokens)).to(policy.device)
    ends = torch.tensor(policy.end_ids, device=policy.device)
    begun = torch.tensor([len(view.prefix) for view in views], device=policy.device)[rows]
    reader = policy.reader(views, sampling.max_new_tokens)
    given = pad_sequence([torch.from_numpy(ids) for ids in reader.ahead], batch_first=True).to(policy.device)[rows]
    ahead = torch.tensor([len(ids) for ids in reader.ahead], device=policy.device)[rows]
    if any(len(k) != 1 for k in keys):
        reader.keep(rows)
    alive = torch.arange(len(rows), device=policy.device)
    did = torch.zeros(len(rows), sampling.max_new_tokens, dtype=torch.long, device=policy.device)
    logp = torch.zeros(did.shape, device=policy.device)
    length = torch.zeros(len(rows), dtype=torch.long, device=policy.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=policy.device)
    for t in range(sampling.max_new_tokens):
        at = (t - ahead + begun)[alive]  # the position in the turn
        token, token_logp = draw(reader.logits, noise[alive, at], sampling)
        if t < given.shape[1]:
            token = torch.where(t < ahead[alive], given[alive, t], token)
        did[alive, t], logp[alive, t], length[alive] = token, token_logp, t + 1
        ended[alive] = torch.isin(token, ends) & (t >= ahead[alive])
        left = (~ended[alive] & (at + 1 < sampling.max_new_tokens)).nonzero()[:, 0]
        if len(left) == 0:
            break
        if len(left) < len(alive):
            alive, token = alive[left], token[left]
            reader.keep(left)
        reader.read(token)
    own = [slice(int(a), int(b)) for a, b in zip(ahead, length, strict=True)]
    turns = to_turns(policy, views, owner, did.cpu().numpy(), logp.cpu().numpy(), own, ended.cpu().numpy())
    starts = np.cumsum([0, *(len(k) for k in keys)]).tolist()
    return [turns[a:b] for a, b in itertools.pairwise(starts)]


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


def to_turns(
    policy: LanguageModel, views: list[View], owner: Any, did: Any, logp: Any, own: list[slice], ended: Any
) -> list[Turn]:
    """One Turn a sampled row; `own` are the columns that it drew."""
    texts = policy.tokenizer.batch_decode([did[i, own[i]] for i in range(len(owner))], skip_special_tokens=True)
    return [
        Turn(
            seen=views[owner[i]].ids,
            did=did[i, own[i]].copy(),
            logp=logp[i, own[i]].copy(),
            said=Message("assistant", texts[i]),
            info={"truncated": not ended[i]},
        )
        for i in range(len(owner))
    ]
