"""Heads: linear functions of a model's hidden states that make it a critic or a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rlx.types import Batch

FILE = "heads.safetensors"


class Number(nn.Linear):
    """A linear function that computes in float32, whatever its weights and its input are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., 1)."""
        bias = self.bias.float() if self.bias is not None else None
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class Heads(nn.Module):
    """One number for each state that a head reads. `where` maps a head's name to what it reads (HEADS in rlx/types.py).

    Weights are drawn from `seed` with a standard deviation of 1 / sqrt(hidden + 1). A head of the last position has no
    bias, as in transformers' sequence classifiers: only differences of scores mean something. `drawn` are the heads that no
    checkpoint has replaced.
    """

    def __init__(self, where: Mapping[str, str], hidden: int, seed: int) -> None:
        super().__init__()
        self.where = dict(where)
        self.drawn = set(where)
        draw = torch.Generator().manual_seed(seed)
        self.linear = nn.ModuleDict({name: Number(hidden, 1, bias=at != "last") for name, at in self.where.items()})
        for name, weight in self.linear.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=(hidden + 1) ** -0.5, generator=draw)

    def load(self, folder: Path) -> None:
        """Take the heads of the same name from a checkpoint, and its only head where this model has only one.

        So a critic starts from the reward model's head.
        """
        from safetensors.torch import load_file

        saved = load_file(folder / FILE)
        names = {key.split(".")[1] for key in saved}
        if len(names) == 1 == len(self.where):
            (old,), (new,) = names, self.where
            saved = {key.replace(f".{old}.", f".{new}."): value for key, value in saved.items()}
        self.load_state_dict(saved, strict=False)
        self.drawn -= {key.split(".")[1] for key in saved}

    @torch.no_grad()
    def begin(self, bias: float) -> None:
        """Have the heads that were drawn, and have a bias, say about `bias` at first."""
        for name, weight in self.linear.named_parameters():
            if name.endswith("bias") and name.removesuffix(".bias") in self.drawn:
                weight.fill_(bias)

    def save(self, folder: Path) -> None:
        """Write the heads beside a model, with what each reads."""
        from safetensors.torch import save_file

        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / FILE, metadata=self.where)

    def forward(self, hidden: Tensor, around: Tensor, batch: Batch, length: Tensor, want: set[str]) -> dict[str, Tensor]:
        """What each head of `want` says of states `hidden` (...,D).

        `around` (N,T+1) are the places among them (in order) of the state before each position and, last, of that after the
        last. `length` (N,) is the number of positions of each sequence after its prompt.
        """
        turn, turns = batch["turn"][:, : around.shape[1] - 1], batch["turn_mask"].shape[1]
        found = {}
        for name, at in self.where.items():
            if name not in want:
                continue
            x = self.linear[name](hidden).flatten()[around]
            if at == "token":
                found[name] = x[:, :-1]
            elif at == "last":
                found[name] = x.gather(1, length[:, None])[:, 0]
            else:
                found[name] = x.gather(1, ends(turn, turns, last=at == "after_turn") + int(at == "after_turn"))
        return found


def saved_heads(folder: Path) -> dict[str, str]:
    """What the heads of a checkpoint read, by name; none where it has none."""
    from safetensors import safe_open

    if not (folder / FILE).is_file():
        return {}
    with safe_open(folder / FILE, framework="pt") as file:
        return dict(file.metadata() or {})


def ends(turn: Tensor, count: int, *, last: bool) -> Tensor:
    """The first or last position of each turn: (N,count) from the field `turn` (N,T); 0 for a turn without a position."""
    at = torch.arange(turn.shape[1], device=turn.device)
    found = []
    for k in range(count):
        own = turn == k
        edge = torch.where(own, at, -1).amax(1) if last else torch.where(own, at, turn.shape[1]).amin(1)
        found.append(torch.where(own.any(1), edge, 0))
    return torch.stack(found, 1)
