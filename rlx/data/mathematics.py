r"""Competition mathematics from the hub: MATH, GSM8K with MATH, and DAPO-Math-17k."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from rlx.data.formats import Row
from rlx.data.gsm8k import gsm8k_question
from rlx.data.questions import Question, Splits, ask, joined, split_rows, splits, text_cell
from rlx.envs.single import SingleTurn
from rlx.rewards.answers import extract
from rlx.rewards.rules import answer_match
from rlx.types import DataError, Message, TaskSource

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
UNBRACED = re.compile(r"\\boxed\s+([^\s$]+)")


def math(
    *,
    path: str = "DigitalLearningGmbH/MATH-lighteval",
    subset: str | None = None,
    dev: int = 200,
    instruction: str | None = BOXED,
    limit: int | None = None,
) -> TaskSource:
    r"""MATH (Hendrycks et al. 2021, arXiv:2103.03874): columns problem, solution; the answer is the last \boxed{...}.

    Splits, `dev`, `limit` and errors as in `gsm8k`; the columns level and type go to `meta`. `math_verify` compares.
    """

    def questions(split: str) -> list[Question]:
        return [math_question(row, where, instruction) for where, row in split_rows(path, split, subset)]

    parts = splits(lambda: questions("train"), lambda: questions("test"), dev=dev, limit=limit)
    return TaskSource(parts, partial(answer_match, method="math_verify"), SingleTurn, max_new_tokens=1024)


def gsm8k_math(
    *,
    gsm8k_path: str = "openai/gsm8k",
    math_path: str = "DigitalLearningGmbH/MATH-lighteval",
    dev: int = 200,
    instruction: str | None = BOXED,
    limit: int | None = None,
) -> TaskSource:
    """GSM8K and MATH as one task, as GRPO was first trained (DeepSeekMath, Shao et al. 2024, arXiv:2402.03300).

    train, dev and test are GSM8K's and then MATH's, half of `dev` from each; `limit` cuts either half. test_gsm8k and
    test_math are the two tests by themselves. There are no demos: the two write their solutions differently.
    """

    def from_gsm8k(split: str) -> list[Question]:
        return [gsm8k_question(row, where, instruction) for where, row in split_rows(gsm8k_path, split, "main")]

    def from_math(split: str) -> list[Question]:
        return [math_question(row, where, instruction) for where, row in split_rows(math_path, split)]

    first = splits(lambda: from_gsm8k("train"), lambda: from_gsm8k("test"), dev=dev // 2, limit=limit)
    second = splits(lambda: from_math("train"), lambda: from_math("test"), dev=dev - dev // 2, limit=limit)
    parts: Splits = {name: partial(joined, first, second, name) for name in ("train", "dev", "test")}
    parts |= {"test_gsm8k": first["test"], "test_math": second["test"]}
    return TaskSource(parts, partial(answer_match, method="math_verify"), SingleTurn, max_new_tokens=1024)


def dapo_math(
    *,
    path: str = "BytedTsinghua-SIA/DAPO-Math-17k",
    test_path: str = "BytedTsinghua-SIA/AIME-2024",
    dev: int = 200,
    limit: int | None = None,
) -> TaskSource:
    """DAPO-Math-17k to train on and AIME 2024 to test on (Yu et al. 2025, arXiv:2503.14476); no demos.

    Both repeat their problems on the hub (about 100 and 32 times); each is kept once. The prompts bring their own
    instruction, to end with a line "Answer: ...". 20 480 tokens is the paper's longest response.
    """
    parts = splits(partial(dapo_questions, path), partial(dapo_questions, test_path), dev=dev, limit=limit)
    del parts["demos"]
    return TaskSource(parts, partial(answer_match, method="math_verify"), SingleTurn, max_new_tokens=20480)


def math_question(row: Row, where: str, instruction: str | None) -> Question:
    r"""Turn one row, {problem, solution, level, type}, into a question; the answer is the solution's last \boxed."""
    solution = text_cell(row, "solution", where)
    answer = last_boxed(solution)
    if answer is None:
        raise DataError(f"{where}, column 'solution': expected a solution with \\boxed{{...}}, found none")
    meta = {name: value for name, value in row.items() if name not in ("problem", "solution")}
    return Question(ask(text_cell(row, "problem", where), instruction), answer, solution, meta)


def last_boxed(solution: str) -> str | None:
    r"""Return what the last \boxed{...} or \fbox{...} holds, braces matched; "\boxed 5" counts where none has any."""
    boxed = solution.replace("\\fbox", "\\boxed")
    bare = UNBRACED.findall(boxed)
    return extract(boxed, "boxed") or (bare[-1] if bare else None)


def dapo_question(row: Row, where: str) -> Question:
    """Turn one row, {prompt: [{role, content}], reward_model: {ground_truth}}, into a question."""
    prompt, gold = row.get("prompt"), row.get("reward_model")
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, Mapping) for message in prompt):
        raise DataError(f"{where}, column 'prompt': expected a list of messages, got {prompt!r:.40}")
    if not isinstance(gold, Mapping):
        raise DataError(f"{where}, column 'reward_model': expected {{ground_truth: TEXT}}, got {gold!r:.40}")
    messages = tuple(Message(text_cell(m, "role", where), text_cell(m, "content", where)) for m in prompt)
    return Question(messages, text_cell(gold, "ground_truth", where))


def dapo_questions(path: str) -> list[Question]:
    """Return the training questions of DAPO-Math-17k or the like, each prompt once, in the order of the file."""
    kept: dict[tuple[Message, ...], Question] = {}
    for where, row in split_rows(path, "train"):
        question = dapo_question(row, where)
        kept.setdefault(question.prompt, question)
    return list(kept.values())
