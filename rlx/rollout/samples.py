"""What the engine knows of each sample that it decodes, beside what the model has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlx.rollout.noise import uniforms
from rlx.types import Floats, Ids, Sampling, View


class Job(NamedTuple):
    """A view and the keys of its samples, which begin together."""

    view: View
    keys: list[int]


@dataclass
class Samples:
    """Of N samples, in the order in which they begin, each of one of `views`.

    noise (N,L): a uniform for each position of the turn. begun, ahead (N,): ids of the turn that are given, and how many of
    them the reader has yet to read, `given` (N,A). token, logp (N,L): the turn so far. steps, ended (N,): ids read or drawn so
    far, and whether the last ends the turn. tail (N,B): the last ids, where a stop string is looked for.
    """

    views: list[View]
    noise: Tensor
    begun: Tensor
    ahead: Tensor
    given: Tensor
    token: Tensor
    logp: Tensor
    steps: Tensor
    ended: Tensor
    tail: Tensor

    @classmethod
    def of(cls, jobs: Sequence[Job], ahead: Sequence[Ids], sampling: Sampling, device: torch.device) -> Samples:
        """Samples that have not begun; `ahead` are the ids of each job that the reader has yet to read."""
        rows = torch.from_numpy(np.repeat(np.arange(len(jobs)), [len(job.keys) for job in jobs])).to(device)
        num, longest = len(rows), sampling.max_new_tokens
        window = max((len(stop.encode()) for stop in sampling.stop), default=0)
        return cls(
            views=[job.view for job in jobs for _ in job.keys],
            noise=torch.from_numpy(uniforms([k for job in jobs for k in job.keys], longest)).to(device),
            begun=torch.tensor([len(job.view.prefix) for job in jobs], device=device)[rows],
            ahead=torch.tensor([len(ids) for ids in ahead], device=device)[rows],
            given=pad_sequence([torch.from_numpy(ids) for ids in ahead], batch_first=True).to(device)[rows],
            token=torch.zeros(num, longest, dtype=torch.int32, device=device),
            logp=torch.zeros(num, longest, device=device),
            steps=torch.zeros(num, dtype=torch.long, device=device),
            ended=torch.zeros(num, dtype=torch.bool, device=device),
            tail=torch.full((num, window), -1, device=device),
        )

    def stopped(self, policy: Any, alive: Tensor, token: Tensor, own: Tensor, stop: Sequence[str]) -> Tensor:
        """Whether the text of the ids so far, `token` the last, ends in or just after a stop string: (R,) bool.

        Each id has a byte of text or more, so that as many ids as the longest stop string has bytes hold what is new. A token
        that is given, not the sample's `own` (R,), is no part of that text.
        """
        tail = torch.where(own[:, None], torch.cat([self.tail[alive, 1:], token[:, None]], 1), self.tail[alive])
        self.tail[alive] = tail
        texts = policy.tokenizer.batch_decode([[i for i in row if i >= 0] for row in tail.tolist()])
        return torch.tensor([any(s in text for s in stop) for text in texts], device=token.device)

    def said(self, over: Sequence[int]) -> list[tuple[Ids, Floats, bool]]:
        """Of each sample that is over: its ids after the view's prefix, their log-probs, and whether the last ends the turn."""
        rows = torch.tensor(over, device=self.steps.device)
        length, begun = (self.steps - self.ahead + self.begun)[rows].tolist(), self.begun[rows].tolist()
        token, logp = self.token[rows].long().cpu().numpy(), self.logp[rows].cpu().numpy()
        whole = self.ended[rows].tolist()
        return [
            (token[i, a:b].copy(), logp[i, a:b].copy(), whole[i]) for i, (a, b) in enumerate(zip(begun, length, strict=True))
        ]
