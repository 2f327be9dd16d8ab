"""How the sequences of a batch are split into parts that a forward takes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlx.models.layout import common, num_ids
from rlx.types import Batch, Ids


def blocks(batch: Batch, *, whole_groups: bool) -> list[list[int]]:
    """The sequences that stay together, as indices: those of a group, or each by itself."""
    if not whole_groups:
        return [[i] for i in range(len(batch.inputs))]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(batch["group"].tolist()):
        members.setdefault(group, []).append(i)
    return list(members.values())


def by_length(batch: Batch, whole: Sequence[list[int]]) -> list[list[int]]:
    """Blocks by their longest sequence."""
    return sorted(whole, key=lambda block: (max(batch.inputs[i].length for i in block), block[0]))


def padded_parts(batch: Batch, token_budget: int, *, whole_groups: bool) -> list[list[int]]:
    """Parts of at most `token_budget` padded tokens, of similar length, so that little is padding.

    A part has at least one sequence, or with `whole_groups` one group, however long that is.
    """
    found: list[list[int]] = []
    prompt = answer = 0
    for block in by_length(batch, blocks(batch, whole_groups=whole_groups)):
        inputs = [batch.inputs[i] for i in block]
        wide, long = max(x.prompt for x in inputs), max(x.length - x.prompt for x in inputs)
        both = max(prompt, wide), max(answer, long)
        if found and sum(both) * (len(found[-1]) + len(block)) <= token_budget:
            found[-1] += block
            prompt, answer = both
        else:
            found.append(list(block))
            prompt, answer = wide, long
    return found


def packed_parts(batch: Batch, token_budget: int, *, whole_groups: bool, key: float) -> list[list[int]]:
    """Parts of at most `token_budget` tokens, of which those that sequences of a group share count once.

    The keys of what is shared, which each of these sequences holds, count `key` of a token each (see `memory.of_key`).
    A group that has more by itself is cut, unless `whole_groups`; a part has at least one sequence, or one such group.
    """
    ids = [x.ids for x in batch.inputs]
    found: list[list[int]] = []
    used = 0
    for block in by_length(batch, blocks(batch, whole_groups=True)):
        for piece in [block] if whole_groups else cut(ids, block, token_budget, key):
            size = num_ids([ids[i] for i in piece], key)
            if found and used + size <= token_budget:
                found[-1] += piece
                used += size
            else:
                found.append(list(piece))
                used = size
    return found


def cut(ids: Sequence[Ids], block: Sequence[int], token_budget: int, key: float) -> Iterator[list[int]]:
    """Pieces of a block of at most `token_budget` ids; what a whole piece begins with counts once, and `key` for each of it."""
    piece: list[int] = []
    total = shared = 0
    for i in block:
        begins = min(shared, common(ids[piece[0]], ids[i])) if piece else len(ids[i])
        more = key * (len(piece) + 1) - len(piece)  # for each id that all begin with
        if piece and total + len(ids[i]) + more * begins > token_budget:
            yield piece
            piece, total, begins = [], 0, len(ids[i])
        piece.append(i)
        total += len(ids[i])
        shared = begins
    yield piece
