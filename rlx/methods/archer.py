"""ArCHer (Zhou et al. 2024, arXiv 2402.19446): an off-policy critic of utterances, whose advantage trains the tokens.

A turn's state s is the conversation before it, its action a the whole utterance. Twin critics Q(s, a) and V(s) learn from a
buffer; the policy learns from utterances drawn afresh at the buffer's states. Offline nothing is drawn: V is an
`expectile_value` of the data's utterances, and the policy imitates them by `advantage_weighted`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlx.tensors import inside


def utterance_td(
    q: Tensor,
    target_v: Tensor,
    turn_reward: Tensor,
    turn_done: Tensor,
    fresh: Tensor,
    turn_mask: Tensor,
    *,
    gamma: float = 0.95,
) -> Tensor:
    """(Q(s_k, a_k) - [r_k + gamma (1 - done_k) V'(s_k+1)])^2: (N,K), in squared units of reward (section 3.2).

    V' is a target network's. An utterance after which there is no turn has nothing to bootstrap from. A freshly drawn
    utterance was never answered: 0. Use it twice, `read`ing q2 and target_v2, for the twin.
    """
    stored = turn_mask & ~fresh[:, None]
    ahead = torch.nn.functional.pad(inside(target_v, turn_mask)[:, 1:], (0, 1))  # 0 after the last turn
    target = turn_reward + gamma * (1 - turn_done) * ahead
    return (inside(q, stored) - inside(target, stored)).square()


def value_of_fresh(v: Tensor, target_q: Tensor, fresh: Tensor, turn_mask: Tensor) -> Tensor:
    """(V(s_k) - Q'(s_k, a))^2 at utterances a freshly drawn from the policy: (N,K), in squared units of reward (section 3.2).

    So V follows the policy of now, although the buffer holds the utterances of earlier ones. Q' is a target network's.
    """
    drawn = turn_mask & fresh[:, None]
    return (inside(v, drawn) - inside(target_q, drawn)).square()


def utterance_advantage(
    critic_q: Tensor,
    critic_q2: Tensor,
    critic_v: Tensor,
    critic_v2: Tensor,
    fresh: Tensor,
    turn: Tensor,
    turn_mask: Tensor,
    mask: Tensor,
    turn_done: Tensor,
    *,
    of: Literal["fresh", "stored"] = "fresh",
    center: bool = False,
) -> Tensor:
    """A = min(Q, Q2)(s, a) - min(V, V2)(s) on every token of a freshly drawn utterance: (N,T), in units of reward (eq. 4).

    0 on the stored utterances: their policy is not the one in training. With `of: stored` it is the other way round: what
    `advantage_weighted` imitates is in the data. A fresh utterance that the token limit cut (`turn_done` is 0 on it) is as
    bad as the worst of the others: such utterances are rare in the buffer, so that their Q is a guess. `center` takes off the
    mean over these utterances: the twins differ more in Q than in V, so the difference of their minima is below 0 in the mean,
    and a policy that learns fast flees from all that it says.
    """
    chosen = (fresh if of == "fresh" else ~fresh)[:, None]
    own = turn_mask & chosen
    by_turn = inside(torch.minimum(critic_q, critic_q2) - torch.minimum(critic_v, critic_v2), own)
    cut = own & fresh[:, None] & (turn_done == 0)
    if (own & ~cut).any():
        by_turn = torch.where(cut, by_turn[own & ~cut].min(), by_turn)
    if center:
        by_turn = inside(by_turn - by_turn.sum() / own.sum().clamp(min=1), own)
    by_token = by_turn.gather(1, turn.clamp(min=0))
    return inside(by_token, mask & chosen)


def turn_returns(
    turn_reward: Tensor, turn_mask: Tensor, turn: Tensor, mask: Tensor, *, gamma: float = 1.0, baseline: bool = True
) -> Tensor:
    """A_k = G_k - mean of G_k over the batch, G_k = r_k + gamma G_k+1, on every token of turn k: (N,T), in units of reward.

    The reward-to-go of an utterance with a baseline for each turn of the episode: the on-policy control.
    """
    paid = inside(turn_reward, turn_mask)
    total = torch.zeros_like(paid[:, 0])
    columns = []
    for k in reversed(range(paid.shape[1])):
        total = paid[:, k] + gamma * total
        columns.append(total)
    earned = inside(torch.stack(columns[::-1], 1), turn_mask)
    if baseline:
        earned = earned - earned.sum(0) / turn_mask.sum(0).clamp(min=1)
    return inside(earned.gather(1, turn.clamp(min=0)), mask)
