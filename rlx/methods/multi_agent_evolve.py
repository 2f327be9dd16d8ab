"""Multi-Agent Evolve (arXiv 2510.23595): one policy proposes questions, solves them and judges, and each role pays another.

The parts of each reward are measured here, because they need further generations; `env` pays what comes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from rlx.data.roles import WORDINGS, form, mean_score, score, tagged
from rlx.envs.single import SingleTurn
from rlx.rollout.noise import key
from rlx.rollout.samplers import plain
from rlx.types import Backend, Component, ConfigError, Episode, Message, Play, Task, TextPolicy

PHASES = 7  # rounds of generations in a step


def proposer_reward(quality: float, difficulty: float, well_formed: float, gate: float = 0.7) -> float:
    """(J + D + F) / 3 where J >= gate, else (J + F) / 3: what cannot be solved is difficult, and earns nothing by that."""
    return (quality + (difficulty if quality >= gate else 0.0) + well_formed) / 3


def solver_reward(worth: float, well_formed: float) -> float:
    """(S + F) / 2, with S the judge's mark of the answer."""
    return (worth + well_formed) / 2


def difficulty(worths: Sequence[float], learnable: bool = False) -> float:
    """1 - mean S over the solver's answers; with `learnable`, 0 where the mean is 0 or 1 (Absolute Zero)."""
    mean = float(np.mean(worths))
    return 0.0 if learnable and mean in (0.0, 1.0) else 1.0 - mean


def for_pool(episodes: list[Episode], *, pool: Literal["questions", "pairs"]) -> list[Episode]:
    """The episodes that the sampler has chosen for a pool: questions past the gate, or questions with an answer."""
    return [episode for episode in episodes if episode.info.get("pool") == pool]


