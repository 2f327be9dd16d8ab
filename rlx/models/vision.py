"""A vision-language model: a language model that reads images, too. What it says is text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.models.language import LanguageModel, told
from rlx.types import DataError, Episode, Ids, Image, Message

UNSAID = -1e4  # logit of what the policy cannot say; finite, so that 0 probability times it is 0 in the entropy


class VisionLanguage(LanguageModel):
    """A transformers model for images and text, with its processor.

    The chat template writes one placeholder for an image; it becomes the ids that the processor gives for that image, as
    many as the vision tower has features for it. The policy never says a placeholder: its logits are set to UNSAID, in
    sampling as in training.
    """

    def __init__(
        self, module: Any, processor: Any, device: torch.device, *, bf16: bool, source: str, images_kept: int = 512
    ) -> None:
        tokenizer = processor.tokenizer
        if not tokenizer.chat_template:
            tokenizer.chat_template = processor.chat_template
        super().__init__(module, tokenizer, device, bf16=bf16, source=source)
        self.processor = processor  # saved in the tokenizer's place, which it holds
        self.placeholder = int(tokenizer.convert_tokens_to_ids(processor.image_token))
        self.encode = functools.lru_cache(maxsize=images_kept)(self._encode)
        module.get_output_embeddings().register_forward_hook(functools.partial(silence, self.placeholder))

    # ----------------------------------------------------------------- messages -> tokens
    def render(self, messages: Sequence[Message]) -> Ids:
        """The prompt as the policy sees it, (P,) ids, each image with as many placeholders as it has features."""
        ids, left = self.expanded(super().render(messages), [image for m in messages for image in m.images])
        self._check_shown(left)
        return ids

    def extension(self, talk: Sequence[Message], num_replies: int) -> Ids:
        """What the last `num_replies` messages add, their images with them."""
        new = talk[len(talk) - num_replies :]
        ids, left = self.expanded(super().extension(talk, num_replies), [image for m in new for image in m.images])
        self._check_shown(left)
        return ids

    def tokenize(self, episode: Episode) -> Episode:
        """Fill `seen` and `did` of a demonstration's turns."""
        made = super().tokenize(episode)
        images = [image for message in told(episode) for image in message.images]
        for turn in made.turns:
            turn.seen, images = self.expanded(turn.seen, images)
        self._check_shown(images if made.turns else [])
        return made

    def expanded(self, ids: Ids, images: Sequence[Image]) -> tuple[Ids, list[Image]]:
        """`ids` with each placeholder replaced by the ids of its image, and the images that are left.

        Raises DataError where there are more placeholders than images: the text of a message holds the token itself.
        """
        parts, left = [], list(images)
        for part in np.split(ids, np.flatnonzero(np.diff(ids == self.placeholder, prepend=False)) if len(ids) else []):
            if len(part) and part[0] == self.placeholder:
                if len(part) > len(left):
                    raise DataError(f"model {self.source!r}: a text holds {self.processor.image_token!r} where no image is")
                parts += [self.encode(image)[0] for image in left[: len(part)]]
                left = left[len(part) :]
            else:
                parts.append(part)
        return np.concatenate(parts) if parts else ids, left

    def _check_shown(self, left: Sequence[Image]) -> None:
        if left:
            raise DataError(f"model {self.source!r}: its chat template shows no image where {len(left)} of the messages' stand")

    def _encode(self, image: Image) -> tuple[Ids, dict[str, Tensor]]:
        """The ids that stand for an image, and the tensors that the vision tower reads (first dimension: what is joined)."""
        made = self.processor(
            text=[self.processor.image_token], images=[image.pixels], return_tensors="pt", add_special_tokens=False
        )
        text = ("input_ids", "attention_mask", "mm_token_type_ids")
        return made["input_ids"][0].numpy(), {name: x for name, x in made.items() if name not in text}

    # ----------------------------------------------------------------- the forward
    def reading(self, ids: Tensor, attend: Tensor, images: Sequence[Sequence[Image]]) -> dict[str, Any]:
        """What the module reads of padded rows: an image that stands in several of them is looked at once."""
        read = super().reading(ids, attend, images)
        order = [image for row in images for image in row]
        if not order:
            return read
        base, distinct = self.backbone, list(dict.fromkeys(order))
        encoded = [self.encode(image)[1] for image in distinct]
        tensors = {name: torch.cat([x[name] for x in encoded]).to(self.device) for name in encoded[0]}
        with self.autocast():
            seen = base.get_image_features(**tensors, return_dict=True)
        at = {image: i for i, image in enumerate(distinct)}
        seen.pooler_output = [seen.pooler_output[at[image]] for image in order]
        if hasattr(base, "get_rope_index"):  # positions in time, height and width
            kinds = torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()), device=self.device)
            grids = torch.cat([self.encode(image)[1]["image_grid_thw"] for image in order]).to(self.device)
            read["position_ids"] = base.get_rope_index(
                ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=attend
            )[0]
        return {**read, "mm_encoder_outputs": {"image": seen}}

    @property
    def backbone(self) -> Any:
        """What heads read the states of: unlike a decoder alone, it takes images."""
        return self.base.model


def silence(token: int, head: Any, args: Any, logits: Tensor) -> Tensor:
    """A hook of the language-model head: `token` cannot be said."""
    return logits.index_fill(-1, torch.tensor([token], device=logits.device), UNSAID)
