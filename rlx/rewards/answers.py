r"""Final answers in text: find them, compare them.

Everything here works on text that a model wrote, so nothing is evaluated: a number is what one regular expression
matches, its value is an exact fraction, and its size is bounded before it is computed.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

How = Literal["auto", "boxed", "hash", "last_number", "whole"]

MAX_DIGITS = 400  # a number with more digits, or with a larger exponent of ten, equals nothing

_BRACES = re.compile(r"(?P<boxed>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_STATED = re.compile(r"\banswer(?: is:?|:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)")

_UNSIGNED = (
    r"(?:(?P<top>\d+) ?/ ?(?P<bottom>\d+)"
    r"|(?P<decimal>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE](?P<exponent>[-+]?\d+))?)"
)
_NUMBER = re.compile(r"(?:\\?\$ ?)?(?P<sign>[-+]?) ?(?:\\?\$)?" + _UNSIGNED + r"(?: ?\\?%| (?P<unit>[A-Za-z]{2,}))?", re.ASCII)
_IN_TEXT = re.compile(r"(?:(?<![\w)\]}])[-+\u2212])?\$?" + _UNSIGNED, re.ASCII)


# --------------------------------------------------------------------------- find
def extract(text: str, how: How = "auto") -> str | None:
    r"""Return the final answer of a completion, or None if there is none.

    `boxed`: the content of the last complete `\boxed{...}`. `hash`: the line after the last `####` (GSM8K).
    `last_number`: the last number. `whole`: all of the text. `auto` takes the first that there is of: boxed, hash, what
    follows the last "answer is" or "answer:" up to the end of the sentence, the text itself if it is a single word, the
    last number.
    """
    if how == "boxed":
        return _boxed(text)
    if how == "hash":
        return _hash(text)
    if how == "last_number":
        return _last_number(text)
    if how == "whole":
        return text.strip() or None
    for find in (_boxed, _hash, _stated, _single_word, _last_number):
        answer = find(text)
        if answer is not None:
            return answer
    return None


def extract_gold(answer: object) -> str:
    r"""Return a task's answer as text: a worked solution's `\boxed{...}` or `####` line, else all of it."""
    text = str(answer)
    return _boxed(text) or _hash(text) or text.strip()


def _boxed(text: str) -> str | None:
    opened: list[tuple[int, bool]] = []  # where each open brace's content starts, and whether \boxed opened it
    last = (-1, -1)  # start and end of the content
    for token in _BRACES.finditer(text):
        if token["boxed"] or token["open"]:
            opened.append((token.end(), bool(token["boxed"])))
        elif token["close"] and opened:
            start, is_boxed = opened.pop()
            if is_boxed:
                last = max(last, (start, token.start()))
    return text[slice(*last)].strip() or None


def _hash(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    return _first_line(after) if mark else None


def _stated(text: str) -> str | None:
    marks = list(_STATED.finditer(text))
    if not marks:
        return None
    line = _first_line(text[marks[-1].end() :].lstrip("* \t\r\n"))
    return _SENTENCE_END.split(line, maxsplit=1)[0].strip() or None if line else None


def _single_word(text: str) -> str | None:
    words = text.split()
    return words[0] if len(words) == 1 else None


def _last_number(text: str) -> str | None:
    numbers = [match[0] for match in _IN_TEXT.finditer(text)]
    return numbers[-1] if numbers else None


def _first_line(text: str) -> str | None:
    return text.strip().partition("\n")[0].strip() or None


# --------------------------------------------------------------------------- compare
def same_answer(a: str, b: str) -> bool:
    """Say whether two answers are equal: as numbers if both are numbers, else as normalised text."""
    same = same_number(a, b)
    return _plain(a).casefold() == _plain(b).casefold() if same is None else same


def same_number(a: str, b: str) -> bool | None:
    """Say whether two texts are the same number, exactly; None if one of them is not a number.

    Numbers are `1,234`, `-0.50`, `3/4`, `1e3`, with an ASCII or a typographic minus, in `$...$` or with a period after
    them. A currency sign and a percent sign are dropped (`50%` is 50, never 0.5). One word after a space is a unit
    (`18 dollars`): where both have one, the units must be equal, too. A number of more than 400 digits, or with an
    exponent beyond 400, equals nothing, not even itself.
    """
    left, right = _NUMBER.fullmatch(_plain(a)), _NUMBER.fullmatch(_plain(b))
    if left is None or right is None:
        return None
    units = {unit.casefold() for unit in (left["unit"], right["unit"]) if unit}
    value = _value(left)
    return value is not None and value == _value(right) and len(units) < 2


def canonical(text: str) -> str:
    """Return one spelling for all answers that are equal: what votes are counted by."""
    match = _NUMBER.fullmatch(_plain(text))
    value = _value(match) if match else None
    return _plain(text).casefold() if value is None else str(value)


def _plain(text: str) -> str:
    """Return the text without the marks around it: white space, `$`, `*`, a final period."""
    text = text.replace("\u2212", "-").strip().rstrip(".").strip("$* \t\r\n").rstrip(".")
    return " ".join(text.split())


def _value(number: re.Match[str]) -> Fraction | None:
    """Return the value of a match of `_NUMBER`; None where it is too long or divides by zero."""
    exponent = number["exponent"] or "0"
    if len(number[0]) > MAX_DIGITS or abs(int(exponent)) > MAX_DIGITS:
        return None
    if number["decimal"]:
        value = Fraction(number["decimal"].replace(",", "")) * Fraction(10) ** int(exponent)
    elif int(number["bottom"]) == 0:
        return None
    else:
        value = Fraction(int(number["top"]), int(number["bottom"]))
    return -value if number["sign"] == "-" else value
