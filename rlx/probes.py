"""Completions made by hand that a reward has to tell apart, and what it pays for them: `rlx check --first-batch`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from rlx.data.formats import turn
from rlx.models.language import LanguageModel
from rlx.report.tables import Table, text
from rlx.types import Component, Episode, Message, Reward, Status

GOLD = "gold answer"


def completions(row: Episode, model: LanguageModel, limit: int) -> dict[str, Episode]:
    """Finished episodes of one task, by name: its gold answer (if it has one), nothing, its prompt again, a repetition.

    None is longer than `limit` tokens; one that would be is cut there, as a rollout is.
    """
    gold = {} if row.task.answer is None else {GOLD: str(row.task.answer)}
    texts = {**gold, "nothing": "", "prompt echoed": row.task.prompt[-1].text, "repetition": "the " * limit}
    made = {}
    for name, said in texts.items():
        episode = model.tokenize(Episode(row.task, row.group, [turn(said)], Status.FINISHED))
        only = episode.turns[0]
        if len(only.did) > limit:
            only.did = only.did[:limit]
            only.said, episode.status = Message("assistant", model.decode(only.did)), Status.TRUNCATED
        episode.info = {"max_new_tokens": limit}
        made[name] = episode
    return made


def table(rewards: Sequence[Component[Reward]], made: Mapping[str, Episode], played: list[Episode], label: str) -> list[str]:
    """What each reward paid for the completions `made` by hand, and the mean over the rollouts `played` that it scored.

    A note stands below for each completion that is paid as much as the gold answer.
    """
    names = [reward.name for reward in rewards]
    rows = [[name, e.num_tokens, *(e.rewards[k] for k in names), e.reward] for name, e in made.items()]
    scored = [e for e in played if not math.isnan(e.reward)]
    if scored:
        paid = [fmean(e.rewards[k] for e in scored) for k in names]
        rows.append([label, fmean(e.num_tokens for e in scored), *paid, fmean(e.reward for e in scored)])
    body = [[str(name), *(f"{x:.4g}" for x in numbers)] for name, *numbers in rows]
    gold = made[GOLD].reward if GOLD in made else math.inf
    notes = [
        f"note: {name!r} is paid as much as the gold answer" for name, e in made.items() if name != GOLD and e.reward >= gold
    ]
    return text(Table("", ["rewards of", "tokens", *names, "total"], body, notes=notes)).splitlines()
