"""The forward on sequences packed into one row: what they share is read once, and nothing is padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlx.memory import LARGEST
from rlx.models.attention import adopt, shareable
from rlx.models.layout import Row, pack
from rlx.types import Batch, Ids, Tokens, View

if TYPE_CHECKING:
    from rlx.models.language import LanguageModel


def forward(policy: LanguageModel, batch: Batch, want: set[str], temperature: float) -> dict[str, Tensor]:
    """The fields of `want` that the policy offers. The language-model head reads the states before scored positions alone.

    Positions at which nobody acted (`Tokens.acted`) have logp and entropy 0. The last id of a sequence is only predicted,
    never read, but for heads.
    """
    inputs: list[Tokens] = batch.inputs
    heads = policy.heads if policy.heads is not None and want & set(policy.heads.where) else None
    row = pack([x.ids if heads else x.ids[: max(1, x.length - 1)] for x in inputs], policy.device)
    with policy.autocast():
        hidden = states(policy.backbone, row)
    fields: dict[str, Tensor] = {}
    if want & {"logp", "entropy"}:
        fields = spoken(policy, batch, row, hidden, temperature, entropy="entropy" in want)
    if heads is not None:
        length = torch.tensor([x.length - x.prompt for x in inputs], device=policy.device)
        fields |= heads(hidden, around(batch, row).to(policy.device), batch, length, want)
    return {name: x for name, x in fields.items() if name in want}


def states(backbone: Any, row: Row) -> Tensor:
    """The last hidden states of a row (T,D)."""
    unused = row.ids.new_zeros(1, 1, 1, 1)  # a mask of four dimensions is handed on as it is: none is made of the positions
    read = {"input_ids": row.ids, "position_ids": row.positions, "attention_mask": unused, "layout": row.layout}
    return backbone(**read, use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]


def around(batch: Batch, row: Row) -> Tensor:
    """Where the states before and after each field position are in the row: (N,T+1), any place where there is none."""
    places = np.zeros((len(batch.inputs), batch["mask"].shape[1] + 1), np.int64)
    for i, x in enumerate(batch.inputs):
        places[i, : x.length - x.prompt + 1] = row.places[i][x.prompt - 1 :]
    return torch.from_numpy(places)


def spoken(
    policy: LanguageModel, batch: Batch, row: Row, hidden: Tensor, temperature: float, *, entropy: bool
) -> dict[str, Tensor]:
    """logp (and entropy) (N,T) of the acted positions, 0 elsewhere, from the states (L,D) of a row."""
    num, width = batch["mask"].shape
    at = [np.flatnonzero(x.acted) for x in batch.inputs]
    before = np.concatenate([row.places[i][x.prompt - 1 + at[i]] for i, x in enumerate(batch.inputs)])
    ids = np.concatenate([x.ids[x.prompt + at[i]] for i, x in enumerate(batch.inputs)])
    cells = np.concatenate([i * width + columns for i, columns in enumerate(at)])
    order = np.argsort(before, kind="stable")  # a state that comes before several sequences' ids is read once
    distinct, of = np.unique(before[order], return_inverse=True)
    to = torch.from_numpy(cells[order]).to(policy.device)
    with policy.autocast():
        found = token_fields(policy, hidden, distinct, of, ids[order], temperature, entropy=entropy)
    return {name: x.new_zeros(num * width).scatter(0, to, x).view(num, width) for name, x in found.items()}


def token_fields(
    policy: LanguageModel,
    hidden: Tensor,
    distinct: Ids,
    of: Ids,
    ids: Ids,
    temperature: float,
    *,
    entropy: bool,
    largest: int | None = None,
) -> dict[str, Tensor]:
    """logp (and entropy) (M,) of `ids` (M,), float32, under softmax(head(state) / temperature).

    hidden (L,D), `distinct` (S,) the states that are read, `of` (M,) which of these comes before each id, in order. More
    than `largest` logits are taken in parts, computed once more in the backward pass.
    """
    head = policy.module.get_output_embeddings()

    def part(hidden: Tensor, of: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = head(hidden).float()
        logits = logits if temperature == 1.0 else logits / temperature
        if not entropy:
            return (LogProb.apply(logits, of, ids),)  # type: ignore[no-untyped-call]
        scores = torch.log_softmax(logits, -1)  # one pass over memory
        return scores[of, ids], -(scores.exp() * scores).sum(-1)[of]

    size = max(1, (largest or LARGEST) // policy.module.config.get_text_config().vocab_size)
    parts = []
    for start in range(0, max(1, len(distinct)), size):
        begin, end = np.searchsorted(of, [start, start + size])
        tensors = distinct[start : start + size], of[begin:end] - start, ids[begin:end]
        read, mine, said = (torch.from_numpy(x).to(policy.device) for x in tensors)
        given = hidden.index_select(0, read), mine, said
        once = len(distinct) <= size
        parts.append(part(*given) if once else checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False))
    return {name: torch.cat(x) for name, x in zip(("logp", "entropy"), zip(*parts, strict=True), strict=False)}


class LogProb(torch.autograd.Function):
    """log softmax(logits)[of, ids]: logits (S,V), of and ids (M,) -> (M,). Its gradient takes the memory of the result.

    By logits[s], of M ids with gradients g: onehot(ids) g, summed over those of s, less softmax(logits[s]) times their sum.
    Autograd would write two more tensors of S x V for it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, of: Tensor, ids: Tensor) -> Tensor:
        """The log-probs."""
        scores = torch.log_softmax(logits, -1)
        ctx.save_for_backward(scores, of, ids)
        return scores[of, ids]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """By the logits; the saved log-probs become it, so that torch raises where a graph is gone through twice."""
        (g,) = gradients
        scores, of, ids = ctx.saved_tensors
        total = g.new_zeros(len(scores)).index_add_(0, of, g)
        found = scores.exp_().mul_(-total[:, None])
        return found.index_put_((of, ids), g, accumulate=True), None, None


