"""Rewards on sections, keywords, length and alignment: values by hand, and what may be missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlx.models.tokenizer import byte_tokenizer
from rlx.rewards import alignment
from rlx.rewards.alignment import annotation_similarity, clip_similarity, scaled
from rlx.rewards.rules import answer_match
from rlx.rewards.sections import keyword_recall, length_limit, section, sections
from rlx.types import ConfigError, DataError, Episode, Image, Message, Task, Turn

BEGIN, END, FINAL = "### Image Description:", "### Rationales:", "### The final answer is:"


def said(text: str, tokens: int = 1, answer: str | None = None, image: Image | None = None, **meta: Any) -> Episode:
    """An episode in which the policy said `text` in so many tokens."""
    content = (image, "What?") if image is not None else "What?"
    turn = Turn(np.zeros(1, np.int64), np.zeros(tokens, np.int64), np.zeros(tokens, np.float32), Message("assistant", text))
    return Episode(Task((Message("user", content),), answer, meta), 0, [turn])


# --------------------------------------------------------------------------- sections
def test_a_section_stands_between_two_headings() -> None:
    text = f"x {BEGIN} a b\n{END} c"
    assert section(text, BEGIN, END) == "a b"
    assert section(text, END, None) == "c"
    assert section(text, BEGIN, FINAL) == section(text, FINAL, None) == section("", BEGIN, END) == ""


def test_sections_asks_for_every_heading() -> None:
    episodes = [said(f"{BEGIN} {END}"), said(BEGIN), said("")]
    assert sections(episodes, headings=[BEGIN, END]) == [1.0, 0.0, 0.0]


# --------------------------------------------------------------------------- keywords
def test_keyword_recall_by_hand() -> None:
    words = ["red circle", "Blue square", "red cross"]
    episode = said(f"{BEGIN} a RED circle and a blue square {END} a red cross?", keywords=words)
    assert keyword_recall([episode]) == [1.0]
    assert keyword_recall([episode], begin=BEGIN, end=END) == pytest.approx([2 / 3])
    assert keyword_recall([said("nothing", keywords=words), said("red circle", keywords=[])]) == [0.0, 0.0]


def test_keywords_match_within_words_unless_told() -> None:
    episode = said("bored", keywords=("red",))
    assert keyword_recall([episode]) == [1.0]
    assert keyword_recall([episode], whole_words=True) == [0.0]
    assert keyword_recall([said("a red.", keywords=("red",))], whole_words=True) == [1.0]


def test_keywords_have_to_be_there() -> None:
    with pytest.raises(DataError, match="group 0, column 'words': expected a list of texts, got no such column"):
        keyword_recall([said("x", keywords=["a"])], column="words")
    with pytest.raises(DataError, match="expected a list of texts, got 'red'"):
        keyword_recall([said("x", keywords="red")])


# --------------------------------------------------------------------------- length
def test_length_limit_by_hand() -> None:
    assert length_limit([said("", 300), said("", 512), said("", 1024)], limit=512) == [1.0, 1.0, 0.5]
    with pytest.raises(ConfigError, match="limit: expected at least 1 token, got 0"):
        length_limit([said("")], limit=0)


# --------------------------------------------------------------------------- answers after a heading
@pytest.mark.parametrize(
    ("text", "right"),
    [
        (f"{FINAL} 2", 1.0),
        (f"{FINAL}\n2\n3", 1.0),
        (f"3 {FINAL} 2.0", 1.0),
        (f"{FINAL} 3", 0.0),
        (f"2\n{FINAL}", 0.0),
        (f"{FINAL} 3\n{FINAL} 2", 1.0),
        ("2", 1.0),
    ],
)
def test_the_answer_is_the_first_line_after_the_heading(text: str, right: float) -> None:
    assert answer_match([said(text, answer="2")], extract="whole", after=FINAL) == [right]


# --------------------------------------------------------------------------- alignment
def test_scaled_by_hand() -> None:
    assert [scaled(s, 0.4) for s in (0.2, 0.4, 0.9, -0.5)] == [0.5, 1.0, 1.0, 0.0]


def test_annotation_similarity_by_hand() -> None:
    names = ("red circle", "red cross", "blue square", "blue cross")
    row = {"keywords": names[:2], "vocabulary": names}
    episodes = [
        said("red circle red cross", **row),
        said("red circle", **row),  # 1 / sqrt(2 * 1)
        said("red circle red cross blue square blue cross", **row),  # 2 / sqrt(2 * 4)
        said("blue square", **row),
        said("", **row),
    ]
    assert annotation_similarity(episodes) == pytest.approx([1.0, 0.5**0.5, 0.5**0.5, 0.0, 0.0])
    assert annotation_similarity(episodes[1:2], scale=0.9) == pytest.approx([0.5**0.5 / 0.9])
    assert annotation_similarity([said(f"{BEGIN} red cross {END} red circle", **row)], begin=BEGIN, end=END) == pytest.approx(
        [0.5**0.5]
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model as a directory."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 12,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(1)
    transformers.CLIPModel(config).save_pretrained(folder)
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return str(folder)


def pictures() -> list[Image]:
    """Two random pictures."""
    rng = np.random.default_rng(0)
    return [Image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]


def test_clip_similarity_is_the_cosine_that_the_model_gives(clip: str) -> None:
    model, processor = (
        transformers.CLIPModel.from_pretrained(clip).eval(),
        transformers.CLIPProcessor.from_pretrained(clip),
    )
    texts = ["red", "a blue one", "zebra", "42"]
    shown = [pictures()[i % 2] for i in range(4)]
    episodes = [said(f"{BEGIN} {text} {END}", image=image) for text, image in zip(texts, shown, strict=True)]
    found = clip_similarity(episodes, path=clip, begin=BEGIN, end=END, scale=1.0)
    read = processor(text=texts, images=[i.pixels for i in shown], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**read)
    expected = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert found == pytest.approx(expected.clamp(min=0).tolist(), abs=1e-5)
    assert len({round(x, 3) for x in found}) > 2


def test_clip_similarity_of_what_is_missing(clip: str) -> None:
    image = pictures()[0]
    assert clip_similarity([said("no section", image=image)], path=clip, begin=BEGIN, end=END) == [0.0]
    long = clip_similarity([said("red " * 50, image=image)], path=clip, scale=1.0)
    head = clip_similarity([said("red " * 3, image=image)], path=clip, scale=1.0)  # twelve tokens are read
    assert long == head != [0.0]
    with pytest.raises(DataError, match="the prompt of group 0 has no image"):
        clip_similarity([said("red")], path=clip)
    with pytest.raises(ConfigError, match="scale: expected more than 0, got 0"):
        clip_similarity([said("red", image=image)], path=clip, scale=0.0)
    with pytest.raises(ConfigError, match="expected a directory that save_pretrained wrote"):
        clip_similarity([said("red", image=image)], path="./none")


def test_samples_of_a_prompt_share_one_embedding_of_its_image(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    embed = alignment.embed_images
    monkeypatch.setattr(alignment, "embed_images", lambda m, p, images: counts.append(len(images)) or embed(m, p, images))
    image = pictures()[0]
    values = clip_similarity([said(text, image=image) for text in ("red", "blue", "red")], path=clip)
    assert counts == [1]
    assert values[0] == values[2]
