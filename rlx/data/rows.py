"""Episodes -> rows of a file that rlx reads again (see rlx.data.formats)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlx.types import Episode, Message

PLAIN = (str, int, float, bool)


def row_of(episode: Episode) -> dict[str, Any]:
    """The conversation as `prompt` and `completion` (of several turns: `messages`), with all that is plain beside it.

    That is the columns of the task, what the sampler noted, the role and the reward; images and tokens are not. The answer is
    the task's, or where it has none, what the sampler noted as one.
    """
    noted = {k: v for k, v in {**episode.task.meta, **episode.info}.items() if isinstance(v, PLAIN)}
    gold = {} if episode.task.answer is None else {"answer": episode.task.answer}
    beside = {**noted, **gold, "agent": episode.agent, "reward": episode.reward}
    prompt = [_plain(m) for m in episode.task.prompt]
    if not episode.turns:
        return {**beside, "prompt": prompt}
    if len(episode.turns) == 1:
        return {**beside, "prompt": prompt, "completion": episode.completion}
    talk = [m for turn in episode.turns for m in (*((turn.said,) if turn.said else ()), *turn.replies)]
    return {**beside, "messages": [*prompt, *map(_plain, talk)]}


def write(path: Path, episodes: Iterable[Episode]) -> None:
    """A file with one row a line: beside it first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(json.dumps(row_of(e), ensure_ascii=False) + "\n" for e in episodes), encoding="utf-8")
    beside.replace(path)


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.text}
