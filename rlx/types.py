"""The vocabulary of rlx: what flows from a row of data to a gradient. A reader starts here.

Task -> Episode -> Batch -> loss -> weights. A `Task` is what is asked, an `Episode` is what happened, a `Batch` is the
same as named tensors. Everything else (losses, advantages, rewards, filters, environments, policies) is a function or a
small protocol over these, and nothing here knows any method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class ConfigError(ValueError):
    """A mistake of the user's, with all that was found wrong: one line each, printed without a traceback."""


class DataError(ConfigError):
    """A row of data that does not fit: names the file, the line, the column and what was expected."""


# --------------------------------------------------------------------------- what is asked, what happened
@dataclass(frozen=True)
class Message:
    """One message of a conversation. `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Task:
    """One question: the conversation so far, the gold answer if there is one, and the row's other columns."""

    prompt: tuple[Message, ...]
    answer: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Status(Enum):
    """How an episode ended. `TRUNCATED`: the token limit cut it."""

    RUNNING = "running"
    FINISHED = "finished"
    TRUNCATED = "truncated"


@dataclass
class Turn:
    """One decision and what the world answered.

    `seen` holds the ids that are new to the policy since its last turn (the prompt, or a tool's reply), `did` the ids that
    it produced, `logp` their log-probabilities under the distribution that sampled them (nats; empty where nothing was
    sampled, as in a demonstration). A token is never decoded and encoded again: what was sampled is what is trained on.
    """

    seen: Ids
    did: Ids
    logp: Floats
    said: Message | None = None
    replies: tuple[Message, ...] = ()
    reward: float = 0.0
    agent: str = "policy"
    token: dict[str, NDArray[Any]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Episode:
    """A task and the turns taken on it. `group` is shared by the episodes of one prompt.

    A row of data is an episode too: a demonstration has one turn with `said` and `label=1`, a preference pair is two
    episodes of a group with labels +1 and -1, a prompt alone has no turn. `rewards` maps a reward's name to its unweighted
    value; `reward` is their weighted total (nan: could not be scored; such an episode is left out and counted).
    """

    task: Task
    group: int
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.RUNNING
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    label: float | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> str:
        """The text of everything that the policy said."""
        return "".join(turn.said.content for turn in self.turns if turn.said is not None)

    @property
    def num_tokens(self) -> int:
        """How many tokens the policy produced."""
        return sum(len(turn.did) for turn in self.turns)


@dataclass(frozen=True)
class Reply:
    """What an environment answers to one message of the policy's."""

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = True
    agent: str = "policy"
    info: Mapping[str, Any] = field(default_factory=dict)


class Env(Protocol):
    """An environment that speaks messages. One object lives for one episode."""

    def reset(self, task: Task) -> tuple[Message, ...]: ...

    def step(self, said: Message) -> Reply: ...


# --------------------------------------------------------------------------- the same as tensors
@dataclass(frozen=True)
class Field:
    """One named tensor: its shape in the letters below, its dtype, who makes it, and what it is."""

    shape: str
    dtype: str
    made_by: str
    meaning: str


# N sequences, T trained positions of the longest sequence (right-padded; the prompt is not among them).
FIELDS: dict[str, Field] = {
    "logp": Field("N,T", "float", "forward", "log-probability of each token under the policy in training, with gradient"),
    "entropy": Field("N,T", "float", "forward", "entropy of the policy's distribution at each position, with gradient"),
    "ref_logp": Field("N,T", "float", "fill", "log-probability under the stage's reference policy"),
    "old_logp": Field("N,T", "float", "fill", "log-probability under the policy that the update started from"),
    "rollout_logp": Field("N,T", "float", "collate", "log-probability under the engine that sampled the token"),
    "mask": Field("N,T", "bool", "collate", "True where the policy acted and the token is trained on"),
    "reward": Field("N,T", "float", "collate", "what was paid, where it was paid: the total on the last trained position"),
    "adv": Field("N,T", "float", "advantage", "advantage of each position"),
    "ret": Field("N", "float", "collate", "total reward of the episode"),
    "label": Field("N", "float", "collate", "label of the row: 1 for a demonstration, +1 or -1 in a pair"),
    "group": Field("N", "long", "collate", "index of the prompt: equal for the episodes of one group"),
}


class Batch(dict[str, "Tensor"]):
    """Named tensors of N sequences (see FIELDS), with the token rows that the policy's forward reads.

    `rows[i]` holds the ids of sequence i, prompt included, and `starts[i]` the index of the first id that stands in the
    (N,T) fields: field position t of sequence i is the id rows[i][starts[i] + t].
    """

    rows: list[Ids]
    starts: list[int]

    def __init__(self, fields: Mapping[str, Tensor], rows: list[Ids], starts: list[int]) -> None:
        super().__init__(fields)
        self.rows, self.starts = rows, starts

    def take(self, index: Sequence[int]) -> Batch:
        """The sequences of `index`, in that order; (N,T) fields keep their width."""
        chosen = list(index)
        fields = {name: value[chosen] for name, value in self.items()}
        return Batch(fields, [self.rows[i] for i in chosen], [self.starts[i] for i in chosen])


# --------------------------------------------------------------------------- what a recipe names
# Each alias below is a group of the catalogue. Positional parameters of a component are the fields that it reads,
# keyword-only parameters are its hyperparameters: the signature is the YAML schema.
class LossTerm(Protocol):
    """Named tensors -> (N,T) or (N,): unreduced, float32, no side effect."""

    def __call__(self, *fields: Tensor) -> Tensor: ...


class Advantage(Protocol):
    """Named tensors -> (N,T): the field `adv`."""

    def __call__(self, *fields: Tensor) -> Tensor: ...


class Derive(Protocol):
    """Named tensors -> (N,T): the field that `into` names, before the advantage."""

    def __call__(self, *fields: Tensor) -> Tensor: ...


class Watch(Protocol):
    """Named tensors -> (N,T): a diagnostic, averaged over trained tokens and logged; never trained on."""

    def __call__(self, *fields: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Counts:
    """How much one optimiser step trains on, over all ranks and accumulation: what reductions divide by."""

    tokens: float
    sequences: float


class Reduce(Protocol):
    """(x, mask, counts) -> (): a sum over this part of the batch, divided by the whole step's counts."""

    def __call__(self, x: Tensor, mask: Tensor, counts: Counts) -> Tensor: ...


class Reward(Protocol):
    """The episodes of one group -> one number each; nan where the episode could not be scored."""

    def __call__(self, episodes: list[Episode]) -> list[float]: ...


class Keep(Protocol):
    """The episodes of one step -> those to train on, whole groups or single ones."""

    def __call__(self, episodes: list[Episode]) -> list[Episode]: ...


class Metric(Protocol):
    """`greedy` (one episode a task) or `sampled` (several a task), as groups -> a number."""

    def __call__(self, groups: list[list[Episode]]) -> float: ...


@dataclass(frozen=True)
class Sampling:
    """How an engine draws tokens: `temperature` 0 is greedy decoding, `rows` the most sequences decoded at a time."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows: int = 1024


@dataclass(frozen=True)
class TaskSource:
    """A task of the catalogue: named splits of data, how an episode is played, and what says whether it is right.

    `max_new_tokens` is the length that an answer needs; a stage that sets none takes it.
    """

    splits: Mapping[str, Callable[[], list[Episode]]]
    verifier: Reward
    make_env: Callable[[], Env]
    max_new_tokens: int = 512


class Data(Protocol):
    """A data set of the catalogue, read when it is called."""

    def __call__(self) -> list[Episode]: ...


class Policy(Protocol):
    """What acts and is trained: a language model here. `module` holds the weights."""

    module: torch.nn.Module
    device: torch.device

    def tokenize(self, episode: Episode) -> Episode: ...

    def render(self, messages: Sequence[Message]) -> Ids: ...

    def extension(self, talk: Sequence[Message], num_replies: int) -> Ids: ...

    def pieces(self, ids: Ids) -> list[str]: ...

    def act(self, views: list[Ids], keys: list[list[int]], sampling: Sampling) -> list[list[Turn]]: ...

    def collate(self, episodes: list[Episode]) -> Batch: ...

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]: ...

    def save(self, folder: Path) -> None: ...


class Optim(Protocol):
    """(parameters, lr) -> a torch optimiser; `clip`, `schedule` and `warmup` are read by the learner."""

    def __call__(self, parameters: Any, lr: float) -> Any: ...


class Model(Protocol):
    """Settings -> a policy, its weights drawn from `seed` where there are none to read."""

    def __call__(self, *, seed: int = 0) -> Policy: ...


class Sampler(Protocol):
    """Plays `n` episodes of each task: (policy, make_env, rows, n, sampling, seed) -> episodes, group by group."""

    def __call__(
        self,
        policy: Policy,
        make_env: Callable[[], Env],
        rows: list[Episode],
        n: int,
        sampling: Sampling,
        seed: tuple[int, ...],
    ) -> list[Episode]: ...


Bound_co = TypeVar("Bound_co", covariant=True)


@dataclass(frozen=True)
class Component(Generic[Bound_co]):
    """A catalogue entry bound to its hyperparameters, with the framework's own keys taken out.

    `reads` are the fields that it asks for, after the recipe's `read:` renamed them. `into` and `add` say which field a
    derive writes, and whether it adds to what is there.
    """

    name: str
    call: Bound_co
    reads: tuple[str, ...] = ()
    weight: float = 1.0
    into: str = ""
    add: bool = False
    reduce: Component[Reduce] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRef:
    """Where weights come from: an earlier stage (`@sft`, `@sft:best`, `@sft:step=80`), or a directory or hub id.

    `@model` is what the recipe starts from; no stage may be called that.
    """

    stage: str = ""
    pick: str = "last"
    path: str = ""

    def __str__(self) -> str:
        if not self.stage:
            return self.path
        return f"@{self.stage}" + ("" if self.pick == "last" else f":{self.pick}")


@dataclass(frozen=True)
class DataRef:
    """Where rows come from: a split of the recipe's task (`@task/train`), or a data set of the catalogue."""

    split: str = ""
    source: Component[Data] | None = None


class Stage(Protocol):
    """One word of a recipe's `stages`: a dataclass whose fields are its YAML keys."""

    def run(self, ctx: Any) -> dict[str, float]: ...

    def problems(self) -> list[str]: ...

    def describe(self) -> str: ...
