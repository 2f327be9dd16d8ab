"""vLLM as the rollout engine, by the contract of rlx/rollout/native.py: what is asked, what comes back, which weights.

Written against vllm 0.33.0 (docs/rollout.md says what of it was run). What says how vLLM is reached is in `vllm_engines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rlx.types import ConfigError, Episode, Ids, Message, Sampling, Task, Turn, View

PROBE = 32  # ids whose log-probs are compared after a hand-over
BITS = {2: torch.int16, 4: torch.int32}


class Completion(NamedTuple):
    """What vLLM says to one prompt: ids with their log-probs, why it ended, and the log-probs of the prompt where asked for."""

    ids: Sequence[int]
    logp: Sequence[float]
    reason: str
    prompt_logp: Sequence[float] = ()


class Engine(Protocol):
    """A running vLLM. `holds` marks the weights that it was given last."""

    holds: tuple[int, ...] = ()

    def awake(self) -> AbstractContextManager[None]:
        """Where prompts can be completed."""
        ...

    def hand_over(self, policy: Any) -> None:
        """Give it the policy's weights, and have it forget what it computed with others."""

    def complete(self, prompts: Sequence[Ids], params: Sequence[dict[str, Any]]) -> list[Completion]:
        """One completion of each prompt. `params` have names that vLLM's SamplingParams and its server share."""
        ...


# One for each policy that samples, started when it first does.
ENGINES: WeakKeyDictionary[Any, Engine] = WeakKeyDictionary()


def generate(
    policy: Any, views: list[View], keys: list[list[int]], sampling: Sampling, tolerance: float, start: Callable[[], Engine]
) -> list[list[Turn]]:
    """`len(keys[i])` next turns of each view, each with the seed of its key, by the policy's engine, which `start` makes.

    `logp` is what vLLM reports: of softmax(logits / temperature), or of what is left of it where top_k, top_p or min_p cut. The
    weights are handed over where they are not those of the last call, and `check` compares them.
    """
    check_policy(policy, views, sampling)
    prompts = [np.concatenate([view.ids, view.prefix]) for view in views]
    asked = [(i, params(policy, sampling, key, len(views[i].prefix))) for i, own in enumerate(keys) for key in own]
    if not asked:
        return [[] for _ in views]
    if policy not in ENGINES:
        ENGINES[policy] = start()
    engine = ENGINES[policy]
    with engine.awake():
        if (weights := fingerprint(policy)) != engine.holds:
            engine.hand_over(policy)
            check(engine, policy, np.resize(prompts[0], PROBE), tolerance)
            engine.holds = weights
        found = engine.complete([prompts[i] for i, _ in asked], [settings for _, settings in asked])
    turns: list[list[Turn]] = [[] for _ in views]
    for (i, _), said in zip(asked, found, strict=True):
        turns[i].append(turn_of(policy, views[i], said))
    return turns


def check_policy(policy: Any, views: Sequence[View], sampling: Sampling) -> None:
    """Raises ConfigError for a policy that is not handed over, ValueError for a prefix that leaves no room for an id."""
    if policy.module.config.is_encoder_decoder or any(view.images for view in views):
        raise ConfigError("rollout: vLLM is asked for texts of causal models alone here; take rollout=native")
    if hasattr(policy.module, "merge_and_unload"):
        raise ConfigError("rollout: an adapter (model.lora) is not handed over to vLLM; take rollout=native")
    if long := [len(view.prefix) for view in views if len(view.prefix) >= sampling.max_new_tokens]:
        raise ValueError(f"a turn of at most {sampling.max_new_tokens} ids cannot go on after a prefix of {long[0]}")


def params(policy: Any, sampling: Sampling, key: int, begun: int) -> dict[str, Any]:
    """One request: the turn ends with an end id or the id that completes a stop string, which both belong to it."""
    return {
        "max_tokens": sampling.max_new_tokens - begun,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "ignore_eos": sampling.ignore_eos,
        "seed": key % 2**63,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # stop strings are looked for in the whole text
        "stop_token_ids": [] if sampling.ignore_eos else list(policy.end_ids),
        "logprobs": 0,  # of the id that was drawn, and of no others
    }


def turn_of(policy: Any, view: View, said: Completion) -> Turn:
    """A completion as a turn. Raises RuntimeError for one that vLLM gave up, or whose parts do not fit together."""
    if said.reason not in ("stop", "length") or len(said.ids) != len(said.logp):
        raise RuntimeError(
            f"vLLM: expected a completion that ended by stop or length, with a log-prob for each id; got "
            f"{said.reason!r}, {len(said.ids)} ids and {len(said.logp)} log-probs"
        )
    did = np.asarray(said.ids, np.int64)
    text = Message("assistant", policy.decode(did))
    return Turn(view.ids, did, np.asarray(said.logp, np.float32), said=text, info={"truncated": said.reason == "length"})


@torch.no_grad()
def fingerprint(policy: Any) -> tuple[int, ...]:
    """A sum of the bits of each weight tensor: another where one number changes, be it in its last bit."""
    sums = [p.contiguous().view(BITS[p.element_size()]).sum(dtype=torch.int64) for p in policy.module.parameters()]
    return tuple(torch.stack(sums).tolist())


@torch.no_grad()
def check(engine: Engine, policy: Any, ids: Ids, tolerance: float) -> None:
    """Raises RuntimeError where log-probs of `ids` under vLLM and the policy differ by more than `tolerance` nats a token."""
    probe = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    found = torch.tensor(engine.complete([ids], [probe])[0].prompt_logp)
    turn = Turn(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32))
    with policy.autocast():
        own = policy.forward(policy.collate([Episode(Task((), None), 0, [turn])]), {"logp"})["logp"][0].cpu()
    gap = float((found - own).abs().mean()) if found.shape == own.shape else float("nan")
    if not gap <= tolerance:
        raise RuntimeError(
            f"rollout: after the weights were handed over, vLLM's log-probs of a prompt differ from the trainer's by {gap:.3g} "
            f"nats a token (rollout.tolerance: {tolerance}); vLLM does not hold these weights, or computes another model"
        )
