"""A vision-language model of a few hundred thousand weights, to see small pictures with on a CPU."""

from __future__ import annotations

import torch

from rlx.models.language import LanguageModel
from rlx.models.load import Dtype, finish
from rlx.models.lora import Lora
from rlx.models.tokenizer import IMAGE, byte_tokenizer


def tiny_vlm(
    *,
    layers: int = 2,
    hidden: int = 96,
    heads: int = 4,
    ffn: int = 256,
    vision_layers: int = 1,
    vision_hidden: int = 64,
    image: int = 24,
    patch: int = 8,
    words: list[str] | None = None,
    context: int = 512,
    dtype: Dtype = "fp32",
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> LanguageModel:
    """A small vision-language model of the LLaVA architecture with random weights (drawn from `seed`).

    A SigLIP vision tower reads `image` x `image` pixels in patches of `patch` x `patch`, a feature each; a projector of two
    layers makes them inputs of a Qwen2 decoder. The tokenizer is that of bytes, with `words` as tokens of their own.

    The decoder's weights have standard deviation 1/sqrt(`hidden`): at the 0.02 of large models so narrow a decoder's attention
    is even at first, and takes hundreds of steps to look anywhere.
    """
    from transformers import (
        AutoModelForImageTextToText,
        LlavaConfig,
        LlavaProcessor,
        Qwen2Config,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    tokenizer = byte_tokenizer(words or [], images=True)
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": image, "width": image}),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=2,
            image_size=image,
            patch_size=patch,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            initializer_range=hidden**-0.5,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(image // patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForImageTextToText.from_config(config)
    return finish(
        module,
        processor,
        dtype=dtype,
        lora=lora,
        device=device,
        seed=seed,
        source="tiny_vlm",
        recomputes=activation_checkpointing,
    )


tiny_vlm.mixes = False  # type: ignore[attr-defined]
