"""Rewards for a description that fits its image: the cosine of two embeddings (PeBR-R1, arXiv 2509.13031)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rlx import offload
from rlx.models.load import first_line, place
from rlx.rewards.sections import listed, section
from rlx.types import ConfigError, DataError, Episode, Image


def clip_similarity(
    episodes: list[Episode],
    *,
    path: str,
    begin: str | None = None,
    end: str | None = None,
    scale: float = 0.4,
    max_tokens: int | None = None,
) -> list[float]:
    """min(1, max(0, s) / scale), s the cosine of the image's and the description's embedding by a CLIP model.

    The image is the first of the prompt. The description is the completion, or what stands between the headings `begin`
    and `end`; an empty one gets 0. path: a CLIP-like model with its processor, a directory or a hub id, loaded once in a
    process. max_tokens: how much of a long description is read (default: the text encoder's own limit). An image is
    embedded once for a group.

    Raises ConfigError: no such model, or one without image and text embeddings; a scale that is not positive. DataError: a
    prompt without an image.
    """
    if scale <= 0:
        raise ConfigError(f"reward clip_similarity: scale: expected more than 0, got {scale}")
    texts = [described(episode, begin, end) for episode in episodes]
    asked = [i for i, text in enumerate(texts) if text]
    values = [0.0] * len(episodes)
    if asked:
        model, processor = load(path)
        offload.bring(model)
        images = {id(image): image for image in (first_image(episodes[i]) for i in asked)}
        seen = dict(zip(images, embed_images(model, processor, list(images.values())), strict=True))
        said = embed_texts(model, processor, [texts[i] for i in asked], max_tokens)
        for i, text in zip(asked, said, strict=True):
            values[i] = scaled(float(seen[id(first_image(episodes[i]))] @ text), scale)
    return values


def annotation_similarity(
    episodes: list[Episode],
    *,
    column: str = "keywords",
    vocabulary: str = "vocabulary",
    begin: str | None = None,
    end: str | None = None,
    scale: float = 1.0,
) -> list[float]:
    """`clip_similarity` with an encoder that sees perfectly: the cosine of two sets of names, n / sqrt(|A| |B|).

    A are the names that the row's `column` says the image shows, B those of its column `vocabulary` that the description
    holds, n counts what is in both. Unlike recall it falls with every name that the image does not show.
    """
    values = []
    for episode in episodes:
        shown = set(listed(episode, column, "annotation_similarity"))
        text = described(episode, begin, end)
        said = {name for name in listed(episode, vocabulary, "annotation_similarity") if name in text}
        both = math.sqrt(len(shown) * len(said))
        values.append(scaled(len(shown & said) / both if both else 0.0, scale))
    return values


def scaled(cosine: float, scale: float) -> float:
    """min(1, max(0, cosine) / scale): from 0 to 1."""
    return min(1.0, max(0.0, cosine) / scale)


def described(episode: Episode, begin: str | None, end: str | None) -> str:
    """The completion, or its section between two headings."""
    return episode.completion if begin is None else section(episode.completion, begin, end)


def first_image(episode: Episode) -> Image:
    """The first image of the prompt. Raises DataError: there is none."""
    for message in episode.task.prompt:
        for image in message.images:
            return image
    raise DataError(f"reward clip_similarity: the prompt of group {episode.group} has no image")


# --------------------------------------------------------------------------- the encoder
@functools.cache
def load(path: str) -> tuple[Any, Any]:
    """The model, on the GPU if there is one, and its processor. Raises ConfigError."""
    from transformers import AutoModel, AutoProcessor

    where = place(path)
    try:
        processor = AutoProcessor.from_pretrained(where)
        model = AutoModel.from_pretrained(where, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {path!r}: {first_line(error)}") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ConfigError(f"model {path!r}: {type(model).__name__} does not embed images and texts; expected a CLIP model")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    offload.keep(model)
    return model, processor


@torch.no_grad()
def embed_images(model: Any, processor: Any, images: Sequence[Image]) -> Tensor:
    """Unit vectors (I,D) of images."""
    read = processor(images=[image.pixels for image in images], return_tensors="pt").to(model.device)
    return unit(model.get_image_features(**read))


@torch.no_grad()
def embed_texts(model: Any, processor: Any, texts: list[str], max_tokens: int | None) -> Tensor:
    """Unit vectors (N,D) of texts, each cut to `max_tokens` or to the encoder's limit."""
    limit = max_tokens or int(model.config.text_config.max_position_embeddings)
    read = processor(text=texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
    return unit(model.get_text_features(**read))


def unit(embedded: Any) -> Tensor:
    """Embeddings (N,D), as a model gives them, with length 1, float32 on the CPU."""
    vectors = cast(Tensor, embedded if isinstance(embedded, Tensor) else embedded.pooler_output)
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()