@torch.no_grad()
def packable(policy: LanguageModel) -> bool:
    """Whether the policy's sequences can be packed: two that share a prefix are read as one row, and as they are alone.

    Makes `attention` the module's own if so. The comparison sees what no list of architectures would: an attention that
    takes no layout, positions that are not given, logits that are more than the head's, keys that are changed once they are
    stored. It holds for what `SharedReader` reads as well.
    """
    if not shareable(policy.base):
        return False
    config = policy.base.config
    before = config._attn_implementation
    adopt(policy.base)
    ids = [np.arange(n) % config.vocab_size for n in (20, 24)]
    ids[1][18:] = ids[1][18:][::-1]
    row = pack(ids, policy.device)
    try:
        found = policy.module.get_output_embeddings()(states(policy.backbone, row))
        whole = [torch.from_numpy(x)[None].to(policy.device) for x in ids]
        alone = [policy.module(input_ids=x, attention_mask=torch.ones_like(x), use_cache=False).logits[0] for x in whole]
        same = all(alike(found[places], want, 1e-3) for places, want in zip(row.places, alone, strict=True))
        for apart in (False, True):
            last = torch.stack([want[-1] for want in alone for _ in range(2)])
            same = same and alike(decoded(policy, ids, apart=apart), last, 0.05 if policy.bf16 else 1e-3)
    except torch.OutOfMemoryError:  # says nothing of the attention
        raise
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError):
        same = False
    if not same:
        config._attn_implementation = before
    return same


def alike(logits: Tensor, wanted: Tensor, share: float) -> bool:
    """Whether two differ by no more than a share of the largest."""
    return torch.allclose(logits.float(), wanted.float(), rtol=0.0, atol=share * float(wanted.abs().max()))


def decoded(policy: LanguageModel, sequences: list[Ids], *, apart: bool) -> Tensor:
    """Logits (2N,V) after the last id of each sequence, twice, where its last two are read one by one as rollouts are."""
    from rlx.models.shared import SharedReader

    reader = SharedReader(policy, [View(ids[:-2]) for ids in sequences], [2] * len(sequences), 2, apart)
    for last in (-2, -1):
        reader.read(torch.tensor([ids[last] for ids in sequences for _ in range(2)]))
    return reader.logits
