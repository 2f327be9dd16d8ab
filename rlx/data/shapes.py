"""Drawn shapes to look at: a task for vision-language models, with a demonstrator that sees badly and reasons well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlx.data.formats import demonstration, turn
from rlx.envs.single import SingleTurn
from rlx.rewards.rules import answer_match
from rlx.types import ConfigError, Episode, Image, Message, Task, TaskSource

# All of the same sum, so that a shape's brightness says nothing about its colour.
COLOURS = {
    "red": (250, 70, 70),
    "green": (70, 250, 70),
    "blue": (70, 70, 250),
    "yellow": (190, 190, 10),
    "purple": (190, 10, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("colour", "shape", "compare", "position")

# The sections of an answer (PeBR-R1, arXiv 2509.13031). A template's line of its own each; the last holds the bare answer.
DESCRIPTION, RATIONALES, STEPS, STEP, FINAL = HEADINGS = (
    "### Image Description:",
    "### Rationales:",
    "### Let's think step by step.",
    "### Step 1:",
    "### The final answer is:",
)
EMPTY, NOTHING = ".", "nothing"

SIDE, CELL = 3, 8  # cells along the grid's side, pixels along a cell's
SCENES = 2**20  # scenes are numbered through; held-out ones are from the end


@dataclass(frozen=True)
class Palette:
    """The colours and shapes that there are."""

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all things."""
        return tuple(f"{colour} {shape}" for colour in self.colours for shape in self.shapes)


