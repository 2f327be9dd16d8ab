"""Twenty Questions with a table in the place of an oracle (LMRL-Gym, Abdulhai et al. 2023, arXiv 2311.18232)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from rlx.types import ConfigError, Message, Reply, Task

OPENINGS = ("Is", "Does", "Can", "Do", "Are", "Could")
LONGEST = 40  # words of a question; a longer one is answered "No."

# table -> question -> the objects of which it is true; `objects` are in the first line
Table = Mapping[str, frozenset[str]]


def _table(objects: str, questions: Mapping[str, str]) -> tuple[tuple[str, ...], Table]:
    return tuple(objects.split()), {q: frozenset(names.split()) for q, names in questions.items()}


TABLES: dict[str, tuple[tuple[str, ...], Table]] = {
    # Three questions halve what is left, eight are answered "No." of every object.
    "mini": _table(
        "horse cow cat snail jet sofa dart pen",
        {
            "Is it alive?": "horse cow cat snail",
            "Is it big?": "horse cow jet sofa",
            "Is it fast?": "horse cat jet dart",
            **{f"Is it {what}?": "" for what in ("gold", "hot", "holy", "loud", "wet", "wild", "rare", "sad")},
        },
    ),
    "ten": _table(
        "football dog banana truck pants computer piano chair pen scissors",
        {
            "Is it alive?": "dog",
            "Is it edible?": "banana",
            "Is it a vehicle?": "truck",
            "Is it wearable?": "pants",
            "Is it electronic?": "computer",
            "Is it an instrument?": "piano",
            "Is it furniture?": "chair",
            "Does it write?": "pen",
            "Does it cut?": "scissors",
            "Is it for sport?": "football",
            "Is it bigger than a person?": "truck piano",
            "Is it in an office?": "computer chair pen scissors",
            "Does it have legs?": "dog chair piano pants",
            "Is it metal?": "truck scissors",
        },
    ),
}


def guess(name: str) -> str:
    """The question that names an object: "Is it a dog?"."""
    return f"Is it {name}?" if name in ("pants", "scissors") else f"Is it a {name}?"


class TwentyQuestions:
    """Name the secret object (the task's answer) in at most `horizon` questions: -1 for each, 0 for the one that names it.

    An object is named by a question that ends in its word. A question that the table does not have is answered "No.", as is
    one that does not begin as a question does, or has more than 40 words. The last question ends the episode either way.
    """

    def __init__(self, table: str, horizon: int) -> None:
        self.objects, self.table = TABLES[table]
        self.horizon = horizon
        self.secret = ""
        self.asked = 0

    def reset(self, task: Task) -> tuple[Message, ...]:
        """Take the secret of `task`; all episodes of a group have the same. Raises ConfigError for an unknown object."""
        if task.answer not in self.objects:
            raise ConfigError(f"twenty_questions: no object {task.answer!r} (known: {', '.join(self.objects)})")
        self.secret, self.asked = task.answer, 0
        return task.prompt

    def step(self, said: Message) -> Reply:
        """Answer one question."""
        self.asked += 1
        words = said.text.strip().rstrip("?").split()
        valid = bool(words) and words[0] in OPENINGS and len(words) <= LONGEST
        named = valid and words[-1] == self.secret
        yes = named or (valid and self.secret in self.table.get(said.text.strip(), frozenset()))
        done = named or self.asked >= self.horizon
        return Reply((Message("user", "Yes." if yes else "No."),), reward=0.0 if named else -1.0, done=done)


def optimum(table: str) -> float:
    """The highest mean return over the objects of a table: dynamic programming over the sets of objects that are left."""
    objects, questions = TABLES[table]

    @cache
    def best(left: frozenset[str]) -> float:
        n = len(left)
        if n == 1:
            return 0.0
        returns = [(n - 1) / n * (best(left - {name}) - 1) for name in left]
        for true in questions.values():
            yes, no = left & true, left - true
            if yes and no:
                returns.append((len(yes) * best(yes) + len(no) * best(no)) / n - 1)
        return max(returns)

    return best(frozenset(objects))


def ideal(objects: int) -> float:
    """`optimum` for a table with a question for every split of so many objects."""
    best = [0.0, 0.0]
    for n in range(2, objects + 1):
        splits = (k * best[k] + (n - k) * best[n - k] for k in range(1, n // 2 + 1))
        best.append(max(max(splits) / n - 1, (n - 1) / n * (best[n - 1] - 1)))
    return best[objects]
