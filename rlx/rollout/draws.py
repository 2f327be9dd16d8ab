"""One token a row from its logits, by inverse CDF on a given uniform."""

from __future__ import annotations

import torch
from torch import Tensor

from rlx.types import Sampling

BLOCK = 128  # ids whose probabilities are added up before the one that is drawn is looked for among them


def draw(logits: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob (R,). logits (R,V), noise (R,) float64 uniforms.

    The log-prob is under softmax(logits / temperature) before anything is cut, or at temperature 1 for greedy decoding.
    """
    scaled = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        scaled = scaled / sampling.temperature
    if sampling.temperature == 0.0:
        top, token = scaled.max(-1)
        return token, top - scaled.logsumexp(-1)
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    logz = weights.sum(-1, dtype=torch.float64).log().float() + top[:, 0]
    token = inverse_cdf(cut(weights, sampling), noise)
    return token, scaled.gather(-1, token[:, None])[:, 0] - logz


def inverse_cdf(weights: Tensor, noise: Tensor) -> Tensor:
    """The first id up to which more than noise (R,) of the weights (R,V) lies, in ids of a weight above 0: (R,).

    Sums of blocks find the block, and a running sum within it the id: a running sum over all ids is slow, no sort is needed.
    """
    rows, ids = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -ids % BLOCK)).view(rows, -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = ends[:, -1:]
    goal = torch.minimum(noise[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # below it, when rounded, too
    block = torch.searchsorted(ends, goal, right=True)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    sums = inside.double().cumsum(-1)
    at = torch.searchsorted(sums, goal - before, right=True)
    last = BLOCK - 1 - (inside > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(at, last))[:, 0]


def cut(weights: Tensor, sampling: Sampling) -> Tensor:
    """Weights (R,V), proportional to probabilities, with 0 for what is not drawn.

    In this order: all but the `top_k` largest; of what is left, all past the `top_p` mass (nucleus; Holtzman et al. 2020); all
    below `min_p` times the largest (Nguyen et al. 2024).
    """
    if sampling.top_k:
        floor = weights.topk(min(sampling.top_k, weights.shape[-1]), -1).values[:, -1:]
        weights = torch.where(weights < floor, 0.0, weights)
    if sampling.top_p < 1.0:
        order = weights.sort(-1, descending=True)
        sums = order.values.cumsum(-1)
        likelier = sums - order.values  # mass of the tokens before it
        left = torch.where(likelier < sampling.top_p * sums[:, -1:], order.values, 0.0)
        weights = torch.zeros_like(weights).scatter(-1, order.indices, left)
    if sampling.min_p:
        weights = torch.where(weights < sampling.min_p * weights.amax(-1, keepdim=True), 0.0, weights)
    return weights