@dataclass(frozen=True)
class Thing:
    """One shape: `cell` counts 1 to 9 in reading order."""

    cell: int
    colour: str
    shape: str

    @property
    def name(self) -> str:
        """Colour and shape, a keyword of the image."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Question:
    """What is asked of a scene. `about`: a colour, a shape, two of them, or the name of a thing."""

    kind: str
    about: tuple[str, ...]

    @property
    def text(self) -> str:
        """The question in words."""
        first = self.about[0]
        return {
            "colour": f"How many {first} objects?",
            "shape": f"How many {first} objects?",
            "compare": f"More {' or '.join(self.about)} objects?",
            "position": f"What is left of the {first}?",
        }[self.kind]


def shapes(
    *,
    train: int = 3000,
    dev: int = 200,
    test: int = 600,
    demos: int | None = 1500,
    looks: int = 1,
    most: int = 5,
    colours: int = 5,
    kinds: int = 4,
    error_rate: float = 0.3,
    noise: float = 12.0,
    heavy_noise: float = 40.0,
    data_seed: int = 0,
) -> TaskSource:
    """Images of 1 to `most` shapes with a question about each: "How many red objects?", answer "2".

    24x24 pixels, a grid of 3x3 cells: the first `kinds` of circles, squares, triangles and crosses in the first `colours` of
    COLOURS, moved by a pixel or less from the middle of their cell, on a dark grey of random brightness, with normal noise
    of standard deviation `noise` (of 255). Four kinds of question, equally often: how many of a colour, how many of a shape,
    which of two colours or shapes there are more of (or "equal"), and what stands left of a thing in its row (or
    "nothing"). An answer has five sections (HEADINGS), of which the last holds the bare answer.

    Splits: train, dev and test (a question each, scenes of their own), `noisy` (test with `heavy_noise`), `demos` (the last
    `demos` of train, answered in the five sections; of `looks` of each, all but the first ask other questions) and `captions`
    (the scenes of train with a right description alone). In a demonstration's description each thing is left out or said to
    have another colour or shape with probability `error_rate`, one as often as the other, in each look anew; its reasoning is
    right about what the description says. So several looks at an image differ, and only the description tells what follows.
    meta: `keywords` (the names of the things there are), `vocabulary` (all names), `kind`, `things` (how many), and in
    demonstrations `correct`.
    Everything is a function of the settings; `data_seed` draws it all.

    Raises ConfigError: a setting out of range.
    """
    if not 0.0 <= error_rate <= 1.0:
        raise ConfigError(f"error_rate: expected a probability from 0 to 1, got {error_rate}")
    if not 1 <= most <= SIDE * SIDE:
        raise ConfigError(f"most: expected 1 to {SIDE * SIDE} shapes, got {most}")
    if not (2 <= colours <= len(COLOURS) and 2 <= kinds <= len(SHAPES)):
        raise ConfigError(
            f"expected 2 to {len(COLOURS)} colours and 2 to {len(SHAPES)} kinds of shapes, got {colours} and {kinds}"
        )
    if min(train, demos or 1, looks) < 1 or min(dev, test) < 0 or train + dev + test > SCENES:
        raise ConfigError(
            "expected dev and test of at least 0, demos, looks and train of at least 1, "
            f"got {dev}, {test}, {demos}, {looks}, {train}"
        )
    palette = Palette(tuple(COLOURS)[:colours], SHAPES[:kinds])
    draw = cache(partial(rows, palette=palette, most=most, data_seed=data_seed))  # splits of the same scenes share them
    held_out = SCENES - dev - test
    return TaskSource(
        {
            "captions": lambda: [captioned(row) for row in draw(0, train, noise)],
            "demos": lambda: [
                demonstrated(row, palette, error_rate, data_seed, row.number * looks + look, look)
                for row in draw(0, train, noise)[-(demos or train) :]
                for look in range(looks)
            ],
            "train": lambda: [row.episode() for row in draw(0, train, noise)],
            "dev": lambda: [row.episode() for row in draw(held_out, dev, noise)],
            "test": lambda: [row.episode() for row in draw(held_out + dev, test, noise)],
            "noisy": lambda: [row.episode() for row in draw(held_out + dev, test, heavy_noise)],
        },
        verifier=partial(answer_match, extract="whole", after=FINAL),
        make_env=SingleTurn,
        max_new_tokens=300,
    )


@dataclass(frozen=True)
class Row:
    """A scene, its image, a question about it and its place in the data."""

    number: int
    scene: tuple[Thing, ...]
    image: Image
    question: Question
    names: tuple[str, ...]

    def task(self, text: str, answer: str, **meta: bool) -> Task:
        """The image and `text` as a question."""
        keywords = tuple(dict.fromkeys(thing.name for thing in self.scene))
        known = {"keywords": keywords, "vocabulary": self.names, "kind": self.question.kind, "things": len(self.scene)}
        return Task((Message("user", (text, self.image)),), answer, {**known, **meta})

    def episode(self, **meta: bool) -> Episode:
        """The question, to be played."""
        return Episode(self.task(self.question.text, answer(self.question, self.scene), **meta), self.number)


def rows(first: int, count: int, noise: float, *, palette: Palette, most: int, data_seed: int) -> list[Row]:
    """The scenes from number `first` on. Each is drawn from its number alone."""
    made = []
    for number in range(first, first + count):
        rng = np.random.default_rng([data_seed, number])
        scene = draw_scene(rng, palette, most)
        question = draw_question(rng, palette, scene, KINDS[number % len(KINDS)])
        made.append(Row(number, scene, Image(render(scene, rng, noise)), question, palette.names))
    return made


# --------------------------------------------------------------------------- scenes and their images
def draw_scene(rng: np.random.Generator, palette: Palette, most: int) -> tuple[Thing, ...]:
    """1 to `most` things in cells of their own, in reading order."""
    cells = sorted(rng.choice(SIDE * SIDE, int(rng.integers(1, most + 1)), replace=False).tolist())
    return tuple(draw_thing(rng, palette, cell + 1) for cell in cells)


def draw_thing(rng: np.random.Generator, palette: Palette, cell: int) -> Thing:
    """Any thing."""
    colour, shape = rng.integers(len(palette.colours)), rng.integers(len(palette.shapes))
    return Thing(cell, palette.colours[colour], palette.shapes[shape])


def render(scene: Sequence[Thing], rng: np.random.Generator, noise: float) -> NDArray[np.uint8]:
    """The scene as pixels (24,24,3): things on grey, each moved by -1, 0 or 1 pixel along both axes, and noise on all."""
    image = np.full((SIDE * CELL, SIDE * CELL, 3), rng.uniform(20, 60), np.float32)
    moves = rng.integers(-1, 2, size=(len(scene), 2))
    for thing, move in zip(scene, moves, strict=True):
        y, x = divmod(thing.cell - 1, SIDE)
        points = POINTS[thing.shape] + move
        image[points[:, 0] + y * CELL, points[:, 1] + x * CELL] = COLOURS[thing.colour]
    image *= rng.uniform(0.8, 1.1)
    image += np.float32(noise) * rng.standard_normal(image.shape, np.float32)
    return image.clip(0, 255).astype(np.uint8)


def mask(shape: str) -> NDArray[Any]:
    """Which pixels of a cell a shape in its middle covers: (8,8), within the inner 6x6."""
    y, x = np.mgrid[0:CELL, 0:CELL] - (CELL - 1) / 2
    inner = np.maximum(abs(x), abs(y)) < 3
    found: dict[str, NDArray[Any]] = {
        "circle": x**2 + y**2 <= 7,
        "square": np.maximum(abs(x), abs(y)) < 3,
        "triangle": inner & (abs(x) <= (y + 3.5) / 2),
        "cross": inner & (np.minimum(abs(x), abs(y)) < 1),
    }
    return found[shape]


POINTS = {shape: np.argwhere(mask(shape)) for shape in SHAPES}


# --------------------------------------------------------------------------- questions and answers
def draw_question(rng: np.random.Generator, palette: Palette, scene: Sequence[Thing], kind: str) -> Question:
    """A question of `kind`, about what there is more often than about what there is not."""
    thing, other = (scene[int(i)] for i in rng.integers(len(scene), size=2))
    present = bool(rng.random() < 0.75)
    if kind == "position":
        neighboured = [t for t in scene if left_of(t.name, scene) not in (None, NOTHING)]
        return Question(kind, (neighboured[0].name if neighboured and present else thing.name,))
    asked = thing if present else draw_thing(rng, palette, 0)
    if kind == "compare":
        return Question(kind, comparison(rng, palette, asked, other))
    return Question(kind, (asked.colour if kind == "colour" else asked.shape,))


def comparison(rng: np.random.Generator, palette: Palette, first: Thing, second: Thing) -> tuple[str, str]:
    """Two colours or two shapes, not the same."""
    by_colour = bool(rng.random() < 0.5)
    a, b = (first.colour, second.colour) if by_colour else (first.shape, second.shape)
    return a, b if a != b else another(palette.colours if by_colour else palette.shapes, a, float(rng.random()))


def another(values: Sequence[str], value: str, draw: float) -> str:
    """One of the other values; `draw` is uniform from 0 to 1."""
    return values[(values.index(value) + 1 + int(draw * (len(values) - 1))) % len(values)]


def matching(word: str, scene: Sequence[Thing]) -> list[Thing]:
    """The things of a colour or shape."""
    return [thing for thing in scene if word in (thing.colour, thing.shape)]


def left_of(name: str, scene: Sequence[Thing]) -> str | None:
    """The name of the nearest thing to the left of the first thing called `name`, in its row; None: there is no `name`."""
    found = [thing for thing in scene if thing.name == name]
    if not found:
        return None
    at = found[0].cell
    row = [t for t in scene if (t.cell - 1) // SIDE == (at - 1) // SIDE and t.cell < at]
    return row[-1].name if row else NOTHING


def answer(question: Question, scene: Sequence[Thing]) -> str:
    """The right answer where `scene` is all there is."""
    if question.kind == "position":
        return left_of(question.about[0], scene) or NOTHING
    counts = [len(matching(word, scene)) for word in question.about]
    if question.kind == "compare":
        return "equal" if counts[0] == counts[1] else question.about[int(counts[1] > counts[0])]
    return str(counts[0])


# --------------------------------------------------------------------------- demonstrations
def describe(scene: Sequence[Thing]) -> str:
    """The grid in reading order, a name or "." for each cell."""
    names = {thing.cell: thing.name for thing in scene}
    return " ".join(names.get(cell, EMPTY) for cell in range(1, SIDE * SIDE + 1))


def trace(question: Question, scene: Sequence[Thing]) -> str:
    """The five sections of an answer that is right about `scene`."""
    if question.kind == "position":
        steps = [left_of(question.about[0], scene) or NOTHING]
    else:
        steps = [thing.name for word in question.about for thing in matching(word, scene)]
    return (
        f"{DESCRIPTION} {describe(scene)}\n{RATIONALES} {question.kind} {' or '.join(question.about)}\n{STEPS}\n"
        f"{STEP} {' '.join(steps) or NOTHING}\n{FINAL} {answer(question, scene)}"
    )


def misseen(scene: Sequence[Thing], palette: Palette, error_rate: float, rng: np.random.Generator) -> list[Thing]:
    """The scene as one who looks badly describes it."""
    said = []
    for thing in scene:
        err, omit, of_colour, draw = rng.random() < error_rate, rng.random() < 0.5, rng.random() < 0.5, float(rng.random())
        if not err:
            said.append(thing)
        elif not omit and of_colour:
            said.append(replace(thing, colour=another(palette.colours, thing.colour, draw)))
        elif not omit:
            said.append(replace(thing, shape=another(palette.shapes, thing.shape, draw)))
    return said


def demonstrated(row: Row, palette: Palette, error_rate: float, data_seed: int, group: int, look: int) -> Episode:
    """A question with an answer whose description errs; every further look asks another question and errs in its own way."""
    rng = np.random.default_rng([data_seed, row.number, 1 + look])
    said = misseen(row.scene, palette, error_rate, rng)
    if look:
        row = replace(row, question=draw_question(rng, palette, row.scene, KINDS[(row.number + look) % len(KINDS)]))
    right = answer(row.question, said) == answer(row.question, row.scene)
    return demonstration(row.episode(correct=right).task, group, [turn(trace(row.question, said))])


def captioned(row: Row) -> Episode:
    """The image with a right description."""
    right = f"{DESCRIPTION} {describe(row.scene)}"
    return demonstration(row.task("Describe.", right), row.number, [turn(right)])
