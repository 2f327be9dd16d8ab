"""The forward on rows of equal length: for what cannot be packed. Prompts are padded on the left, answers on the right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlx.types import HEADS, Batch, Tokens

if TYPE_CHECKING:
    from rlx.models.heads import Heads
    from rlx.models.language import LanguageModel

# Up to so many logits (a gibibyte in float32), their log-softmax is taken at once.
LARGEST = 2**28


def forward(policy: LanguageModel, batch: Batch, want: set[str], temperature: float) -> dict[str, Tensor]:
    """The fields of `want` that the policy offers, with any transformers model; logp and entropy are 0 where nobody acted.

    The language-model head runs on the scored columns alone, through the model's own `logits_to_keep`, which applies
    whatever the architecture does to logits. Without heads, the last column is only predicted, never read.
    """
    inputs: list[Tokens] = batch.inputs
    width = max(x.length - x.prompt for x in inputs)
    prompt = max(x.prompt for x in inputs)
    ids = torch.full((len(inputs), prompt + width), int(policy.tokenizer.pad_token_id))
    attend = torch.zeros_like(ids)
    acted = torch.zeros(len(inputs), width, dtype=torch.bool)
    for i, x in enumerate(inputs):
        span = slice(prompt - x.prompt, prompt - x.prompt + x.length)
        ids[i, span] = torch.from_numpy(x.ids)
        attend[i, span] = 1
        acted[i, : len(x.acted)] = torch.from_numpy(x.acted)
    ids, attend = ids.to(policy.device), attend.to(policy.device)
    heads = policy.heads if policy.heads is not None and want & set(policy.heads.where) else None
    spoken = bool(want & {"logp", "entropy"})
    read = prompt + width - (heads is None)
    settings = {**policy.reading(ids[:, :read], attend[:, :read], [x.images for x in inputs]), "use_cache": False}
    fields: dict[str, Tensor] = {}
    hidden: Tensor
    if spoken:
        with policy.autocast():
            keep = width + (heads is not None)
            out = policy.module(**settings, logits_to_keep=keep, output_hidden_states=heads is not None)
        of_all = token_fields(out.logits[:, :width], ids[:, prompt:], temperature, entropy="entropy" in want)
        fields = {name: torch.where(acted.to(x.device), x, 0.0) for name, x in of_all.items()}
        if heads is not None:
            hidden = out.hidden_states[-1]
    elif heads is not None:
        with policy.autocast():
            hidden = policy.backbone(**settings).last_hidden_state
    if heads is not None:
        length = torch.tensor([x.length - x.prompt for x in inputs], device=policy.device)
        fields |= heads(hidden, columns(hidden, prompt), batch, length, want)
    return {name: widened(x, name, batch, policy.heads) for name, x in fields.items() if name in want}


def columns(hidden: Tensor, start: int) -> Tensor:
    """Where the states before and after each position are among those of padded rows (N,L,D): (N,L-start+1)."""
    num, length = hidden.shape[:2]
    first = torch.arange(num, device=hidden.device)[:, None] * length
    return first + torch.arange(start - 1, length, device=hidden.device)


def token_fields(
    logits: Tensor, ids: Tensor, temperature: float, *, entropy: bool, largest: int = LARGEST
) -> dict[str, Tensor]:
    """logp (and entropy) (N,T) of `ids` (N,T) under softmax(logits / temperature), in float32, from logits (N,T,V).

    More than `largest` logits are taken in spans of positions, computed once more in the backward pass, so that the
    float32 copies that a softmax needs exist for one span at a time.
    """

    def span(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        scaled = logits.float() / temperature
        logz = scaled.logsumexp(-1)
        logp = scaled.gather(-1, ids[..., None])[..., 0] - logz
        return (logp, logz - (scaled.softmax(-1) * scaled).sum(-1)) if entropy else (logp,)

    if logits.numel() <= largest:
        return dict(zip(("logp", "entropy"), span(logits, ids), strict=False))
    width = max(1, largest // (logits.shape[0] * logits.shape[2]))
    spans = zip(torch.split(logits, width, dim=1), torch.split(ids, width, dim=1), strict=True)
    parts = [checkpoint(span, *part, use_reentrant=False, preserve_rng_state=False) for part in spans]
    return {name: torch.cat(x, dim=1) for name, x in zip(("logp", "entropy"), zip(*parts, strict=True), strict=False)}


def widened(x: Tensor, name: str, batch: Batch, heads: Heads | None) -> Tensor:
    """A field of a part of a batch at the width of the whole batch: T positions, or the K turns of a head that reads turns."""
    if x.dim() == 1:
        return x
    of_turns = heads is not None and HEADS[heads.where.get(name, "token")] == "N,K"
    return torch.nn.functional.pad(x, (0, batch["turn_mask" if of_turns else "mask"].shape[1] - x.shape[1]))
