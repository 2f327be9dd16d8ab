"""The tokenizer and chat template that come with rlx: one token a byte, nothing to download, nothing unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PAD, END, IMAGE, UNKNOWN = "<|pad|>", "<|end|>", "<|image|>", "<|unknown|>"
ROLES = ("system", "user", "assistant", "tool")

# The generation markers say which tokens are the assistant's own: its text and the end token that it has to learn.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(words: Sequence[str] = (), *, images: bool = False, only: str = "") -> Any:
    """A transformers tokenizer of the 256 bytes (an ASCII character is one token) and a token a role.

    `words` are texts that are one token each wherever they stand, `images` adds the placeholder of an image. With `only`,
    the bytes of these characters stand for all 256, and any other is read as the unknown token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES), *([IMAGE] if images else []), *([UNKNOWN] if only else [])]
    alphabet = sorted({byte for text, _ in level.pre_tokenize_str(only) for byte in text} or level.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN if only else None))
    core.pre_tokenizer = level
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
