"""Twenty Questions and the maze: the card's rules, rewards, step limits, texts and bounds."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from rlx.data.text_games import maze, twenty_questions
from rlx.envs.maze import GOAL, MOVES, STARTS, Maze, distances, moved, observation, shortest, walls
from rlx.envs.twenty_questions import TABLES, TwentyQuestions, guess, ideal, optimum
from rlx.rewards.env import played_out
from rlx.types import ConfigError, Episode, Message, Status, Task


def say(env: TwentyQuestions | Maze, text: str) -> tuple[str, float, bool]:
    reply = env.step(Message("assistant", text))
    return reply.messages[0].text, reply.reward, reply.done


def ask(secret: str, *texts: str, table: str = "ten", horizon: int = 20) -> list[tuple[str, float, bool]]:
    env = TwentyQuestions(table, horizon)
    env.reset(Task((), secret))
    return [say(env, text) for text in texts]


# --------------------------------------------------------------------------- twenty questions
def test_each_question_costs_one_and_naming_the_object_nothing() -> None:
    played = ask("dog", "Is it alive?", "Is it metal?", "Is it a banana?", "Is it a dog?")
    assert played == [("Yes.", -1.0, False), ("No.", -1.0, False), ("No.", -1.0, False), ("Yes.", 0.0, True)]


@pytest.mark.parametrize("text", ["dog", "a dog?", "is it a dog?", "", " ".join(["Is"] * 40) + " dog?", "Is it dog alive?"])
def test_a_question_that_is_none_is_answered_no(text: str) -> None:
    assert ask("dog", text) == [("No.", -1.0, False)]


def test_the_last_question_ends_the_episode() -> None:
    assert ask("dog", *["Is it metal?"] * 3, horizon=3) == [("No.", -1.0, False)] * 2 + [("No.", -1.0, True)]
    assert ask("dog", "Is it metal?", "Is it a dog?", horizon=2)[1] == ("Yes.", 0.0, True)


def test_an_unknown_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="no object 'dog'"):
        TwentyQuestions("mini", 12).reset(Task((), "dog"))


def test_the_optima() -> None:
    assert optimum("mini") == ideal(8) == -2.5
    assert ideal(10) == pytest.approx(-2.8)
    assert ideal(158) == pytest.approx(-6.78, abs=0.01)
    assert optimum("ten") <= ideal(10)


def test_every_object_is_named_by_its_guess() -> None:
    for table, (objects, questions) in TABLES.items():
        assert all(names <= set(objects) for names in questions.values())
        for name in objects:
            assert ask(name, guess(name), table=table) == [("Yes.", 0.0, True)]


# --------------------------------------------------------------------------- maze
def walk(start: tuple[int, int], *texts: str, most_moves: int = 100) -> list[tuple[str, float, bool]]:
    env = Maze(most_moves=most_moves)
    env.reset(Task((), start))
    return [say(env, text) for text in texts]


def test_moves_walls_and_the_goal() -> None:
    far = "The goal is at position 8, 6. Your current position is at position 7, 6. "
    far += "There are walls to your right, to your left.\n"
    assert walk((6, 6), "move down\n", "move left\n", "move down", "move down\n") == [
        (far, -1.0, False),
        (far, -1.0, False),
        (far, -4.0, False),
        ("Success\n", 0.0, True),
    ]


def test_the_step_after_the_last_move_fails() -> None:
    played = walk((1, 1), *["move left\n"] * 101)
    assert [done for _, _, done in played] == [False] * 100 + [True]
    assert played[-1] == ("Failure\n", -1.0, True)
    assert sum(reward for _, reward, _ in played) == -101


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ((5, 6), "There is a wall above you."),
        ((1, 1), "There are walls to your left, above you, below you."),
        ((1, 3), "There is a wall above you."),
        ((3, 3), "There are walls to your right, to your left."),
        ((1, 11), "There are walls to your right, above you, below you."),
    ],
)
def test_wall_sentences(cell: tuple[int, int], text: str) -> None:
    assert walls(cell) == text
    assert observation(cell, observed=False) == text + "\n"


def test_numbers_of_two_digits_are_spaced() -> None:
    assert "at position 1, 1 1. There" in observation((1, 11), observed=True)


def test_shortest_paths_are_the_fully_observed_optimum() -> None:
    far = [distances()[start] for start in STARTS]
    assert len(STARTS) == 25
    assert max(far) == 12
    assert sum(far) / 25 == pytest.approx(7.84)
    for start in STARTS:
        texts, at = [], start
        while at != GOAL:
            texts.append(shortest(at))
            at = moved(at, MOVES[texts[-1]])
        assert sum(reward for _, reward, _ in walk(start, *texts)) == 1 - distances()[start]


def test_random_play_by_dynamic_programming_and_by_demonstrations() -> None:
    """About -85.8, the card says: the cost of 100 random moves and the step after them, by cells."""
    cost = dict.fromkeys(STARTS, -1.0)
    for _ in range(100):
        ahead = {cell: [moved(cell, move) for move in MOVES.values()] for cell in STARTS}
        cost = {cell: sum(cost[to] - 1 if to != GOAL else 0.0 for to in ahead[cell]) / 4 for cell in STARTS}
    expected = sum(cost.values()) / 25
    assert expected == pytest.approx(-85.8, abs=0.2)
    played = [sum(turn.reward for turn in e.turns) for e in maze(demos=300).splits["demos"]()]
    assert abs(np.mean(played) - expected) < 4 * np.std(played) / 300**0.5
    assert min(played) == -101.0


def test_the_partially_observed_optimum_by_beliefs() -> None:
    """Dynamic programming over what one may believe: -7.24 in the mean over starts."""
    beliefs: dict[str, list[tuple[tuple[int, int], int]]] = {}
    for cell in STARTS:
        beliefs.setdefault(walls(cell), []).append((cell, 1))
    assert -sum(best(tuple(belief), 16) for belief in beliefs.values()) / 25 == pytest.approx(-7.24)


@cache
def best(belief: tuple[tuple[tuple[int, int], int], ...], left: int) -> float:
    """Least cost of a weighted belief."""
    if not belief or not left:
        return 0.0
    found = []
    for move in MOVES.values():
        by: dict[str, dict[tuple[int, int], int]] = {}
        paid = 0
        for cell, weight in belief:
            to = moved(cell, move)
            if to != GOAL:
                paid += weight
                part = by.setdefault(walls(to), {})
                part[to] = part.get(to, 0) + weight
        found.append(paid + sum(best(tuple(sorted(part.items())), left - 1) for part in by.values()))
    return min(found)


# --------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("source", [twenty_questions(demos=20), maze(demos=5, most_moves=20, optimal=0.5)])
def test_splits_repeat_and_demonstrations_play_by_the_rules(source: object) -> None:
    splits = source.splits  # type: ignore[attr-defined]
    assert [e.task for e in splits["train"]()] == [e.task for e in splits["train"]()]
    assert len({e.group for e in splits["dev"]()}) == len(splits["dev"]())
    for demo in splits["demos"]():
        env = source.make_env()  # type: ignore[attr-defined]
        env.reset(demo.task)
        replies = [env.step(t.said) for t in demo.turns]
        assert [(r.messages, r.reward) for r in replies] == [(t.replies, t.reward) for t in demo.turns]
        assert [r.done for r in replies] == [False] * (len(demo.turns) - 1) + [True]
        assert max(len(t.said.text) for t in demo.turns) < source.max_new_tokens  # type: ignore[attr-defined]


def test_objects_are_equally_frequent() -> None:
    secrets = [e.task.answer for e in twenty_questions(test=80).splits["test"]()]
    assert {secrets.count(name) for name in TABLES["mini"][0]} == {10}


def test_facts_are_true_of_the_conversation() -> None:
    """Of each question, whether an object that is left has the one answer and another the other; last, all that are left."""
    objects, questions = TABLES["mini"]
    true = {**questions, **{guess(name): {name} for name in objects}}
    seen = set()
    for row in twenty_questions(facts=60).splits["facts"]():
        left = set(objects)
        for t in row.turns[:-1]:
            question, known = t.said.text.rsplit(" ", 1)
            answers = {name in true[question] for name in left}
            assert known == ("Maybe." if len(answers) == 2 else "Yes." if answers == {True} else "No.")
            left = {name for name in left if (name in true[question]) == (t.replies[0].text == "Yes.")}
            seen.add(known)
        told = [*row.task.prompt, *(m for t in row.turns[:-1] for m in t.replies)]
        assert [m.text == "Left?" for m in told] == [False] * (len(told) - 1) + [True]
        last = row.turns[-1].said.text.removeprefix("Is it a ").removesuffix("?").split("?Is it a ")
        assert sorted(last) == sorted(left)
    assert seen == {"Maybe.", "Yes.", "No."}


def test_a_cut_episode_pays_for_the_turns_that_are_left() -> None:
    demo = twenty_questions(demos=1).splits["demos"]()[0]
    whole = Episode(demo.task, 0, demo.turns[:2], Status.FINISHED)
    cut = Episode(demo.task, 0, demo.turns[:2], Status.TRUNCATED)
    paid = [t.reward for t in demo.turns[:2]]
    assert played_out([whole, cut], horizon=12) == [paid, [paid[0], paid[1] - 10]]
