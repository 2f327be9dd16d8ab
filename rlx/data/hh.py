"""HH-RLHF: dialogues with a chosen and a rejected last reply (Bai et al. 2022, arXiv:2204.05862)."""

from __future__ import annotations

import re
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from rlx.data.files import Rows, hub_rows, rows_of
from rlx.data.formats import Row, demonstration, shown, turn
from rlx.envs.single import SingleTurn
from rlx.types import ConfigError, DataError, Episode, Message, Task, TaskSource

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}
HUB = "Anthropic/hh-rlhf"


# --------------------------------------------------------------------------- catalogue
def hh_rlhf(
    *, path: str = HUB, split: str = "train", limit: int | None = None, malformed: Literal["error", "skip"] = "error"
) -> list[Episode]:
    r"""Pairs from raw dialogues, columns `chosen` and `rejected`: "\n\nHuman: ... \n\nAssistant: ... \n\nHuman: ...".

    path: a .jsonl, .jsonl.gz or .parquet file, or a data set of the hub, of which `split` is read. The two dialogues of a
    row are the same up to the last reply: what stands before it is the prompt, and the replies get the labels +1 and -1.
    Earlier replies of the assistant's belong to the prompt: nobody compared them. `limit`: the number of rows to read.

    A row that is no such pair is an error that names file, line and column; `malformed: skip` leaves it out and says how
    many there were (the published files have about one in a hundred).
    Raises ConfigError: no such file or data set. DataError: a row that does not fit, or none that does.
    """
    rows = hub_rows(path, split) if is_hub(path) else rows_of(path)(path)
    return pairs(islice(rows, limit), path, malformed)


def hh_task(
    *, path: str = HUB, dev: int = 200, test: int = 200, limit: int | None = None, malformed: Literal["error", "skip"] = "skip"
) -> TaskSource:
    """The task of `hh_rlhf`: preference pairs, and their prompts to be answered.

    Splits: `pairs`, `dev_pairs`, `test_pairs`; `chosen` (also `demos`), the chosen replies of `pairs`; `train`, `dev` and
    `test`, the prompts of the three alone. `dev` and `test` pairs are the last of a file; of the hub, `test` are the first of
    its own test split. No reply is right or wrong: evaluate with a reward model as `verifier`.

    Raises ConfigError: a size below 1, or nothing left to train on. DataError as `hh_rlhf`.
    """
    if min(dev, test, limit or 1) < 1:
        raise ConfigError(f"expected dev, test and limit of at least 1, got {dev}, {test} and {limit}")

    def part(name: str) -> list[Episode]:
        rows, held = hh_rlhf(path=path, malformed=malformed), 2 * (dev if is_hub(path) else dev + test)
        if len(rows) <= held:
            raise ConfigError(f"task: dev {dev} and test {test} leave nothing to train on; there are {len(rows) // 2} pairs")
        if name == "train":
            return rows[:-held][: 2 * limit if limit else None]
        if name == "dev":
            return rows[-held:][: 2 * dev]
        return hh_rlhf(path=path, split="test", limit=test, malformed=malformed) if is_hub(path) else rows[-2 * test :]

    return TaskSource(
        {
            "pairs": partial(part, "train"),
            "dev_pairs": partial(part, "dev"),
            "test_pairs": partial(part, "test"),
            **dict.fromkeys(("chosen", "demos"), lambda: [row for row in part("train") if row.label == 1.0]),
            **{name: partial(lambda name: prompts(part(name)), name) for name in ("train", "dev", "test")},
        },
        verifier=no_verifier,
        make_env=SingleTurn,
        max_new_tokens=128,
    )


# --------------------------------------------------------------------------- rows
def pairs(rows: Rows, source: str, malformed: str) -> list[Episode]:
    """Each row as two episodes of a group."""
    made: list[Episode] = []
    wrong: list[str] = []
    for where, row in rows:
        try:
            made += pair(row, where, len(made) // 2)
        except DataError as error:
            wrong.append(str(error))
    if wrong and (malformed == "error" or not made):
        more = f"\n{source}: {len(wrong)} rows do not fit; `malformed: skip` leaves them out"
        raise DataError("\n".join(wrong[:5]) + more)
    if wrong:
        print(f"{source}: {len(wrong)} rows that do not fit are left out; the first: {wrong[0]}")
    if not made:
        raise DataError(f"{source}: no rows")
    return made


def pair(row: Row, where: str, group: int) -> list[Episode]:
    """Two episodes with the same prompt. Raises DataError where the dialogues differ before their last reply."""
    chosen, rejected = (dialogue(row, column, where) for column in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        at = next(
            (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
        )
        raise DataError(
            f"{where}, column 'rejected': expected the dialogue of 'chosen' up to the last reply; message {at + 1} differs"
        )
    task = Task(tuple(chosen[:-1]), meta={k: v for k, v in row.items() if k not in ("chosen", "rejected")})
    return [demonstration(task, group, [turn(x[-1].text)], y) for x, y in ((chosen, 1.0), (rejected, -1.0))]


def dialogue(row: Row, column: str, where: str) -> list[Message]:
    """The messages of one raw dialogue, Human and Assistant in turn, the last one the assistant's. Raises DataError."""
    at = f"{where}, column '{column}'"
    if column not in row:
        raise DataError(f"{at}: no such column; found {', '.join(row)}")
    if not isinstance(row[column], str):
        raise DataError(f"{at}: expected the text of a dialogue, got {shown(row[column])}")
    before, *parts = SPEAKER.split(row[column])
    if before.strip() or not parts:
        raise DataError(f"{at}: expected a dialogue that begins with '\\n\\nHuman:', got {shown(row[column])}")
    messages = [Message(ROLES[name], text.strip()) for name, text in zip(parts[::2], parts[1::2], strict=True)]
    for i, message in enumerate(messages):
        want = "user" if i % 2 == 0 else "assistant"
        if message.role != want:
            raise DataError(f"{at}: message {i + 1}: expected the {want}'s, got the {message.role}'s: {shown(message.text)}")
        if not message.text:
            raise DataError(f"{at}: message {i + 1}: expected text that is not empty")
    if messages[-1].role != "assistant":
        raise DataError(f"{at}: expected the assistant's reply at the end, got {shown(messages[-1].text)}")
    return messages


def prompts(rows: list[Episode]) -> list[Episode]:
    """The prompts of pairs alone, to be played."""
    return [Episode(row.task, row.group) for row in rows if row.label == 1.0]


def is_hub(path: str) -> bool:
    """Whether a path is a data set's name (owner/name) and no file's."""
    return not Path(path).expanduser().exists() and path.count("/") == 1 and not Path(path).suffix


def no_verifier(episodes: list[Episode]) -> list[float]:
    """Raise ConfigError: what a reply is worth, only a reward model or a judge can say."""
    raise ConfigError(
        "task hh_rlhf has no verifier: give `eval`, or a stage that evaluates, verifier: {name: model_score, ...}"
    )
