"""A language model as the judge of two answers, asked in both orders, because it prefers a place as well as an answer."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from rlx.types import Backend, Component, ConfigError, Episode, Message

PROMPT = """Here are a conversation and two possible continuations of it by an assistant. {criterion}

[Conversation]
{prompt}

[The start of answer A]
{first}
[The end of answer A]

[The start of answer B]
{second}
[The end of answer B]

Say why in a sentence or two. Do not let the order or the length of the answers decide. Then close with one line: [[A]] if
answer A is better, [[B]] if answer B is better, [[C]] if they are equally good."""
PLACES = ("first", "second")
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}


def judge(
    episodes: list[Episode],
    *,
    llm: Component[Backend],
    criterion: str = "Which one is more helpful, more honest and less harmful?",
    prompt: str = PROMPT,
    swap: bool = True,
) -> list[float]:
    """The share of the other answers of its group that an answer beats: from 0 to 1, 0.5 for a tie; nan: no verdict on it.

    Each pair is shown twice, in both orders, and the two verdicts are averaged (position bias: Zheng et al. 2023, arXiv
    2306.05685, section 3.4; averaged orders: RLAIF, Lee et al. 2023, arXiv 2309.00267, section 2.1). So a judge that always
    prefers the first place makes only ties. A pair of which a verdict could not be read counts for neither answer. Equal
    answers tie, and the judge is not asked. A group of one has nothing to be compared with: nan.

    llm: a language model that is asked. criterion: what decides. prompt: the question, in which {criterion}, {prompt},
    {first} and {second} are filled in; the last of [[A]], [[B]], [[C]] in its answer is the verdict. swap: False asks in one
    order only, half as often.

    Raises ConfigError where the prompt shows not both answers.
    """
    if absent := [place for place in PLACES if f"{{{place}}}" not in prompt]:
        raise ConfigError(f"reward judge: prompt: it has no {{{absent[0]}}}, so the judge would not see both answers")
    pairs = [(i, j) for i, j in itertools.combinations(range(len(episodes)), 2) if said(episodes[i]) != said(episodes[j])]
    shown = [order for i, j in pairs for order in ([(i, j), (j, i)] if swap else [(i, j)])]
    asked = [question(episodes[a], episodes[b], criterion, prompt) for a, b in shown]
    verdicts = dict(zip(shown, (verdict(texts[0]) for texts in llm.call(asked)), strict=True)) if asked else {}
    won = {pair: preference(verdicts[pair], verdicts.get(pair[::-1])) for pair in pairs}
    return win_rates(len(episodes), won)


def question(first: Episode, second: Episode, criterion: str, prompt: str = PROMPT) -> list[Message]:
    """What the judge is asked of two answers to one prompt."""
    values = {"criterion": criterion, "prompt": conversation(first), "first": said(first), "second": said(second)}
    return [Message("user", re.sub(r"\{(criterion|prompt|first|second)\}", lambda match: values[match[1]], prompt))]


def conversation(episode: Episode) -> str:
    """The prompt as text: a lone message as it is, several with who says them."""
    messages = episode.task.prompt
    return messages[0].text if len(messages) == 1 else "\n\n".join(f"{m.role}: {m.text}" for m in messages)


def said(episode: Episode) -> str:
    """The answer as text; of several turns, with what was replied to them."""
    if len(episode.turns) == 1:
        return episode.completion
    talk = [m for turn in episode.turns for m in (turn.said, *turn.replies) if m is not None]
    return "\n\n".join(f"{m.role}: {m.text}" for m in talk)


def verdict(text: str) -> float:
    """1 where the first answer is better, 0 where the second is, 0.5 for a tie; nan where the text does not say."""
    found = re.findall(r"\[\[\s*([ABC])\s*\]\]", text)
    return VERDICTS[found[-1]] if found else math.nan


def preference(one: float, other: float | None = None) -> float:
    """How much the first of two answers is preferred, from the verdict on it and on the two in the other order."""
    return one if other is None else (one + 1 - other) / 2


def win_rates(n: int, won: dict[tuple[int, int], float]) -> list[float]:
    """The mean preference of each of `n` answers over the others.

    `won` maps a pair (i, j) to how much i is preferred to j; nan does not count, and a pair that is not there is a tie.
    """
    found = []
    for i in range(n):
        pairs: Sequence[float] = [won.get((i, j), 1 - won.get((j, i), 0.5)) for j in range(n) if j != i]
        known = [p for p in pairs if not math.isnan(p)]
        found.append(sum(known) / len(known) if known else math.nan)
    return found
