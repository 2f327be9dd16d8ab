"""Rows of data -> episodes of messages.

Which format a data set has is read from the columns of its first row, after the column mapping:

    prompt, chosen, rejected    two episodes of one group, labels +1 and -1
    chosen, rejected            the same, with the prompt as the messages that both begin with
    messages                    every assistant message is a turn, label 1
    prompt, completion          one turn, label 1
    prompt                      an episode without a turn, to be played

The first line that fits wins. A prompt or a completion is text or a list of {role, content}; text in a prompt is one
user message. The column `answer`, where there is one, is the task's answer; all others are the task's `meta`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlx.types import DataError, Episode, Message, Status, Task, Turn

Row = Mapping[str, Any]

FORMATS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("messages",),
    ("prompt", "completion"),
    ("prompt",),
)
ROLES = ("system", "user", "assistant", "tool")
SHOWN = 5  # bad rows that an error names; the rest are counted
OFTEN_CALLED = {
    "prompt": ("question", "problem", "instruction", "query", "input"),
    "completion": ("response", "output"),
    "messages": ("conversations", "conversation", "dialogue"),
}


# --------------------------------------------------------------------------- episodes from messages
def turn(text: str, replies: Sequence[Message] = ()) -> Turn:
    """One assistant message and what was answered to it, without tokens."""
    none = np.empty(0, np.int64)
    return Turn(none, none.copy(), np.empty(0, np.float32), Message("assistant", text), tuple(replies))


def demonstration(task: Task, group: int, turns: list[Turn], label: float = 1.0) -> Episode:
    """A finished episode that was not sampled: its turns come from the data."""
    return Episode(task, group, turns, status=Status.FINISHED, label=label)


# --------------------------------------------------------------------------- rows -> episodes
def episodes(
    rows: Iterable[Row], *, source: str, columns: Mapping[str, str] | None = None, first_line: int = 1
) -> list[Episode]:
    """Turn rows into episodes; `group` is the index of the row.

    `columns` maps a standard name to the file's column, as in {prompt: question}; it wins over a column that has the
    standard name already. `source` and `first_line` say in errors where a row stands.

    Raises DataError: no rows; no format fits the columns; rows that do not fit (the first 5 are named, all counted).
    """
    placed = ((f"{source} line {line}", row) for line, row in enumerate(rows, first_line))
    return placed_episodes(placed, source=source, columns=columns)


def placed_episodes(
    rows: Iterable[tuple[str, Row]], *, source: str, columns: Mapping[str, str] | None = None, empty: bool = False
) -> list[Episode]:
    """`episodes` for rows that come with their place, such as "train.jsonl line 17".

    `empty`: an answer may be empty. A policy says nothing at times; in a file of the user's it is a mistake.
    """
    made: list[Episode] = []
    problems: list[str] = []
    layout: tuple[str, ...] = ()
    count = 0
    for where, found in rows:
        row = _renamed(found, columns or {}, source)
        layout = layout or _sniff(row, source)
        try:
            made += _row_episodes(row, layout, count, where, empty)
        except DataError as error:
            problems.append(str(error))
        count += 1
    if count == 0:
        raise DataError(f"{source}: no rows")
    if len(problems) > 1:
        shown = "" if len(problems) <= SHOWN else f"; the first {SHOWN} are shown"
        raise DataError("\n".join([*problems[:SHOWN], f"{source}: {len(problems)} of {count} rows do not fit{shown}"]))
    if problems:
        raise DataError(problems[0])
    return made


def _renamed(row: Row, columns: Mapping[str, str], source: str) -> dict[str, Any]:
    for name, column in columns.items():
        if column not in row:
            raise DataError(f"{source}: no column '{column}' (columns: {{{name}: {column}}}); found {', '.join(row)}")
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return rest | {name: row[column] for name, column in columns.items()}


def _sniff(row: Row, source: str) -> tuple[str, ...]:
    for layout in FORMATS:
        if all(name in row for name in layout):
            return layout
    known = " | ".join(", ".join(layout) for layout in FORMATS)
    raise DataError(f"{source}: no format fits the columns {', '.join(row)}; known formats: {known}; {_suggestion(list(row))}")


def _suggestion(found: Sequence[str]) -> str:
    guesses = {
        name: next((other for other in others if other in found), None)
        for name, others in OFTEN_CALLED.items()
        if name not in found
    }
    pairs = [f"{name}: {column}" for name, column in guesses.items() if column is not None]
    if "prompt" not in found and guesses.get("prompt") is None and guesses.get("messages") is None:
        pairs.insert(0, "prompt: YOUR_COLUMN")
    return f"set columns: {{{', '.join(pairs)}}}"


def _row_episodes(row: Row, layout: tuple[str, ...], group: int, where: str, empty: bool) -> list[Episode]:
    for name in layout:
        if name not in row:
            raise DataError(f"{where}, column '{name}': no such column in this row; found {', '.join(row)}")
    meta = {name: value for name, value in row.items() if name not in (*layout, "answer")}

    def task(prompt: Sequence[Message]) -> Task:
        return Task(tuple(prompt), row.get("answer"), meta)

    if "chosen" in layout:
        if "prompt" in layout:
            prompt = _prompt(row["prompt"], where)
            chosen, rejected = (_completion(row[name], where, name, prompt, empty) for name in ("chosen", "rejected"))
        else:
            prompt, chosen, rejected = _shared_prompt(row, where)
        asked = task(prompt)
        return [
            demonstration(asked, group, _turns(chosen), label=1.0),
            demonstration(asked, group, _turns(rejected), label=-1.0),
        ]
    if "messages" in layout:
        messages = _messages(row["messages"], where, "messages")
        first = next((i for i, message in enumerate(messages) if message.role == "assistant"), None)
        if not first:
            got = "no assistant message" if first is None else "an assistant message first"
            raise DataError(f"{where}, column 'messages': expected a prompt and then an assistant message, got {got}")
        return [demonstration(task(messages[:first]), group, _turns(messages[first:]))]
    prompt = _prompt(row["prompt"], where)
    if "completion" in layout:
        completion = _completion(row["completion"], where, "completion", empty=empty)
        return [demonstration(task(prompt), group, _turns(completion))]
    return [Episode(task(prompt), group)]


def _turns(messages: Sequence[Message]) -> list[Turn]:
    """Messages of which the first is the assistant's -> turns; what stands between two turns is the first's reply."""
    starts = [i for i, message in enumerate(messages) if message.role == "assistant"]
    ends = [*starts[1:], len(messages)]
    return [turn(messages[a].text, messages[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


# --------------------------------------------------------------------------- cells -> messages
def _prompt(value: Any, where: str) -> list[Message]:
    return [Message("user", _text(value, where, "prompt"))] if isinstance(value, str) else _messages(value, where, "prompt")


def _completion(value: Any, where: str, column: str, prompt: Sequence[Message] = (), empty: bool = False) -> list[Message]:
    if isinstance(value, str):
        return [Message("assistant", _text(value, where, column))]
    messages = _messages(value, where, column, empty)
    if prompt and messages[: len(prompt)] == list(prompt):  # some data sets repeat the prompt here
        messages = messages[len(prompt) :]
    if not messages or messages[0].role != "assistant":
        got = f"a {messages[0].role} message" if messages else "nothing after the prompt"
        raise DataError(f"{where}, column '{column}': expected an assistant message first, got {got}")
    return messages


def _shared_prompt(row: Row, where: str) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt as the longest common beginning after which the assistant speaks on both sides, and what follows."""
    for name in ("chosen", "rejected"):
        if isinstance(row[name], str):
            raise DataError(
                f"{where}, column '{name}': expected a list of messages, because there is no column 'prompt'; "
                f"got {shown(row[name])}"
            )
    chosen, rejected = (_messages(row[name], where, name) for name in ("chosen", "rejected"))
    splits = [
        i
        for i, (a, b) in enumerate(zip(chosen, rejected, strict=False))
        if i > 0 and a.role == b.role == "assistant" and chosen[:i] == rejected[:i]
    ]
    if not splits:
        raise DataError(f"{where}, columns 'chosen' and 'rejected': expected the same messages up to the assistant's reply")
    split = splits[-1]
    return chosen[:split], chosen[split:], rejected[split:]


def _messages(value: Any, where: str, column: str, empty: bool = False) -> list[Message]:
    if not isinstance(value, list) or not value:
        expected = "a list of messages" if column == "messages" else "text or a list of messages"
        raise DataError(f"{where}, column '{column}': expected {expected}, got {shown(value)}")
    return [_message(item, where, f"{column}.{i}", empty) for i, item in enumerate(value)]


def _message(item: Any, where: str, column: str, empty: bool) -> Message:
    if not isinstance(item, Mapping) or not {"role", "content"} <= set(item):
        got = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else shown(item)
        raise DataError(f"{where}, column '{column}': expected a message {{role, content}}, got {got}")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise DataError(f"{where}, column '{column}.role': expected one of {', '.join(ROLES)}, got {shown(role)}")
    if isinstance(content, str) and (empty or (role in ("system", "tool") and content == "")):
        return Message(role, content)  # an empty system prompt or tool result is meant
    return Message(role, _text(content, where, f"{column}.content"))


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}, column '{column}': expected text that is not empty, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value of a cell in an error: shortened, with its type."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
