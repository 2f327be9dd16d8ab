"""A reward model that the recipe itself has trained, as a reward."""

from __future__ import annotations

import torch

from rlx.types import ConfigError, Episode, TextPolicy


@torch.no_grad()
def model_score(episodes: list[Episode], *, model: TextPolicy, head: str = "score", shift: float = 0.0) -> list[float]:
    """What a head of a model of the stage says of each conversation, minus `shift`, in units of its own.

    model: its name among the stage's `models`, such as `{rm: "@rm"}`. The conversation is encoded by that model's own
    tokenizer and chat template, as the pairs were that it was trained on; a completion that the token limit cut has no end
    token. shift: scores of a Bradley-Terry model have no zero; the mean score of demonstrations is a good one (Stiennon et
    al. 2020, arXiv 2009.01325, section 3.4).

    Raises ConfigError where the model has no such head.
    """
    if head not in model.offers:
        raise ConfigError(f"reward model_score: the model has no head {head!r}; it offers {', '.join(sorted(model.offers))}")
    batch = model.collate([model.tokenize(episode) for episode in episodes])
    found = model.forward(batch, {head})[head]
    return [float(x) - shift for x in found.tolist()]
