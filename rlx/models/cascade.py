"""Attention of rows that are decoded: keys and values are never expanded, and a prompt's are read once for all its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from rlx.models.cache import SharedCache


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, shared: SharedCache, layer: int
) -> Tensor:
    """Of query (R,H,T,D) to the rows' own key and value (R,K,W,D), and to the prompts that `shared` stores apart: (R,T,H,D).

    mask (R,1,T,W) is 0 where a row attends and FAR elsewhere. The H/K queries that read the same keys stand below each other,
    as if they were more positions: a mask would make transformers expand the keys to H heads.
    """
    rows, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    query = query.reshape(rows, key.shape[1], -1, width).to(key.dtype)
    if length > 1:
        mask = mask.repeat(1, 1, query.shape[2] // length, 1)
    with torch.autocast(query.device.type, enabled=False):
        if shared.prompts:
            out = over_prompts(query, key, value, mask, scale, shared, layer)
        else:
            out = scaled_dot_product_attention(query, key, value, mask.to(query.dtype), scale=scale)
    return out.reshape(rows, heads, length, width).transpose(1, 2)


def over_prompts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, shared: SharedCache, layer: int
) -> Tensor:
    """Attention of rows to their prompts and to what they hold themselves, (R,K,Q,D) as the query.

    All rows of a prompt read its keys (K,P,D) together, so that these go through the memory once and not once a row, and the
    two parts are merged by their log-sum-exp (cascade attention; Juravsky et al. 2024, arXiv 2402.05099).
    """
    prompt_key, prompt_value = (x[: len(shared.grid)] for x in shared.prompts[layer])  # (U,K,P,D)
    if prompt_key.shape[1] != key.shape[1]:  # of a layer that repeats its keys once they are stored (JetMoE)
        raise NotImplementedError("keys are stored for other heads than they are read for")
    where, column = shared.cell
    together = query[shared.grid].transpose(1, 2).flatten(2, 3)  # (U,K,M*Q,D)
    out, lse = part(together, prompt_key, prompt_value, shared.prompt_mask, scale)
    samples, queries = shared.grid.shape[1], query.shape[2]
    out = out.view(*out.shape[:2], samples, queries, -1)[where, :, column]
    lse = lse.view(*lse.shape[:2], samples, queries)[where, :, column]
    own, own_lse = part(query, key, value, mask, scale)
    return torch.lerp(own, out.to(own.dtype), torch.sigmoid(lse - own_lse)[..., None].to(own.dtype))


def part(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of (B,K,Q,D) to (B,K,S,D) and the log-sum-exp of the scores (B,K,Q), in float32; mask (B,1,1 or Q,S)."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        return out, lse
    return by_products(query, key, value, mask, scale)


def by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`part` as two matrix products, on any device: with few queries a key, scores are smaller than keys."""
    a, b = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    product = torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, torch.float32)
    scores = product.view(*query.shape[:3], -1) * scale + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse
