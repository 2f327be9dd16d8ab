"""Prompts and tags of a policy that proposes questions, solves them and judges both, and how its tags are read.

What a model writes is text and nothing else: it is searched, compared and put into prompts, never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SCORE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*/\s*([0-9]{1,9}))?")


@dataclass(frozen=True)
class Wording:
    """What each role is told, with {question} and {answer} to fill in, and the tags that it answers in."""

    propose: str
    refer: str
    solve: str
    rate_question: str
    rate_answer: str
    question: str = "question"
    answer: str = "answer"
    score: str = "score"


# One letter a role: for models of a million weights, which read a byte at a time.
LETTERS = Wording("P:", "P:{question}", "S:{question}", "Q:{question}", "J:{question}={answer}", "q", "a", "s")

_ASK = "It has to be solvable from what it says, clear, and hard for a strong solver. Write it as <question>...</question>."
_RATE = "Think first, then write one whole number from 1 to 10 as <score>...</score>."
# In words: the rubrics of Multi-Agent Evolve (arXiv 2510.23595) in short.
RUBRIC = Wording(
    propose=f"Propose a new question. {_ASK}",
    refer=f"Propose a new question in the manner of this one, not the same:\n{{question}}\n{_ASK}",
    solve="{question}\nReason step by step, then write the final answer as <answer>...</answer>.",
    rate_question=(
        "Rate this question.\n{question}\n1 to 3: unsolvable, contradictory or too open. 4 to 7: ambiguous. "
        f"8 to 10: clear, self-contained and solvable. {_RATE}"
    ),
    rate_answer=(
        "Rate the answer to this question.\nQuestion: {question}\nAnswer: {answer}\n1 to 3: any error of fact, logic or "
        "arithmetic, or filler. 4 to 7: right, but incomplete or badly formed. 8 to 10: without fault and to the point. "
        f"{_RATE}"
    ),
)
WORDINGS = {"letters": LETTERS, "rubric": RUBRIC}


def tagged(text: str, tag: str) -> str | None:
    """What stands between the first <tag> and the next </tag>, stripped; None where there is nothing."""
    _, opened, rest = text.partition(f"<{tag}>")
    found, closed, _ = rest.partition(f"</{tag}>")
    return found.strip() or None if opened and closed else None


def form(text: str, tag: str) -> float:
    """1 for exactly one closed tag, 0.5 for more of them in balance, else 0 (counted in the response alone)."""
    opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
    if opened != closed or tagged(text, tag) is None:
        return 0.0
    return 1.0 if opened == 1 else 0.5


def score(text: str, tag: str) -> float | None:
    """The judge's mark s of 1 to 10 as clip((s - 1) / 9, 0, 1); None where none can be read.

    It is the first number in the tag; "7/10" is 7, and "3/5" is 6 of 10.
    """
    found = _SCORE.search(tagged(text, tag) or "")
    if found is None or (found[2] is not None and not int(found[2])):
        return None
    mark = float(found[1]) if found[2] is None else 10 * float(found[1]) / int(found[2])
    return min(1.0, max(0.0, (mark - 1) / 9))


def mean_score(texts: Sequence[str], tag: str) -> float:
    """The mean of the marks that can be read, each in [0, 1]; 0.5 where none can."""
    found = [mark for mark in (score(text, tag) for text in texts) if mark is not None]
    return sum(found) / len(found) if found else 0.5
