"""Groups of scored episodes -> rows of data, in the columns that rlx/data/formats.py reads. Texts are kept, tokens are not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlx.types import ConfigError, Episode, Message

Rows = list[dict[str, Any]]


def pairs(group: Sequence[Episode], margin: float) -> Rows:
    """The best and the worst answer, where their rewards differ by more than `margin`."""
    ranked = sorted(group, key=lambda e: -e.reward)
    return [pair(ranked[0], ranked[-1])] if len(ranked) > 1 and apart(ranked[0], ranked[-1], margin) else []


def all_pairs(group: Sequence[Episode], margin: float) -> Rows:
    """Every two answers whose rewards differ by more than `margin`."""
    ranked = sorted(group, key=lambda e: -e.reward)
    return [pair(better, worse) for better, worse in itertools.combinations(ranked, 2) if apart(better, worse, margin)]


def apart(better: Episode, worse: Episode, margin: float) -> bool:
    """Whether two answers differ by more than `margin`."""
    return better.reward - worse.reward > margin


def demonstrations(group: Sequence[Episode], _: float = 0.0) -> Rows:
    """Every answer, to be imitated."""
    return [{**asked(e), "completion": answered(e), "reward": e.reward} for e in group]


def best(group: Sequence[Episode], _: float = 0.0) -> Rows:
    """The best answer, to be imitated; of equal ones the first."""
    return demonstrations([max(group, key=lambda e: e.reward)])


# How a group of answers becomes rows; the number is the least difference of a pair.
FORMS: Mapping[str, Callable[[Sequence[Episode], float], Rows]] = {
    "pairs": pairs,
    "all_pairs": all_pairs,
    "demonstrations": demonstrations,
    "best": best,
}


def pair(better: Episode, worse: Episode) -> dict[str, Any]:
    """One preference."""
    return {
        **asked(better),
        "chosen": answered(better),
        "rejected": answered(worse),
        "chosen_reward": better.reward,
        "rejected_reward": worse.reward,
    }


def asked(episode: Episode) -> dict[str, Any]:
    """Prompt, answer and other columns of a task."""
    answer = {} if episode.task.answer is None else {"answer": episode.task.answer}
    return {**episode.task.meta, "prompt": [plain(m) for m in episode.task.prompt], **answer}


def answered(episode: Episode) -> list[dict[str, str]]:
    """What the policy said, and what was replied to it."""
    return [plain(m) for turn in episode.turns for m in (turn.said, *turn.replies) if m is not None]


def plain(message: Message) -> dict[str, str]:
    """A message as it stands in a file. Raises ConfigError for one with a picture."""
    if message.images:
        raise ConfigError("a message with a picture cannot be written as a row of text")
    return {"role": message.role, "content": message.text}


def jsonl(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows to a file, one JSON object a line: beside it first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
    beside.replace(path)
