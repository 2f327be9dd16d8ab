"""Rewards on an answer that is written in sections, each opened by a heading: is all there, does it name what there is.

They are those of PeBR-R1 (arXiv 2509.13031): perception is paid by what the description of an image says, reasoning by
the answer that the last section holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlx.types import ConfigError, DataError, Episode


def section(text: str, begin: str, end: str | None) -> str:
    """What stands between `begin` and the next `end` (None: the end of the text), stripped; "" where either is missing."""
    _, found, rest = text.partition(begin)
    inside, closed, _ = rest.partition(end) if end is not None else (rest, True, "")
    return inside.strip() if found and closed else ""


def sections(episodes: list[Episode], *, headings: list[str]) -> list[float]:
    """1 where every heading occurs in the completion, else 0."""
    return [float(all(heading in episode.completion for heading in headings)) for episode in episodes]


def keyword_recall(
    episodes: list[Episode],
    *,
    column: str = "keywords",
    begin: str | None = None,
    end: str | None = None,
    whole_words: bool = False,
) -> list[float]:
    """Share of the row's keywords that the completion names, whatever their case; 0 where the row has none.

    column: the row's column with the list of keywords. begin, end: headings; only what stands between them is read (the
    authors' code reads the whole completion, in which keywords can be dumped anywhere). whole_words: "red" does not stand
    in "bored". Raises DataError: no such column, or not a list of texts in it.
    """

    def named(keyword: str, text: str) -> bool:
        if whole_words:
            return re.search(rf"(?<!\w){re.escape(keyword.lower())}(?!\w)", text) is not None
        return keyword.lower() in text

    def recall(episode: Episode) -> float:
        text = (episode.completion if begin is None else section(episode.completion, begin, end)).lower()
        keywords = listed(episode, column, "keyword_recall")
        return sum(named(keyword, text) for keyword in keywords) / len(keywords) if keywords else 0.0

    return [recall(episode) for episode in episodes]


def length_limit(episodes: list[Episode], *, limit: int) -> list[float]:
    """1 up to `limit` tokens, then limit / n, n the tokens of the completion. Raises ConfigError: a limit below 1."""
    if limit < 1:
        raise ConfigError(f"reward length_limit: limit: expected at least 1 token, got {limit}")
    return [min(1.0, limit / max(1, episode.num_tokens)) for episode in episodes]


def listed(episode: Episode, column: str, reward: str) -> Sequence[str]:
    """The texts in a column of the episode's row. Raises DataError."""
    found = episode.task.meta.get(column)
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        got = "no such column" if found is None else repr(found)[:40]
        raise DataError(f"reward {reward}: group {episode.group}, column {column!r}: expected a list of texts, got {got}")
    return found
