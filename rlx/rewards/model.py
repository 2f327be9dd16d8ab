"""A trained reward model as a reward: one number for a whole conversation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch

from rlx import offload
from rlx.models.language import plain, with_said
from rlx.models.load import first_line, place, read_tokenizer
from rlx.types import ConfigError, Episode, Message, Status


def reward_model(
    episodes: list[Episode], *, path: str, token_budget: int = 16384, max_length: int | None = None
) -> list[float]:
    """The scalar that a sequence classifier with one label gives to prompt and completion, in units of its own.

    Read is the conversation as text, prompt first, with the replies of an environment: through the reward model's own
    tokenizer and chat template; without a template the texts follow one another, with the end token after a completion
    that was not cut. The policy's tokens are not read, so the two may have different vocabularies.

    path: a directory that save_pretrained wrote, or a hub id; safetensors only, loaded once in a process, float32 on a
    CPU and bfloat16 on a GPU. token_budget: tokens of a batch, padding counted; it changes no score. max_length: a text of
    more tokens is not scored (nan) instead of being cut.

    Raises ConfigError: no such model, no tokenizer or padding token, more labels than one, or weights without the head.
    """
    module, tokenizer = load(path)
    offload.bring(module)
    rows = [encode(tokenizer, episode) for episode in episodes]
    scores = [float("nan")] * len(rows)
    fits = [i for i, row in enumerate(rows) if row and (max_length is None or len(row) <= max_length)]
    for batch in batches([len(row) for row in rows], fits, token_budget):
        for i, value in zip(batch, forward(module, [rows[i] for i in batch]), strict=True):
            scores[i] = value
    return scores


@functools.cache
def load(path: str) -> tuple[Any, Any]:
    """The classifier, on the GPU if there is one, and its tokenizer. Raises ConfigError."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    what, where = f"model {path!r}", place(path)
    tokenizer = read_tokenizer(path, trust_remote_code=False)
    gpu = torch.cuda.is_available()
    try:
        config = AutoConfig.from_pretrained(where)
        if config.num_labels != 1:
            raise ConfigError(f"{what}: it has {config.num_labels} labels; a reward model has one (num_labels: 1)")
        pad = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        if pad is None:
            raise ConfigError(f"{what}: neither its config nor its tokenizer has a padding token; set pad_token_id")
        config.pad_token_id = pad
        module, report = AutoModelForSequenceClassification.from_pretrained(
            where,
            config=config,
            dtype=torch.bfloat16 if gpu else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{what}: {first_line(error)}") from error
    if report["missing_keys"]:  # transformers would draw them at random
        raise ConfigError(f"{what}: its weights lack {', '.join(sorted(report['missing_keys']))}")
    module = module.to("cuda" if gpu else "cpu").eval()
    offload.keep(module)
    return module, tokenizer


def encode(tokenizer: Any, episode: Episode) -> list[int]:
    """The ids of a conversation as the reward model reads it."""
    talk: Sequence[Message] = episode.task.prompt
    for turn in episode.turns:
        talk = [*with_said(talk, turn.said or Message("assistant", "")), *turn.replies]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(plain(talk), tokenize=False)
        return cast("list[int]", tokenizer.encode(text, add_special_tokens=False))
    end = "" if episode.status is Status.TRUNCATED else tokenizer.eos_token or ""
    return cast("list[int]", tokenizer.encode("".join(m.text for m in talk) + end))


def batches(lengths: Sequence[int], chosen: Sequence[int], budget: int) -> list[list[int]]:
    """`chosen` by length, cut where a batch padded to its longest row would pass the budget; a row alone may."""
    made: list[list[int]] = []
    for i in sorted(chosen, key=lambda i: lengths[i]):
        if made and lengths[i] * (len(made[-1]) + 1) <= budget:
            made[-1].append(i)
        else:
            made.append([i])
    return made


@torch.no_grad()
def forward(module: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """One scalar a row. Padding stands on the right, so every token keeps its position."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), int(module.config.pad_token_id))
    attend = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        attend[i, : len(row)] = 1
    out = module(input_ids=ids.to(module.device), attention_mask=attend.to(module.device))
    return cast("list[float]", out.logits[:, 0].float().tolist())
