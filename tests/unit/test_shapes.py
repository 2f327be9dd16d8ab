"""shapes: images, questions and answers by hand, splits, and what the demonstrator gets wrong."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rlx.data import shapes as made
from rlx.data.shapes import COLOURS, HEADINGS, SHAPES, Question, Thing, answer, describe, left_of, mask, shapes, trace
from rlx.rewards.rules import answer_match
from rlx.types import ConfigError, Episode, Image

# . red circle blue square
# . .          .
# . red cross  .
SCENE = (Thing(2, "red", "circle"), Thing(3, "blue", "square"), Thing(8, "red", "cross"))


def test_answers_by_hand() -> None:
    assert answer(Question("colour", ("red",)), SCENE) == "2"
    assert answer(Question("colour", ("green",)), SCENE) == "0"
    assert answer(Question("shape", ("square",)), SCENE) == "1"
    assert answer(Question("compare", ("blue", "red")), SCENE) == "red"
    assert answer(Question("compare", ("circle", "square")), SCENE) == "equal"
    assert answer(Question("position", ("blue square",)), SCENE) == "red circle"
    assert answer(Question("position", ("red circle",)), SCENE) == "nothing"
    assert left_of("green cross", SCENE) is None


def test_a_trace_by_hand() -> None:
    assert describe(SCENE) == ". red circle blue square . . . . red cross ."
    assert trace(Question("colour", ("red",)), SCENE) == (
        "### Image Description: . red circle blue square . . . . red cross .\n"
        "### Rationales: colour red\n"
        "### Let's think step by step.\n"
        "### Step 1: red circle red cross\n"
        "### The final answer is: 2"
    )
    assert trace(Question("position", ("blue square",)), SCENE).endswith(
        "Step 1: red circle\n### The final answer is: red circle"
    )
    assert "### Step 1: nothing\n" in trace(Question("shape", ("triangle",)), SCENE)


def test_questions_in_words() -> None:
    assert Question("colour", ("red",)).text == "How many red objects?"
    assert Question("compare", ("red", "blue")).text == "More red or blue objects?"
    assert Question("position", ("red circle",)).text == "What is left of the red circle?"


def test_an_image_without_noise_shows_each_thing_in_its_cell() -> None:
    image = made.render(SCENE, np.random.default_rng(0), 0.0)
    assert image.shape == (24, 24, 3)
    assert image.dtype == np.uint8
    grey = image.min(axis=2) == image.max(axis=2)
    for cell in range(9):
        y, x = divmod(cell, 3)
        inside = image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8][~grey[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]]
        thing = next((t for t in SCENE if t.cell == cell + 1), None)
        assert len(inside) == (mask(thing.shape).sum() if thing else 0)
        if thing is not None:
            assert len(np.unique(inside, axis=0)) == 1
            shown = inside[0] / inside[0].sum()
            np.testing.assert_allclose(shown, np.array(COLOURS[thing.colour]) / sum(COLOURS[thing.colour]), atol=0.01)


def test_shapes_differ_and_stay_in_their_cell_when_moved_by_a_pixel() -> None:
    assert len({mask(shape).tobytes() for shape in SHAPES}) == len(SHAPES)
    for shape in SHAPES:
        edge = mask(shape).copy()
        edge[1:-1, 1:-1] = False
        assert not edge.any()


def test_splits_are_of_scenes_of_their_own_and_depend_on_the_seed_alone() -> None:
    source = shapes(train=40, dev=10, test=20, demos=30)
    splits = {name: split() for name, split in source.splits.items()}
    assert {name: len(rows) for name, rows in splits.items()} == {
        "captions": 40,
        "demos": 30,
        "train": 40,
        "dev": 10,
        "test": 20,
        "noisy": 20,
    }
    groups = {name: {row.group for row in rows} for name, rows in splits.items()}
    assert not groups["train"] & groups["dev"] | groups["train"] & groups["test"] | groups["dev"] & groups["test"]
    assert groups["demos"] < groups["train"] == groups["captions"]
    again = shapes(train=40, dev=10, test=20, demos=30).splits["test"]()
    other = shapes(train=40, dev=10, test=20, demos=30, data_seed=1).splits["test"]()
    assert [same(a, b) for a, b in zip(splits["test"], again, strict=True)] == [True] * 20
    assert not any(same(a, b) for a, b in zip(splits["test"], other, strict=True))
    assert Counter(row.task.meta["kind"] for row in splits["train"]) == dict.fromkeys(made.KINDS, 10)


def same(a: Episode, b: Episode) -> bool:
    """Whether two rows show the same pixels."""
    return np.array_equal(picture(a).pixels, picture(b).pixels)


def picture(row: Episode) -> Image:
    """The image of a row."""
    return row.task.prompt[0].images[0]


def test_a_larger_split_begins_as_the_smaller_one() -> None:
    few, many = (shapes(train=n, demos=5).splits["train"]() for n in (5, 9))
    assert [a.task.answer for a in few] == [b.task.answer for b in many[:5]]
    assert all(same(a, b) for a, b in zip(few, many, strict=False))


def test_noisy_is_the_test_with_more_noise() -> None:
    source = shapes(train=5, test=5, demos=5)
    clean, noisy = source.splits["test"](), source.splits["noisy"]()
    assert [a.task.answer for a in clean] == [b.task.answer for b in noisy]
    quiet = shapes(train=5, test=5, demos=5, noise=0.0).splits["test"]()
    off = [
        np.abs(picture(a).pixels.astype(float) - picture(q).pixels).mean()
        for rows in (clean, noisy)
        for a, q in zip(rows, quiet, strict=True)
    ]
    assert max(off[:5]) < min(off[5:])


def test_without_errors_every_demonstration_is_right() -> None:
    for row in shapes(train=60, error_rate=0.0).splits["demos"]():
        assert row.task.meta["correct"]
        assert answer_match([row], extract="whole", after=HEADINGS[-1]) == [1.0]
        assert all(heading in row.completion for heading in HEADINGS)
        assert all(word in row.completion for word in row.task.meta["keywords"])
        assert set(row.task.meta["keywords"]) <= set(row.task.meta["vocabulary"])


def test_demonstrations_misdescribe_at_the_error_rate_and_reason_rightly_about_what_they_say() -> None:
    source = shapes(train=600, demos=600, error_rate=0.3)
    rows = source.splits["demos"]()
    wrong = total = 0
    for row, truth in zip(rows, shapes(train=600, demos=600, error_rate=0.0).splits["demos"](), strict=True):
        said, shown = (cells(r.completion) for r in (row, truth))
        total += sum(x != "." for x in shown)
        wrong += sum(a != b for a, b in zip(said, shown, strict=True))
        assert all(a == b for a, b in zip(said, shown, strict=True) if b == ".")
        assert row.task.meta["correct"] == (answer_match([row], extract="whole", after=HEADINGS[-1]) == [1.0])
    assert 0.27 < wrong / total < 0.33
    assert 0.6 < np.mean([row.task.meta["correct"] for row in rows]) < 0.9


def test_demonstrations_are_of_the_last_scenes_and_each_look_errs_in_its_own_way() -> None:
    source = shapes(train=60, demos=40, looks=3, error_rate=0.5)
    rows, train = source.splits["demos"](), source.splits["train"]()
    assert len({row.group for row in rows}) == len(rows) == 120
    scenes = [rows[i : i + 3] for i in range(0, 120, 3)]
    for looks, shown in zip(scenes, train[20:], strict=True):
        assert all(same(row, shown) for row in looks)
        assert looks[0].task.prompt[0].content[0] == shown.task.prompt[0].content[0]
        assert len({row.task.meta["kind"] for row in looks}) == 3
    assert sum(len({row.completion.splitlines()[0] for row in looks}) > 1 for looks in scenes) > 30


def test_the_answer_of_a_demonstration_is_that_of_the_scene_it_describes() -> None:
    wrong = 0
    for row in shapes(train=200, demos=200, error_rate=0.5).splits["demos"]():
        said = tuple(Thing(i + 1, *name.split()) for i, name in enumerate(cells(row.completion)) if name != ".")
        kind, about = row.completion.splitlines()[1].removeprefix(f"{HEADINGS[1]} ").split(" ", 1)
        stated = answer(Question(kind, tuple(about.split(" or "))), said)
        assert row.completion.endswith(f"{HEADINGS[-1]} {stated}")
        wrong += stated != row.task.answer
    assert wrong > 40


def cells(completion: str) -> list[str]:
    """The nine entries of a description."""
    words = completion.splitlines()[0].removeprefix(HEADINGS[0]).split()
    out: list[str] = []
    while words:
        out.append(words.pop(0) if words[0] == "." else f"{words.pop(0)} {words.pop(0)}")
    assert len(out) == 9
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error_rate": 1.5}, "error_rate: expected a probability from 0 to 1, got 1.5"),
        ({"most": 10}, "most: expected 1 to 9 shapes, got 10"),
        (
            {"train": 0},
            "expected dev and test of at least 0, demos, looks and train of at least 1, got 200, 600, 1500, 1, 0",
        ),
        (
            {"looks": 0},
            "expected dev and test of at least 0, demos, looks and train of at least 1, got 200, 600, 1500, 0, 3000",
        ),
    ],
)
def test_mistakes(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shapes(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message
