"""A causal language model as a Policy: conversations to tokens, tokens to log-probabilities, weights to disk."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rlx.types import Batch, DataError, Episode, Floats, Ids, Message, Sampling, Turn

NO_IDS: Ids = np.zeros(0, np.int64)
NO_LOGP: Floats = np.zeros(0, np.float32)

# (policy, prompts, keys of the draws, sampling) -> turns: the native engine, or another with the same contract
Engine = Callable[["LanguageModel", list[Ids], list[list[int]], Sampling], list[list[Turn]]]


class LanguageModel:
    """A transformers causal model and its tokenizer."""

    def __init__(self, module: Any, tokenizer: Any, device: torch.device, *, bf16: bool, source: str) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.device = device
        self.bf16 = bf16
        self.source = source
        self.engine: Engine | None = None
        self.end_ids = end_ids(module, tokenizer)

    # ----------------------------------------------------------------- messages -> tokens
    def render(self, messages: Sequence[Message]) -> Ids:
        """The prompt as the policy sees it: chat template and the opening of the assistant's turn, (P,) ids.

        A conversation whose last message is an unfinished assistant turn is continued, not closed.
        """
        return self._ids(self._text(messages, opened=True))

    def extension(self, talk: Sequence[Message], num_replies: int) -> Ids:
        """The ids that the last `num_replies` messages add after the policy's own end token, up to its next turn."""
        end = self.tokenizer.eos_token
        closed = self._text(talk[: len(talk) - num_replies], opened=False)
        said = closed[: closed.rindex(end) + len(end)]
        opened = self._text(talk, opened=True)
        if not opened.startswith(said):
            raise DataError(f"model {self.source!r}: its chat template rewrites earlier turns; it cannot play several turns")
        return self._ids(opened[len(said) :])

    def tokenize(self, episode: Episode) -> Episode:
        """Fill `seen` and `did` of a demonstration's turns; the policy's own tokens are those that the template marks.

        With generation markers in the chat template the marked tokens are the assistant's. Without, a turn is what the
        template adds to the conversation before it (which must be a prefix of the conversation after it).
        """
        texts = self._segments(episode)
        turns = []
        for turn, (seen, did) in zip(episode.turns, texts, strict=True):
            turns.append(Turn(seen=seen, did=did, logp=NO_LOGP, said=turn.said, replies=turn.replies, agent=turn.agent))
        return Episode(episode.task, episode.group, turns, episode.status, label=episode.label, info=episode.info)

    def _segments(self, episode: Episode) -> list[tuple[Ids, Ids]]:
        messages = list(episode.task.prompt)
        template = self.tokenizer.chat_template
        if template and "{% generation" in template.replace("{%-", "{%"):
            for turn in episode.turns:
                messages += [cast(Message, turn.said), *turn.replies]
            return self._marked(messages, len(episode.turns))
        segments, done = [], ""
        for turn in episode.turns:
            before = self._text(messages, opened=True)
            messages.append(cast(Message, turn.said))
            after = self._text(messages, opened=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    f"model {self.source!r}: its chat template rewrites earlier turns, so the assistant's tokens cannot "
                    "be told apart; give the template {% generation %} markers"
                )
            segments.append((self._ids(before[len(done) :]), self._ids(after[len(before) :])))
            messages += turn.replies
            done = after
        return segments

    def _marked(self, messages: list[Message], num_turns: int) -> list[tuple[Ids, Ids]]:
        out = self.tokenizer.apply_chat_template(
            plain(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = np.asarray(out["input_ids"], np.int64), np.asarray(out["assistant_masks"], bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).reshape(-1, 2)
        edges = edges[max(0, len(edges) - num_turns) :]  # earlier assistant messages belong to the prompt
        if len(edges) < num_turns:
            return [(ids, NO_IDS) for _ in range(num_turns)]  # an empty mask: `fit` refuses a data set of these
        segments, start = [], 0
        for begin, end in edges:
            segments.append((ids[start:begin], ids[begin:end]))
            start = int(end)
        return segments

    def _text(self, messages: Sequence[Message], *, opened: bool) -> str:
        if not self.tokenizer.chat_template:  # a base model: the text as it is, closed by the end token
            text = "".join(m.content for m in messages)
            return text if opened else text + self.tokenizer.eos_token
        unfinished = opened and messages[-1].role == "assistant"
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                plain(messages),
                tokenize=False,
                add_generation_prompt=opened and not unfinished,
                continue_final_message=unfinished,
            ),
        )

    def _ids(self, text: str) -> Ids:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int64)

    def decode(self, ids: Ids) -> str:
        """The text of the ids, without special tokens."""
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))

    def act(self, views: list[Ids], keys: list[list[int]], sampling: Sampling) -> list[list[Turn]]:
        """`len(keys[i])` next turns of each view, by the engine that the policy was given."""
        if self.engine is None:
            raise RuntimeError("this policy was given no rollout engine")
        return self.engine(self, views, keys, sampling)

    def pieces(self, ids: Ids) -> list[str]:
        """The text of each id by itself, special tokens included."""
        return [cast(str, self.tokenizer.decode([int(i)])) for i in ids]

    # ----------------------------------------------------------------- episodes -> tensors
    def collate(self, episodes: list[Episode]) -> Batch:
        """Episodes as named tensors. Field positions begin after the first turn's prompt; environment text has mask False."""
        rows, starts, masks, logps = [], [], [], []
        for episode in episodes:
            ids, mask, logp = [], [], []
            for turn in episode.turns:
                ids += [turn.seen, turn.did]
                mask += [np.zeros(len(turn.seen), bool), np.ones(len(turn.did), bool)]
                sampled = turn.logp if len(turn.logp) else np.zeros(len(turn.did), np.float32)
                logp += [np.zeros(len(turn.seen), np.float32), sampled]
            start = len(episode.turns[0].seen)
            rows.append(np.concatenate(ids))
            starts.append(start)
            masks.append(torch.from_numpy(np.concatenate(mask)[start:]))
            logps.append(torch.from_numpy(np.concatenate(logp)[start:]))
        pad = torch.nn.utils.rnn.pad_sequence
        mask_ = pad(masks, batch_first=True)
        ret = torch.tensor([e.reward for e in episodes], dtype=torch.float32)
        reward = torch.zeros(mask_.shape)
        last = torch.tensor([int(m.nonzero()[-1]) if m.any() else 0 for m in masks])
        reward[torch.arange(len(episodes)), last] = ret
        fields = {
            "mask": mask_,
            "rollout_logp": pad(logps, batch_first=True),
            "reward": reward,
            "ret": ret,
            "label": torch.tensor([e.label if e.label is not None else 0.0 for e in episodes]),
            "group": torch.tensor([e.group for e in episodes]),
        }
        return Batch({name: value.to(self.device) for name, value in fields.items()}, rows, starts)

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        """The fields of `want` among logp and entropy, (N,T) float32, of the distribution softmax(logits / temperature).

        Prompts are padded on the left and completions on the right, so that the language-model head runs on the scored
        columns alone (through the model's own `logits_to_keep`, which applies whatever the architecture does to logits).
        """
        width = max(len(row) - start for row, start in zip(batch.rows, batch.starts, strict=True))
        prompt = max(batch.starts)
        ids = torch.full((len(batch.rows), prompt + width), int(self.tokenizer.pad_token_id))
        attend = torch.zeros_like(ids)
        for i, (row, start) in enumerate(zip(batch.rows, batch.starts, strict=True)):
            span = slice(prompt - start, prompt - start + len(row))
            ids[i, span] = torch.from_numpy(row)
            attend[i, span] = 1
        ids, attend = ids.to(self.device), attend.to(self.device)
        with self.autocast():
            out = self.module(
                input_ids=ids,
                attention_mask=attend,
                position_ids=(attend.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=width + 1,
                use_cache=False,
            )
        logits = out.logits[:, :-1].float() / temperature
        logz = logits.logsumexp(-1)
        fields = {"logp": logits.gather(-1, ids[:, prompt:, None])[..., 0] - logz}
        if "entropy" in want:
            fields["entropy"] = logz - (logits.softmax(-1) * logits).sum(-1)
        full = batch["mask"].shape[1]  # fields of a part of a batch keep the whole batch's width
        return {name: torch.nn.functional.pad(x, (0, full - width)) for name, x in fields.items() if name in want}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Where the forward computes in bfloat16, if it does."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    # ----------------------------------------------------------------- to disk
    def save(self, folder: Path) -> None:
        """Write weights and tokenizer for plain `from_pretrained`: beside the folder first, then renamed."""
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        module = self.module
        if hasattr(module, "merge_and_unload"):  # LoRA: the adapter by itself, and merged for plain loading
            module.save_pretrained(beside / "adapter")
            module = copy.deepcopy(module).merge_and_unload()
        module.save_pretrained(beside)
        self.tokenizer.save_pretrained(beside)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)


def plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as transformers' chat templates take them."""
    return [{"role": m.role, "content": m.content} for m in messages]


def end_ids(module: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: the tokenizer's and those of the model's generation settings."""
    configured = getattr(module, "generation_config", None)
    extra = getattr(configured, "eos_token_id", None)
    listed = extra if isinstance(extra, list) else [extra]
    return sorted({int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None})
