"""Evaluation metrics: groups of scored episodes -> one number.

The first parameter says which rollouts a metric reads: `greedy` holds one episode a task (temperature 0), `sampled`
several. `episode.reward` is the verifier's score; an episode is right at 1 (to 1e-6) and unscorable at nan, where it is
left out. A metric of nothing is nan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from rlx.rewards import answers
from rlx.types import ConfigError, Episode, Status

NAN = float("nan")


def accuracy(greedy: list[list[Episode]]) -> float:
    """Share of the tasks whose one greedy answer is right."""
    return _mean(_right_share(group) for group in greedy)


def sampled_accuracy(sampled: list[list[Episode]]) -> float:
    """Share of the samples of a task that are right, averaged over tasks (avg@n)."""
    return _mean(_right_share(group) for group in sampled)


def mean_reward(sampled: list[list[Episode]]) -> float:
    """Mean reward of the samples of a task, averaged over tasks."""
    return _mean(_mean(episode.reward for episode in _scored(group)) for group in sampled)


def pass_at(sampled: list[list[Episode]], *, k: int) -> float:
    """Probability that one of k samples is right, averaged over tasks.

    Unbiased from n >= k samples, c of them right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1). A task that has
    fewer than k scored samples left is left out. Raises ConfigError if a task has fewer than k samples at all.
    """
    _need("pass", sampled, k)

    def chance(group: list[Episode]) -> float:
        scored = _scored(group)
        n, c = len(scored), sum(map(_right, scored))
        return NAN if n < k else 1.0 - math.comb(n - c, k) / math.comb(n, k)

    return _mean(chance(group) for group in sampled)


def maj_at(sampled: list[list[Episode]], *, k: int) -> float:
    """Share of the tasks on which the most frequent answer among the first k samples is right.

    Answers are found by `answers.extract` and counted as equal if they are the same number or the same normalised text;
    a sample without an answer does not vote, and a task without votes is wrong. Where answers tie, the value is that of
    drawing one of them at random. Raises ConfigError if a task has fewer than k samples.
    """
    _need("maj", sampled, k)
    return _mean(_majority(_scored(group[:k])) for group in sampled)


def length(greedy: list[list[Episode]]) -> float:
    """Mean number of tokens that the policy produced in an episode."""
    return _mean(float(episode.num_tokens) for group in greedy for episode in group)


def wrong_length(sampled: list[list[Episode]]) -> float:
    """Mean number of tokens of the wrong samples."""
    return _mean(float(episode.num_tokens) for group in sampled for episode in _scored(group) if not _right(episode))


def excess_length(sampled: list[list[Episode]]) -> float:
    """Mean number of tokens of the wrong samples minus that of the right ones; nan where there are none of a kind."""
    right = _mean(float(episode.num_tokens) for group in sampled for episode in _scored(group) if _right(episode))
    return wrong_length(sampled) - right


def truncated(sampled: list[list[Episode]]) -> float:
    """Share of the samples that the token limit cut."""
    return _mean(float(episode.status is Status.TRUNCATED) for group in sampled for episode in group)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, `successes` of `n` (Wilson 1927); (0, 1) for n = 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: successes have to be from 0 to n = {n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share, shrink = successes / n, 1.0 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1.0 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# --------------------------------------------------------------------------- parts
def _right(episode: Episode) -> bool:
    return episode.reward >= 1.0 - 1e-6


def _scored(group: list[Episode]) -> list[Episode]:
    return [episode for episode in group if not math.isnan(episode.reward)]


def _right_share(group: list[Episode]) -> float:
    return _mean(float(_right(episode)) for episode in _scored(group))


def _majority(voters: list[Episode]) -> float:
    if not voters:
        return NAN
    votes: dict[str, list[float]] = defaultdict(list)
    for episode in voters:
        answer = answers.extract(episode.completion)
        if answer is not None:
            votes[answers.canonical(answer)].append(float(_right(episode)))
    most = max(map(len, votes.values()), default=0)
    return _mean(_mean(rights) for rights in votes.values() if len(rights) == most) if votes else 0.0


def _need(name: str, sampled: list[list[Episode]], k: int) -> None:
    fewest = min(map(len, sampled), default=k)
    if k < 1 or fewest < k:
        raise ConfigError(f"metric {name}@{k}: needs k >= 1 and at least k samples of each task, got {fewest} samples")


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are not nan; nan if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else NAN
