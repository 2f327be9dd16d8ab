"""The text games of LMRL-Gym as tasks: secrets and starts, what scripted players say, and what an episode is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from rlx.data.formats import demonstration, turn
from rlx.envs import maze as mazes
from rlx.envs.maze import Maze
from rlx.envs.twenty_questions import TABLES, TwentyQuestions, guess
from rlx.rewards.env import played_out
from rlx.types import ConfigError, Env, Episode, Message, Task, TaskSource

# (env, generator) -> what a scripted player says next
Player = Callable[[Any, np.random.Generator], str]


def twenty_questions(
    *,
    table: Literal["mini", "ten"] = "mini",
    horizon: int = 12,
    demos: int = 1000,
    facts: int = 10000,
    train: int = 1000,
    dev: int = 64,
    test: int = 256,
    data_seed: int = 0,
) -> TaskSource:
    """Name a secret object by yes-or-no questions: prompt "Questions:", answers "Yes." and "No.", `horizon` questions.

    -1 for each question, 0 for the one that names the object. In every split objects are equally frequent. `demos` are
    played by asking any question or naming any object, each equally likely. `facts` say what answers mean, in the place of
    a pretrained model's knowledge of language: see `fact`. The objects are those of a table
    (rlx/envs/twenty_questions.py). `data_seed` draws orders and demonstrations.

    Raises ConfigError: a setting out of range.
    """
    if min(horizon, demos, facts, train, dev, test) < 1:
        raise ConfigError(f"expected horizon and sizes of at least 1, got {(horizon, demos, facts, train, dev, test)}")
    objects, questions = TABLES[table]
    said = [*questions, *map(guess, objects)]
    make = partial(TwentyQuestions, table, horizon)
    prompt = (Message("user", "Questions:"),)

    def tasks(split: int, size: int) -> list[Task]:
        rng = np.random.default_rng([data_seed, split])
        rounds = -(-size // len(objects))
        order = np.concatenate([rng.permutation(len(objects)) for _ in range(rounds)])[:size]
        return [Task(prompt, objects[i]) for i in order.tolist()]

    return TaskSource(
        {
            "demos": lambda: played(make, tasks(0, demos), lambda env, rng: said[rng.integers(len(said))], data_seed),
            "facts": lambda: [fact(table, horizon, i, np.random.default_rng([data_seed, 8, i])) for i in range(facts)],
            "train": lambda: questions_of(tasks(1, train)),
            "dev": lambda: questions_of(tasks(2, dev)),
            "test": lambda: questions_of(tasks(3, test)),
        },
        verifier=partial(played_out, horizon=horizon),
        make_env=make,
        max_new_tokens=max(map(len, said)) + 4,
    )


def fact(table: str, horizon: int, group: int, rng: np.random.Generator) -> Episode:
    """A conversation that says what is known: of each question whether the answers so far leave it open, and what is left.

    Prompt "Facts:". Up to `horizon - 1` questions, each with "Yes.", "No." or "Maybe." for what its answer can be, then the
    answer for a secret object. Last, to "Left?", the objects of which all answers are true, in any order: "Is it a
    horse?Is it a cow?" Half of the questions name an object; nothing here says which question is a good one.
    """
    objects, questions = TABLES[table]
    true = {**questions, **{guess(name): frozenset({name}) for name in objects}}
    secret, left = objects[rng.integers(len(objects))], frozenset(objects)
    kinds = [list(questions), [guess(name) for name in objects if name != secret]]
    ask = Message("user", "Left?")
    rounds = int(rng.integers(horizon))
    turns = []
    for i in range(rounds):
        question = str(rng.choice(kinds[rng.integers(2)]))
        yes, no = left & true[question], left - true[question]
        known = "Maybe." if yes and no else "Yes." if yes else "No."
        left = yes if secret in true[question] else no
        reply = Message("user", "Yes." if secret in true[question] else "No.")
        turns.append(turn(f"{question} {known}", (reply, *([ask] if i == rounds - 1 else []))))
    turns.append(turn("".join(guess(name) for name in rng.permutation(sorted(left)))))
    opening = Message("user", "Facts:")
    return demonstration(Task((opening,) if rounds else (opening, ask)), group, turns)


def maze(
    *,
    observed: bool = True,
    most_moves: int = mazes.MOST_MOVES,
    optimal: float = 0.0,
    demos: int = 1240,
    train: int = 1000,
    dev: int = 25,
    test: int = 100,
    data_seed: int = 0,
) -> TaskSource:
    """Walk through the "double T" maze (rlx/envs/maze.py) from a start that is any free cell with equal chance.

    -1 for each move that does not reach the goal. `observed`: the policy is told goal and position, else the walls alone.
    `demos` move at random, but with probability `optimal` towards the goal. Splits hold every start equally often.

    Raises ConfigError: a setting out of range.
    """
    if not 0.0 <= optimal <= 1.0:
        raise ConfigError(f"optimal: expected a probability from 0 to 1, got {optimal}")
    if min(most_moves, demos, train, dev, test) < 1:
        raise ConfigError(f"expected most_moves and sizes of at least 1, got {(most_moves, demos, train, dev, test)}")
    make = partial(Maze, observed=observed, most_moves=most_moves)

    def tasks(split: int, size: int) -> list[Task]:
        rng = np.random.default_rng([data_seed, split])
        rounds = -(-size // len(mazes.STARTS))
        order = np.concatenate([rng.permutation(len(mazes.STARTS)) for _ in range(rounds)])[:size]
        starts = [mazes.STARTS[i] for i in order.tolist()]
        return [Task((Message("user", mazes.observation(at, observed=observed)),), at) for at in starts]

    def player(env: Maze, rng: np.random.Generator) -> str:
        return mazes.shortest(env.at) if rng.random() < optimal else list(mazes.MOVES)[rng.integers(4)]

    return TaskSource(
        {
            "demos": lambda: played(make, tasks(0, demos), player, data_seed),
            "train": lambda: questions_of(tasks(1, train)),
            "dev": lambda: questions_of(tasks(2, dev)),
            "test": lambda: questions_of(tasks(3, test)),
        },
        verifier=partial(played_out, horizon=most_moves + 1),
        make_env=make,
        max_new_tokens=12,
    )


def questions_of(tasks: Sequence[Task]) -> list[Episode]:
    """Tasks to be played, each a group of its own."""
    return [Episode(task, group) for group, task in enumerate(tasks)]


def played(make: Callable[[], Env], tasks: Sequence[Task], player: Player, seed: int) -> list[Episode]:
    """What a scripted player did on each task; its draws depend on `seed` and the task's number alone."""
    made = []
    for group, task in enumerate(tasks):
        env, rng = make(), np.random.default_rng([seed, 9, group])
        env.reset(task)
        turns, done = [], False
        while not done:
            text = player(env, rng)
            reply = env.step(Message("assistant", text))
            turns.append(turn(text, reply.messages))
            turns[-1].reward, done = reply.reward, reply.done
        made.append(demonstration(task, group, turns))
    return made
