"""A stub: answers that were written down."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlx.types import ConfigError, Message


def rules(
    conversations: Sequence[Sequence[Message]],
    *,
    answers: dict[str, str],
    otherwise: str = "",
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    r"""The answer of the first regular expression that is found in a conversation's last message, else `otherwise`.

    answers: expression -> answer, tried in order; `\1` in an answer is what the expression's first group matched. All `n`
    texts are the same, and `temperature`, `max_new_tokens` and `seed` change nothing. Raises ConfigError for an expression
    or an answer that is none.
    """
    try:
        known = [(re.compile(pattern, re.DOTALL), answer) for pattern, answer in answers.items()]
        return [[_answer(talk[-1].text if talk else "", known, otherwise)] * n for talk in conversations]
    except re.error as error:
        raise ConfigError(f"llm 'rules': not a regular expression or its answer: {error.pattern!r}: {error}") from error


def _answer(text: str, known: Sequence[tuple[re.Pattern[str], str]], otherwise: str) -> str:
    found = ((pattern.search(text), answer) for pattern, answer in known)
    return next((match.expand(answer) for match, answer in found if match), otherwise)
