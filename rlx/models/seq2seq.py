"""An encoder-decoder as a Policy: the encoder reads the prompt, the decoder writes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rlx.models.collate import batch_of
from rlx.models.language import NO_LOGP, LanguageModel
from rlx.models.padded import columns, token_fields, widened
from rlx.models.reader import Reader
from rlx.types import Batch, ConfigError, DataError, Episode, Ids, Message, Status, Turn, View


@dataclass(frozen=True)
class Pair:
    """The input of an encoder-decoder: the ids that its encoder reads, and those that its decoder writes."""

    read: Ids
    written: Ids

    @property
    def prompt(self) -> int:
        """How many ids the encoder reads."""
        return len(self.read)

    @property
    def length(self) -> int:
        """How many ids there are on both sides."""
        return len(self.read) + len(self.written)


class Seq2Seq(LanguageModel):
    """A transformers sequence-to-sequence model and its tokenizer, with `heads` where it is a critic or a reward model.

    `Turn.seen` is what the encoder reads, the rendered prompt and the end token; `Turn.did` is what the decoder writes
    after its start token. It plays one turn: a longer conversation would be another encoder input at each turn, not a
    continuation of the ids so far.
    """

    @property
    def start(self) -> int:
        """The id that the decoder begins with, which it does not write."""
        return int(self.module.config.decoder_start_token_id)

    def render(self, messages: Sequence[Message]) -> Ids:
        """What the encoder reads: the conversation as a causal model would see it, and the end token. (P,) ids."""
        ids = super().render(messages)
        end = int(self.tokenizer.eos_token_id)
        return ids if ids[-1] == end else np.append(ids, end)

    def extension(self, talk: Sequence[Message], num_replies: int) -> Ids:
        """Raise ConfigError: there is no second turn."""
        raise ConfigError(
            f"model {self.source!r}: a sequence-to-sequence model plays one turn, and the environment goes on after it; "
            "use a causal model"
        )

    def tokenize(self, episode: Episode) -> Episode:
        """Fill `seen` and `did` of a demonstration, as sampling would; one that was cut has no end token.

        Raises DataError for a demonstration of several turns.
        """
        if len(episode.turns) > 1:
            raise DataError(
                f"model {self.source!r}: a sequence-to-sequence model answers once, and a row has {len(episode.turns)} "
                "assistant messages; use a causal model"
            )
        turns = []
        for turn in episode.turns:
            (did,) = self._ids(cast(Message, turn.said).text)
            if episode.status is not Status.TRUNCATED:
                did = np.append(did, self.tokenizer.eos_token_id)
            turns.append(Turn(self.render(episode.task.prompt), did, NO_LOGP, said=turn.said, agent=turn.agent))
        return Episode(episode.task, episode.group, turns, episode.status, label=episode.label, info=episode.info)

    def reader(self, views: Sequence[View], counts: Sequence[int], longest: int) -> Reader:
        """The views, `counts[i]` rows for view i, ready to be answered."""
        return Seq2SeqReader(self, views, counts)

    # ----------------------------------------------------------------- episodes -> tensors
    def collate(self, episodes: list[Episode]) -> Batch:
        """Episodes of one turn as named tensors. Field positions are those of the decoder."""
        return batch_of(episodes, [Pair(e.turns[0].seen, e.turns[0].did) for e in episodes], self.device)

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]:
        """The fields of `want` that the model offers, float32: logp and entropy (N,T) of softmax(logits / temperature), heads.

        Both sides are padded on the right. Heads read the decoder's states, that before position t after t ids were read.
        """
        inputs: list[Pair] = batch.inputs
        ids, attend = padded([x.read for x in inputs], int(self.tokenizer.pad_token_id), self.device)
        written, present = padded([x.written for x in inputs], self.start, self.device)
        fields: dict[str, Tensor] = {}
        with self.autocast():
            encoded = self.base.get_encoder()(input_ids=ids, attention_mask=attend)
            settings = {
                "decoder_input_ids": torch.nn.functional.pad(written, (1, 0), value=self.start),
                "attention_mask": attend,
                "encoder_outputs": encoded,
                "use_cache": False,
                "output_hidden_states": self.heads is not None,
            }
            out = self.module(**settings)
        if want & {"logp", "entropy"}:
            fields = token_fields(out.logits[:, :-1], written, temperature, entropy="entropy" in want)
        if self.heads is not None:
            hidden = out.decoder_hidden_states[-1]
            fields |= self.heads(hidden, columns(hidden, 1), batch, present.sum(1), want)
        return {name: widened(x, name, batch, self.heads) for name, x in fields.items() if name in want}


class Seq2SeqReader:
    """Each distinct prompt is encoded once. The decoder reads prefixes id by id, so that all rows are at the same position."""

    logits: Tensor
    joins = False

    def __init__(self, policy: Seq2Seq, views: Sequence[View], counts: Sequence[int]) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        self.policy = policy
        self.ahead: list[Ids] = [view.prefix for view in views]
        prompts = {view.ids.tobytes(): view.ids for view in views}
        where = {name: i for i, name in enumerate(prompts)}
        ids, attend = padded(list(prompts.values()), int(policy.tokenizer.pad_token_id), policy.device)
        with policy.autocast():
            encoded = policy.base.get_encoder()(input_ids=ids, attention_mask=attend).last_hidden_state
        rows = torch.tensor([where[view.ids.tobytes()] for view in views], device=policy.device)
        self.encoded, self.attend = encoded[rows], attend[rows]
        config = policy.module.config
        self.cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        self.read(torch.full((len(views),), policy.start, device=policy.device))
        seats = np.repeat(np.arange(len(views)), counts)
        self._select(seats)
        self.seats = np.arange(len(seats))

    def keep(self, rows: Ids) -> None:
        """Go on with these rows, in this order."""
        self.seats = self.seats[rows]
        self._select(rows)

    def join(self, views: Sequence[View], counts: Sequence[int]) -> None:
        """It does not: all rows are at the same position."""
        raise NotImplementedError

    def _select(self, chosen: Ids) -> None:
        rows = torch.from_numpy(chosen).to(self.policy.device)
        self.cache.batch_select_indices(rows)
        self.logits, self.encoded, self.attend = self.logits[rows], self.encoded[rows], self.attend[rows]

    def read(self, token: Tensor) -> None:
        """Read one more id in each row: (R,)."""
        with self.policy.autocast():
            self.logits = self.policy.module(
                decoder_input_ids=token[:, None],
                attention_mask=self.attend,
                encoder_outputs=(self.encoded,),
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]


def padded(rows: Sequence[Ids], value: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids filled up on the right (R,L), and 1 where they are (R,L)."""
    tensors = [torch.from_numpy(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    here = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in tensors], batch_first=True)
    return ids.to(device), here.to(device)
