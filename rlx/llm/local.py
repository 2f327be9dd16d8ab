"""A language model in this process: one that the stage has, or one of a directory or hub id."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from rlx import offload
from rlx.rollout.noise import key
from rlx.types import ConfigError, Message, Sampling, TextPolicy, View


def local(
    conversations: Sequence[Sequence[Message]],
    *,
    model: TextPolicy | None = None,
    path: str | None = None,
    n: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[list[str]]:
    """What the model says next in each conversation, `n` times. Draws depend on `seed` and the conversation alone.

    model: a model of the stage, as it is at the moment. path: a directory or hub id, read once in a process, never trained.
    Raises ConfigError where not one of the two is given, or where a conversation does not fit into the model's context.
    """
    if (model is None) == (path is None):
        raise ConfigError("llm 'local': give `model`, a model of the stage, or `path`, a directory or hub id")
    policy = model if model is not None else load(str(path))
    if path is not None:  # a model of the stage is where the stage asks it
        offload.bring(policy)
    views = [View(policy.render(talk), tuple(image for message in talk for image in message.images)) for talk in conversations]
    keys = [[key(seed, *view.ids.tolist(), i) for i in range(n)] for view in views]
    played = policy.act(views, keys, Sampling(max_new_tokens, temperature)) if views else []
    return [[turn.said.text if turn.said is not None else "" for turn in turns] for turns in played]


@functools.cache
def load(path: str) -> Any:
    """The model of a directory or hub id."""
    from rlx.models.load import pretrained
    from rlx.rollout.native import generate

    policy = pretrained(path=path)
    policy.module.requires_grad_(False)
    policy.engine = generate
    offload.keep(policy)
    return policy