def multi_agent_evolve(
    play: Play,
    rows: list[Episode],
    n: int,
    *,
    judge: Component[Backend] | None = None,
    proposer: TextPolicy | None = None,
    gate: float = 0.7,
    quality: bool = True,
    learnable: bool = False,
    answers: int = 5,
    verdicts: int = 5,
    reference: float = 0.5,
    wording: Literal["letters", "rubric"] = "rubric",
) -> list[Episode]:
    """`n` episodes of each of len(rows) tasks of each role: agents proposer, solver, judge.

    The buffers `questions` and `pairs` are the pools (see `for_pool`); where the first is empty, the questions of `rows` stand
    in. A proposer sees a question of the pool with probability `reference`. Its own is marked `verdicts` times, as is each of
    the solver's `answers` answers to it; a new one of quality `gate` or more joins the pool at once. The solver draws from the
    pool, the judge from the pairs. `judge` is asked in place of the policy, `proposer` proposes in its place. Without
    `quality`, questions are not judged: (D + F) / 2, and all join the pool. All marks are the current policy's, and no
    gradient goes through them.

    Raises ConfigError where the stage has no such buffers.
    """
    if missing := [name for name in ("questions", "pairs") if name not in play.pools]:
        raise ConfigError(f"sampler multi_agent_evolve: the stage has no buffer {missing[0]!r}; it needs questions and pairs")
    words, rng = WORDINGS[wording], np.random.default_rng((*play.seed, 1))

    def some(items: Sequence[Any]) -> list[Any]:
        """One for each row, equally likely."""
        return [items[i] for i in rng.integers(len(items), size=len(rows))]

    def marks(prompts: list[str], phase: int) -> list[float]:
        """What each prompt's verdicts say in the mean."""
        if judge is not None:
            talks, how = [[Message("user", prompt)] for prompt in prompts], play.sampling
            seed = key(*play.seed, phase) >> 33  # 31 bits: some servers read an int32, others an int64
            chance = {"max_new_tokens": how.max_new_tokens, "seed": seed}
            texts = judge.call(talks, n=verdicts, temperature=how.temperature, **chance) if talks else []
        else:
            spoken = [e.completion for e in told(play, "judge", prompts, verdicts, phase)]
            texts = [spoken[i : i + verdicts] for i in range(0, len(spoken), verdicts)]
        return [mean_score(group, words.score) for group in texts]

    def solved(questions: list[str], count: int, phase: int) -> tuple[list[Episode], list[float]]:
        """`count` solutions of each question, and the mark of each: 0 for one without an answer."""
        made = told(play, "solver", [words.solve.format(question=q) for q in questions], count, phase)
        for i, e in enumerate(made):
            e.info |= {"question": questions[i // count], "answer": tagged(e.completion, words.answer)}
        judged = [words.rate_answer.format(**asked(e)) for e in made if e.info["answer"] is not None]
        found = iter(marks(judged, phase + 1))
        return made, [next(found) if e.info["answer"] is not None else 0.0 for e in made]

    known = [question_of(e) for e in play.pools["questions"] or rows]
    shown = [words.refer.format(question=q) if rng.random() < reference else words.propose for q in some(known)]
    proposals = told(replace(play, policy=proposer or play.policy), "proposer", shown, n, 0)
    posed = [e for e in proposals if tagged(e.completion, words.question) is not None]
    new = [str(tagged(e.completion, words.question)) for e in posed]
    _, tried = solved(new, answers, 1)
    rated = marks([words.rate_question.format(question=q) for q in new], 3) if quality else [1.0] * len(new)
    pool = dict.fromkeys(known)
    for i, (e, question, mark) in enumerate(zip(posed, new, rated, strict=True)):
        hard, shape = difficulty(tried[i * answers : (i + 1) * answers], learnable), form(e.completion, words.question)
        e.turns[-1].reward = proposer_reward(mark, hard, shape, gate) if quality else (hard + shape) / 2
        e.rewards |= {"quality": mark, "difficulty": hard, "format": shape}
        e.info |= {"question": question, "pool": "questions" if mark >= gate and question not in pool else ""}
        if e.info["pool"]:
            pool[question] = None

    solutions, worths = solved(some(list(pool)), n, 4)
    for e, worth in zip(solutions, worths, strict=True):
        shape = form(e.completion, words.answer)
        e.turns[-1].reward = solver_reward(worth, shape)
        e.rewards |= {"score": worth, "format": shape}
        e.info["pool"] = "pairs" if e.info["answer"] is not None else ""

    pairs = [asked(e) for e in (*play.pools["pairs"], *for_pool(solutions, pool="pairs"))]
    judged = [words.rate_answer.format(**pair) for pair in (some(pairs) if pairs else [])]
    opinions = told(play, "judge", judged, n, 6)
    for e in opinions:
        shape = form(e.completion, words.score) if score(e.completion, words.score) is not None else 0.0
        e.turns[-1].reward = e.rewards["format"] = shape
    return [*proposals, *solutions, *opinions]


multi_agent_evolve.together = True  # type: ignore[attr-defined]  # a question is solved by other groups than its own


def told(play: Play, role: str, prompts: Sequence[str], n: int, phase: int) -> list[Episode]:
    """`n` episodes of one turn to each prompt; groups of different phases of a step never meet."""
    rows = [Episode(Task((Message("user", p),), meta={"role": role}), PHASES * i + phase) for i, p in enumerate(prompts)]
    episodes = plain(replace(play, make_env=SingleTurn, ended=lambda episode: None), rows, n)  # its role is yet to be written
    for episode in episodes:
        episode.agent = role
    return episodes


def question_of(row: Episode) -> str:
    """The question of a proposal, of a row that has a column of that name, or of a plain row: what its prompt asks."""
    return str(row.info.get("question") or row.task.meta.get("question") or row.task.prompt[-1].text)


def asked(row: Episode) -> dict[str, str]:
    """Question and answer of a solution, or of a row that has such columns."""
    return {
        "question": question_of(row),
        "answer": str(row.info.get("answer") or row.task.meta.get("answer") or row.task.answer),
    }
