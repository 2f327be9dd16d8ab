"""A causal language model as a Policy: conversations to tokens, tokens to log-probabilities, weights to disk."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rlx import memory
from rlx.models import packed, padded
from rlx.models.collate import acted, batch_of
from rlx.models.heads import Heads, saved_heads
from rlx.models.parts import packed_parts, padded_parts
from rlx.models.reader import DynamicReader, Memory, Reader
from rlx.models.shared import SharedReader
from rlx.types import Batch, DataError, Ended, Episode, Floats, Ids, Image, Message, Sampling, Status, Tokens, Turn, View

NO_LOGP: Floats = np.zeros(0, np.float32)

Span = tuple[int, int]

# (policy, views, keys of the draws, sampling, who is told) -> turns: the native engine, or another with the same contract
Engine = Callable[["LanguageModel", list[View], list[list[int]], Sampling, "Ended | None"], list[list[Turn]]]


class LanguageModel:
    """A transformers causal model and its tokenizer, with `heads` where it is a critic or a reward model.

    `packs`: it takes rlx's attention, so that sequences are packed into one row in the forward (see rlx/models/packed.py) and
    rows that are decoded share their prompts (rlx/models/shared.py). `recomputes`: the backward pass computes its layers once
    more (rlx/models/recompute.py). `replays`: its decode steps are CUDA graphs (rlx/models/graph.py), until one cannot be
    captured.
    """

    def __init__(self, module: Any, tokenizer: Any, device: torch.device, *, bf16: bool, source: str) -> None:
        self.module = module
        self.tokenizer = self.processor = tokenizer
        self.device = device
        self.bf16 = bf16
        self.source = source
        self.engine: Engine | None = None
        self.memory: Memory | None = None
        self.heads: Heads | None = None
        self.packs = self.recomputes = False
        self.replays = device.type == "cuda"
        self.end_token = self._end_token()
        self.end_ids = end_ids(module, tokenizer, self.end_token)

    @property
    def offers(self) -> set[str]:
        """The fields that `forward` computes."""
        return {"logp", "entropy", *(self.heads.where if self.heads is not None else ())}

    def parameters(self) -> list[torch.nn.Parameter]:
        """All weights that are trained."""
        modules = [self.module] if self.heads is None else [self.module, self.heads]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def with_heads(self, where: dict[str, str], seed: int, folder: Path | None = None) -> LanguageModel:
        """This model with heads (see Heads), started from those of a checkpoint; without `where`, just the checkpoint's."""
        saved = saved_heads(folder) if folder is not None else {}
        if where or saved:
            self.heads = Heads(where or saved, self.module.config.get_text_config().hidden_size, seed).to(self.device)
        if folder is not None and self.heads is not None and saved:
            self.heads.load(folder)
        return self

    # ----------------------------------------------------------------- messages -> tokens
    def render(self, messages: Sequence[Message]) -> Ids:
        """The prompt as the policy sees it: chat template and the opening of the assistant's turn, (P,) ids.

        A conversation whose last message is an unfinished assistant turn is continued, not closed.
        Raises DataError for a prompt without a token.
        """
        (ids,) = self._ids(self._text(messages, opened=True))
        self._check_prompt(ids)
        return ids

    def extension(self, talk: Sequence[Message], num_replies: int) -> Ids:
        """The ids that the last `num_replies` messages add after the policy's own end token, up to its next turn.

        Raises DataError where the chat template rewrites earlier turns.
        """
        said = self._closed(talk[: len(talk) - num_replies])
        opened = self._text(talk, opened=True)
        if not opened.startswith(said):
            raise DataError(f"model {self.source!r}: its chat template rewrites earlier turns; it cannot play several turns")
        return self._ids(opened[len(said) :])[0]

    def tokenize(self, episode: Episode) -> Episode:
        """Fill `seen` and `did` of a demonstration's turns: `seen` as sampling would show it, `did` up to the end token.

        With generation markers in the chat template the marked text is the assistant's. Without, a turn is what it adds to
        the conversation before it (which must be a prefix of the conversation after it). The parts are encoded one by one,
        as they are when the policy plays. What a demonstration that was cut says last goes on: it has no end token. Raises
        DataError where a turn cannot be told apart, or the prompt has no token.
        """
        text, spans = self._marked(episode) if self._has_markers else self._added(episode)
        edges = [0, *(edge for span in spans for edge in span)]
        parts = self._ids(*(text[begin:end] for begin, end in itertools.pairwise(edges)))
        turns = [
            Turn(seen, did, NO_LOGP, said=turn.said, replies=turn.replies, agent=turn.agent)
            for turn, seen, did in zip(episode.turns, parts[::2], parts[1::2], strict=True)
        ]
        if turns:
            self._check_prompt(turns[0].seen)
        if turns and episode.status is Status.TRUNCATED and len(turns[-1].did) and turns[-1].did[-1] in self.end_ids:
            turns[-1].did = turns[-1].did[:-1]
        return Episode(episode.task, episode.group, turns, episode.status, label=episode.label, info=episode.info)

    def _added(self, episode: Episode) -> tuple[str, list[Span]]:
        """The conversation's text and the span that each turn adds to it, end token included."""
        talk, text, spans = list(episode.task.prompt), "", []
        for turn in episode.turns:
            before = self._text(talk, opened=True)
            talk = with_said(talk, cast(Message, turn.said))
            after = self._closed(talk)
            if not (before.startswith(text) and after.startswith(before)):
                raise DataError(
                    f"model {self.source!r}: its chat template rewrites earlier turns, so the assistant's tokens cannot "
                    "be told apart; give the template {% generation %} markers"
                )
            spans.append((len(before), len(after)))
            talk, text = [*talk, *turn.replies], after
        return text, spans

    def _marked(self, episode: Episode) -> tuple[str, list[Span]]:
        """The conversation's text and the spans of its turns that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        prompt, num_turns = episode.task.prompt, len(episode.turns)
        talk = list(prompt)
        for turn in episode.turns:
            talk = [*with_said(talk, cast(Message, turn.said)), *turn.replies]
        (text,), (spans,) = render_jinja_template(
            [plain(talk)],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if len(spans) < num_turns:  # nothing to train on: `fit` refuses a data set of these
            return text, [(len(text), len(text))] * num_turns
        own = spans[len(spans) - num_turns :]  # earlier assistant messages belong to the prompt
        # Some templates close the markers before the end token; it is the policy's all the same, which has to learn to stop.
        own = [(begin, end + len(self.end_token) * text.startswith(self.end_token, end)) for begin, end in own]
        if own and prompt and prompt[-1].role == "assistant":
            own[0] = (max(own[0][0], len(self._text(prompt, opened=True))), own[0][1])
        return text, own

    @property
    def _has_markers(self) -> bool:
        template = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else ""
        return re.search(r"\{%-?\s*generation\b", template) is not None

    def _closed(self, messages: Sequence[Message]) -> str:
        """The conversation up to the end token of its last message, the policy's."""
        text = self._text(messages, opened=False)
        at = text.rfind(self.end_token)
        if at < 0:
            raise DataError(f"model {self.source!r}: its chat template closes the assistant's turn without {self.end_token!r}")
        return text[: at + len(self.end_token)]

    def _text(self, messages: Sequence[Message], *, opened: bool) -> str:
        unfinished = opened and bool(messages) and messages[-1].role == "assistant"
        if not self.tokenizer.chat_template:  # a base model: the text as it is, the policy's closed by the end token
            ends = [self.tokenizer.eos_token if m.role == "assistant" else "" for m in messages]
            text = self._begin_token() + "".join(m.text + end for m, end in zip(messages, ends, strict=True))
            return text.removesuffix(self.tokenizer.eos_token) if unfinished else text
        if not messages:
            return ""
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                plain(messages),
                tokenize=False,
                add_generation_prompt=opened and not unfinished,
                continue_final_message=unfinished,
            ),
        )

    def _begin_token(self) -> str:
        """What the tokenizer itself puts before a text: Llama's needs its first token, Qwen's has none."""
        begins = self.tokenizer.bos_token_id is not None and self.tokenizer.bos_token_id in self.tokenizer.encode("")
        return cast(str, self.tokenizer.bos_token) if begins else ""

    def _end_token(self) -> str:
        """The special token that closes an assistant's turn: the chat template's, else the tokenizer's own."""
        probe = "0123456789"
        text = self._text([Message("user", "?"), Message("assistant", probe)], opened=False)
        (tail,) = self._ids(text[text.rindex(probe) + len(probe) :])
        special = [i for i in tail.tolist() if i in self.tokenizer.added_tokens_decoder]
        return cast(str, self.tokenizer.convert_ids_to_tokens(special[0]) if special else self.tokenizer.eos_token)

    def _check_prompt(self, ids: Ids) -> None:
        if not len(ids):
            raise DataError(f"model {self.source!r}: an empty prompt; the first token of an answer needs one before it")

    def _ids(self, *texts: str) -> list[Ids]:
        """Each text by itself, special tokens as they are written."""
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [np.asarray(ids, np.int64) for ids in found]

    def decode(self, ids: Ids) -> str:
        """The text of the ids, without special tokens."""
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))

    def act(self, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended | None = None) -> list[list[Turn]]:
        """`len(keys[i])` next turns of each view, by the engine that the policy was given, which may tell `ended` of each."""
        if self.engine is None:
            raise RuntimeError("this policy was given no rollout engine")
        return self.engine(self, views, keys, sampling, ended)

    def reader(self, views: Sequence[View], counts: Sequence[int], longest: int) -> Reader:
        """The views, `counts[i]` rows for view i, ready to be followed by turns of at most `longest` ids."""
        return (SharedReader if self.packs else DynamicReader)(self, views, counts, longest)

    def pieces(self, ids: Ids) -> list[str]:
        """The text of each id by itself, special tokens included."""
        return [cast(str, self.tokenizer.decode([int(i)])) for i in ids]

    # ----------------------------------------------------------------- episodes -> tensors
    def collate(self, episodes: list[Episode]) -> Batch:
        """Episodes as named tensors. Field positions begin after the first turn's prompt; environment text has mask False."""
        inputs = [
            Tokens(
                np.concatenate([ids for turn in episode.turns for ids in (turn.seen, turn.did)]),
                len(episode.turns[0].seen),
                acted(episode),
                tuple(image for message in told(episode) for image in message.images),
            )
            for episode in episodes
        ]
        return batch_of(episodes, inputs, self.device)

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        """The fields of `want` that the model offers, float32: logp and entropy (N,T) of softmax(logits / temperature), heads.

        Sequences are packed, what they share read once, where the model can take that (rlx/models/packed.py); else they are
        padded (rlx/models/padded.py). What the environment says has no log-probability; logp and entropy are 0 there.
        """
        forward = packed.forward if self.packs else padded.forward
        return forward(self, batch, want, temperature)

    def split(self, batch: Batch, token_budget: int, *, whole_groups: bool) -> list[list[int]]:
        """The sequences of a batch in parts of which a forward reads at most `token_budget` tokens, padding counted."""
        if not self.packs:
            return padded_parts(batch, token_budget, whole_groups=whole_groups)
        return packed_parts(batch, token_budget, whole_groups=whole_groups, key=memory.of_key(memory.sizes(self)))

    @property
    def base(self) -> Any:
        """The model without an adapter's wrapper."""
        return self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    @property
    def backbone(self) -> Any:
        """The model without its language-model head."""
        return self.base.get_decoder()

    def reading(self, ids: Tensor, attend: Tensor, images: Sequence[Sequence[Image]]) -> dict[str, Any]:
        """What the module reads of padded rows (N,L): ids, attention and positions. A model of text has no images."""
        return {"input_ids": ids, "attention_mask": attend, "position_ids": (attend.cumsum(-1) - 1).clamp(min=0)}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Where the forward computes in bfloat16, if it does. Weights in training are cast once for all forwards in it."""
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
        self.processor.save_pretrained(beside)
        if self.heads is not None:
            self.heads.save(beside)
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def told(episode: Episode) -> list[Message]:
    """Every message that the policy was shown: what is replied to its last turn is not."""
    return [*episode.task.prompt, *(message for turn in episode.turns[:-1] for message in turn.replies)]


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as transformers' chat templates take them."""

    def content(message: Message) -> Any:
        if isinstance(message.content, str):
            return message.content
        return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.content]

    return [{"role": m.role, "content": content(m)} for m in messages]


def with_said(talk: Sequence[Message], said: Message) -> list[Message]:
    """The conversation after the policy has spoken: an unfinished assistant message is continued, else one is added."""
    if talk and talk[-1].role == "assistant":
        return [*talk[:-1], Message("assistant", talk[-1].text + said.text)]
    return [*talk, said]


def end_ids(module: Any, tokenizer: Any, end_token: str) -> list[int]:
    """Every id that ends an answer: the chat template's, the tokenizer's and those of the model's generation settings."""
    configured = getattr(module, "generation_config", None)
    extra = getattr(configured, "eos_token_id", None)
    listed = extra if isinstance(extra, list) else [extra]
    known = [tokenizer.convert_tokens_to_ids(end_token), tokenizer.eos_token_id, *listed]
    return sorted({int(i) for i in known if i is not None})
