"""RLGF (Chang et al. 2023, arXiv 2306.11816): two models write an answer together, and the policy learns from its own part.

A roll-in of one model is cut at a switch point, and the other model rolls out the rest. In PPO++ the guide rolls in, so
that the policy starts from the guide's states. In AggreVaTeD the guide rolls out, so that its critic says what the guide
would get after each of the policy's tokens. PPO is PPO++ without a roll-in.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlx.rollout.noise import key, uniforms
from rlx.rollout.samplers import answer
from rlx.types import ConfigError, Episode, Ids, Message, Play, Sampling, Status, TextPolicy, Turn, View

Scheme = Literal["ppo_plus_plus", "aggrevated", "lols", "d2lols"]
Talk = tuple[Message, ...]


def guided(
    play: Play,
    rows: list[Episode],
    n: int,
    *,
    guide: TextPolicy,
    scheme: Scheme = "ppo_plus_plus",
    beta: float = 0.8,
    tau: float = 0.8,
    guide_top_p: float = 1.0,
    guide_top_k: int = 0,
    fixed_length: bool = False,
) -> list[Episode]:
    """Answers of one turn that one model begins and the other ends.

    | scheme        | rolls in | rolls out |
    |---------------|----------|-----------|
    | ppo_plus_plus | guide    | policy    |
    | aggrevated    | policy   | guide     |
    | lols          | a step is ppo_plus_plus with probability `tau`, else aggrevated |
    | d2lols        | the first `tau` steps are aggrevated, the others ppo_plus_plus  |

    With probability `beta`, a roll-in of n ids is cut after L, uniform on 1..n-1; else L = 0. Streams of Turn.token:
    `by_guide` says who wrote an id (only the policy's are trained on), `critic_mask` what the policy rolled out, after
    which returns are the policy's, `guide_critic_mask` what the guide did, after which they are the guide's, and
    `string_mask` all. With beta 0, ppo_plus_plus plays what the sampler `plain` plays.

    With `fixed_length`, every answer has `max_new_tokens` ids, and an end token is one like any other. Without, an end token
    of the policy's roll-in in aggrevated is never among the ids that are trained on: the policy may learn to end at once,
    which costs it nothing, since the guide then writes the whole answer.

    Raises ConfigError: probabilities out of range; a guide with another vocabulary.
    """
    if not 0 <= beta <= 1 or (scheme == "lols" and not 0 <= tau <= 1):
        raise ConfigError(f"guided: beta, and tau of lols, are probabilities from 0 to 1; got {beta} and {tau}")
    episodes = [Episode(row.task, row.group) for row in rows for _ in range(n)]
    envs = [play.make_env() for _ in episodes]
    talks = [tuple(env.reset(e.task)) for env, e in zip(envs, episodes, strict=True)]
    guide_first = guide_rolls_in(play, scheme, tau)
    sampling = replace(play.sampling, ignore_eos=fixed_length)
    players = Player(play.policy, sampling), Player(guide, replace(sampling, top_p=guide_top_p, top_k=guide_top_k))
    begins, ends = players[::-1] if guide_first else players

    def draws(kind: int) -> list[int]:
        return [key(*play.seed, kind, e.group, i % n) for i, e in enumerate(episodes)]

    nothing = np.zeros(0, np.int64)
    coins, own = uniforms(draws(2), 2), draws(1)
    chosen = np.flatnonzero(coins[:, 0] < beta).tolist()
    rolled_in = begins.write([talks[i] for i in chosen], [nothing] * len(chosen), [own[i] for i in chosen])
    begun = {i: head(turn, switch(len(turn.did), coins[i, 1])) for i, turn in zip(chosen, rolled_in, strict=True)}
    first = [begun.get(i) for i in range(len(episodes))]
    rolled_out = ends.write(talks, [nothing if turn is None else turn.did for turn in first], draws(0))
    seen = {talk: play.policy.render(talk) for talk in dict.fromkeys(talks)}
    for episode, env, talk, a, b in zip(episodes, envs, talks, first, rolled_out, strict=True):
        turn = spliced(play.policy, seen[talk], a, b, guide_first=guide_first)
        answer(episode, env, list(talk), turn)
        if episode.status is Status.RUNNING:
            raise ConfigError("guided: the environment goes on after an answer; its episodes have to be of one turn")
        episode.info |= {"switch": len(turn.did) - len(b.did), "max_new_tokens": play.sampling.max_new_tokens}
    ids = episodes[0].turns[0].did
    if guide.pieces(ids) != play.policy.pieces(ids):
        raise ConfigError("guided: the guide has another vocabulary than the policy; neither can go on from the other's ids")
    return episodes


guided.streams = ("by_guide", "critic_mask", "guide_critic_mask", "string_mask")  # type: ignore[attr-defined]


def guide_rolls_in(play: Play, scheme: Scheme, tau: float) -> bool:
    """Whether this step is one of PPO++; steps count from 1."""
    coin = uniforms([key(*play.seed, 3)], 1)[0, 0]
    return {"ppo_plus_plus": True, "aggrevated": False, "lols": bool(coin < tau), "d2lols": play.step > tau}[scheme]


def switch(n: int, u: float) -> int:
    """L, uniform on 1..n-1 for a uniform `u` in [0, 1); 0 for a roll-in of one id."""
    return 1 + int(u * (n - 1)) if n > 1 else 0


class Player(NamedTuple):
    """One of the two that write, and how it decodes."""

    model: TextPolicy
    sampling: Sampling

    def write(self, talks: Sequence[Talk], prefixes: Sequence[Ids], keys: Sequence[int]) -> list[Turn]:
        """A turn for each conversation, forced to begin with its prefix. Equal views are read once."""
        seen = {talk: self.model.render(talk) for talk in dict.fromkeys(talks)}
        groups: dict[tuple[Talk, bytes], list[int]] = {}
        for i, (talk, prefix) in enumerate(zip(talks, prefixes, strict=True)):
            groups.setdefault((talk, prefix.tobytes()), []).append(i)
        views = [View(seen[talk], prefix=prefixes[members[0]]) for (talk, _), members in groups.items()]
        played = self.model.act(views, [[keys[i] for i in members] for members in groups.values()], self.sampling)
        turns = dict(zip(itertools.chain(*groups.values()), itertools.chain(*played), strict=True))
        return [turns[i] for i in range(len(talks))]


def head(turn: Turn, length: int) -> Turn:
    """The first `length` ids of a turn."""
    return replace(turn, did=turn.did[:length], logp=turn.logp[:length])


def spliced(policy: TextPolicy, seen: Ids, first: Turn | None, rest: Turn, *, guide_first: bool) -> Turn:
    """One turn of what both have written, with who wrote what."""
    first = first or head(rest, 0)
    did = np.concatenate([first.did, rest.did])
    rolled_out = np.arange(len(did)) >= len(first.did)
    by_guide = rolled_out ^ guide_first
    return Turn(
        seen=seen,
        did=did,
        logp=np.concatenate([first.logp, rest.logp]),
        said=Message("assistant", policy.decode(did)),
        token={
            "trained": ~by_guide,
            "by_guide": by_guide,
            "critic_mask": rolled_out & ~by_guide,
            "guide_critic_mask": rolled_out & by_guide,
            "string_mask": np.ones(len(did), bool),
        },
        info=dict(rest.info),
    )


# --------------------------------------------------------------------------- fields
def value_in_use(old_value: Tensor, old_guide_value: Tensor, guide_critic_mask: Tensor) -> Tensor:
    """The value of whoever rolls out: (N,T), the guide's critic where the guide wrote the end of the answer."""
    return torch.where(guide_critic_mask.any(-1, keepdim=True), old_guide_value, old_value)
