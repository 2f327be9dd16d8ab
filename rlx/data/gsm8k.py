"""GSM8K: grade-school word problems with worked solutions (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re

from rlx.data.formats import Row
from rlx.data.questions import Question, ask, split_rows, splits, text_cell
from rlx.envs.single import SingleTurn
from rlx.rewards.rules import answer_match
from rlx.types import DataError, TaskSource

ANNOTATION = re.compile(r"<<[^<>]*>>")  # what a calculator filled in: 48/2 = <<48/2=24>>24


def gsm8k(
    *,
    path: str = "openai/gsm8k",
    subset: str = "main",
    dev: int = 200,
    instruction: str | None = "Solve the problem step by step and end with '#### ' and the number.",
    limit: int | None = None,
) -> TaskSource:
    """GSM8K from the hub or from a folder with train.jsonl and test.jsonl, columns `question` and `answer`.

    train, dev, test: prompts with the number after "####" as the answer. demos: the training problems with their
    solutions, calculator annotations removed. `dev` is the last `dev` problems of the training file and in no other
    split; `limit` cuts every split. Nothing is read before a split is called.

    Raises ConfigError: no such data, `dev` too large. DataError: a row without a question, or without "####".
    """

    def questions(split: str) -> list[Question]:
        return [gsm8k_question(row, where, instruction) for where, row in split_rows(path, split, subset)]

    parts = splits(lambda: questions("train"), lambda: questions("test"), dev=dev, limit=limit)
    return TaskSource(parts, verifier=answer_match, make_env=SingleTurn)


def gsm8k_question(row: Row, where: str, instruction: str | None) -> Question:
    """Turn one row, {question, answer: "reasoning #### 1,234"}, into a question whose answer is "1234"."""
    solution = ANNOTATION.sub("", text_cell(row, "answer", where))
    _, mark, number = solution.rpartition("####")
    answer = number.strip().replace(",", "")
    if not mark or not answer:
        raise DataError(f"{where}, column 'answer': expected a solution that ends in '#### ' and a number, found none")
    return Question(ask(text_cell(row, "question", where), instruction), answer, solution)
