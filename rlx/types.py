"""The vocabulary of rlx: what flows from a row of data to a gradient. A reader starts here.

Task -> Episode -> Batch -> loss -> weights. A `Task` is what is asked, an `Episode` is what happened, a `Batch` is the
same as named tensors. Everything else (losses, advantages, rewards, filters, environments, policies) is a function or a
small protocol over these, and nothing here knows any method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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


class Failed(RuntimeError):
    """What was asked for did not come to its end; the message is all there is to say, `status` the command's exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


# --------------------------------------------------------------------------- what is asked, what happened
@dataclass(frozen=True, eq=False)
class Image:
    """A part of a message: `pixels` (H,W,3) uint8. Two images are equal if they are the same object."""

    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Message:
    """One message of a conversation: a text, or parts of text and images. `role` is system, user, assistant or tool."""

    role: str
    content: str | tuple[str | Image, ...]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(p for p in self.content if isinstance(p, str))

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of all parts."""
        return () if isinstance(self.content, str) else tuple(p for p in self.content if isinstance(p, Image))


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

    In a vector environment a turn is a whole episode: `did` holds the actions of its steps, `token` the observations.
    `token` maps a name to one value for each id of `did`, an (N,T) field of the batch. `trained` (bool) is the one that the
    framework reads: False where another than the policy chose the id (a hint, a guide's roll-in). `reward` is what the
    environment paid for the turn; the reward `env` makes it count.
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
    value; `reward` is their weighted total (nan: could not be scored; such an episode is left out and counted), and `paid`
    the part of it that each turn earned. `agent` is the role in which the policy played: proposer, solver, ...
    """

    task: Task
    group: int
    turns: list[Turn] = field(default_factory=list)
    status: Status = Status.RUNNING
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    paid: list[float | Floats] = field(default_factory=list)
    label: float | None = None
    agent: str = "policy"
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> str:
        """The text of everything that the policy said."""
        return "".join(turn.said.text for turn in self.turns if turn.said is not None)

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


# N sequences, T positions of the longest sequence after its prompt (right-padded), or time steps; K turns.
#
# A model of the stage that is not in training offers what it computes under its own name: `critic_value`, `dpo_logp`; the
# reference policy's are `ref_...`. `old_x` is x before the step's updates. What a head of a model computes goes by the
# head's name (see HEADS), a stream of Turn.token and a column of the data (`columns:`) by its own.
FIELDS: dict[str, Field] = {
    "logp": Field("N,T", "float", "forward", "log-probability of each token under the policy in training, with gradient"),
    "entropy": Field("N,T", "float", "forward", "entropy of the policy's distribution at each position, with gradient"),
    "value": Field("N,T", "float", "forward", "a critic's value of the state before each position, with gradient"),
    "score": Field("N", "float", "forward", "a reward model's score of the sequence, with gradient"),
    "ref_logp": Field("N,T", "float", "fill", "log-probability under the stage's reference policy"),
    "old_logp": Field("N,T", "float", "fill", "log-probability under the policy that drew the token"),
    "old_value": Field("N,T", "float", "fill", "the critic's value before the step's updates"),
    "rollout_logp": Field("N,T", "float", "collate", "log-probability under the engine that sampled the token"),
    "mask": Field("N,T", "bool", "collate", "True where the policy acted and the token is trained on"),
    "reward": Field("N,T", "float", "collate", "what was paid, where it was paid: on the last trained position of each turn"),
    "adv": Field("N,T", "float", "advantage", "advantage of each position"),
    "correction": Field("N,T", "float", "derive", "importance weight of what the engine drew, by which adv is multiplied"),
    "returns": Field("N,T", "float", "derive", "target of the critic at each position"),
    "ret": Field("N", "float", "collate", "total reward of the episode"),
    "bootstrap": Field(
        "N", "float", "collate", "value of the state after an episode that its environment of arrays cut; 0 else, and for text"
    ),
    "label": Field("N", "float", "collate", "label of the row: 1 for a demonstration, +1 or -1 in a pair"),
    "group": Field("N", "long", "collate", "index of the prompt: equal for the episodes of one group"),
    "agent": Field("N", "long", "collate", "index of the role that the policy played in the episode"),
    "fresh": Field("N", "bool", "collate", "True for an episode whose last turn was drawn anew at a stored state"),
    "turn": Field("N,T", "long", "collate", "index of the turn that each trained position belongs to, -1 elsewhere"),
    "turn_mask": Field("N,K", "bool", "collate", "True for the turns that the policy took"),
    "turn_reward": Field("N,K", "float", "collate", "what was paid for each turn"),
    "turn_done": Field("N,K", "float", "collate", "1 on the last turn of an episode that ended, 0 where it was cut"),
}

# What a head of a model reads, and the shape of what it says.
HEADS: dict[str, str] = {
    "token": "N,T",  # the state before each position: a critic's `value`
    "last": "N",  # the last position: a reward model's `score`
    "before_turn": "N,K",  # the state before each turn: V(s)
    "after_turn": "N,K",  # the last position of each turn: Q(s, a)
}


class Input(Protocol):
    """What a policy's forward reads of one sequence: `length` positions, of which the first `prompt` are in no field."""

    @property
    def prompt(self) -> int: ...

    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class Tokens:
    """The input of a language model: all ids of a sequence, and the images among them.

    `acted` has an entry for each id after the prompt: whether somebody chose it, so that it has a log-probability, or the
    environment said it.
    """

    ids: Ids
    prompt: int
    acted: NDArray[np.bool_]
    images: tuple[Image, ...] = ()

    @property
    def length(self) -> int:
        """How many ids there are."""
        return len(self.ids)


class Batch(dict[str, "Tensor"]):
    """Named tensors of N sequences (see FIELDS), with the `inputs` that the policy's forward reads.

    Position t of an (N,T) field of sequence i stands for position inputs[i].prompt + t of that input.
    """

    inputs: list[Any]

    def __init__(self, fields: Mapping[str, Tensor], inputs: list[Any]) -> None:
        super().__init__(fields)
        self.inputs = inputs

    def take(self, index: Sequence[int]) -> Batch:
        """The sequences of `index`, in that order; fields keep their width."""
        chosen = list(index)
        return Batch({name: value[chosen] for name, value in self.items()}, [self.inputs[i] for i in chosen])


# --------------------------------------------------------------------------- what a recipe names
# Each alias below is a group of the catalogue. Positional parameters of a component are the fields that it reads,
# keyword-only parameters are its hyperparameters: the signature is the YAML schema.
class LossTerm(Protocol):
    """Named tensors -> (N,T), (N,K) or (N,), and of a term that reads `group` (P,): unreduced, float32, no side effect.

    (P,) is one number for each group, and such a term never gives (N,). One marked `@whole_batch` sees all sequences of the
    optimiser step at once, and may return ().
    """

    def __call__(self, *fields: Tensor) -> Tensor: ...


class Advantage(Protocol):
    """Named tensors -> (N,T): the field `adv`."""

    def __call__(self, *fields: Tensor) -> Tensor: ...


class Derive(Protocol):
    """Named tensors -> (N,T): the field that `into` names, before the advantage."""

    def __call__(self, *fields: Tensor) -> Tensor: ...


class Watch(Protocol):
    """Named tensors -> what a LossTerm may give: a diagnostic, averaged and logged; never trained on."""

    def __call__(self, *fields: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Counts:
    """How much one optimiser step trains on, over all ranks and accumulation: what reductions divide by."""

    tokens: float
    sequences: float
    groups: float = 1.0


class Reduce(Protocol):
    """(x, mask, counts) -> (): a sum over this part of the batch, divided by the whole step's counts."""

    def __call__(self, x: Tensor, mask: Tensor, counts: Counts) -> Tensor: ...


class Reward(Protocol):
    """The episodes of one group -> one number each, or one for each turn, or for each id that a turn did.

    nan: the episode could not be scored.
    """

    def __call__(self, episodes: list[Episode]) -> Sequence[float] | Sequence[Sequence[float | Floats]]: ...


class Keep(Protocol):
    """The episodes of one step -> those to train on, whole groups or single ones."""

    def __call__(self, episodes: list[Episode]) -> list[Episode]: ...


class Metric(Protocol):
    """`greedy` (one episode a task) or `sampled` (several a task), as groups -> a number."""

    def __call__(self, groups: list[list[Episode]]) -> float: ...


@dataclass(frozen=True)
class Sampling:
    """How an engine draws tokens: `temperature` 0 is greedy decoding, `rows` the most sequences decoded at a time.

    A turn ends with the id that completes one of the `stop` strings in its text, as it does with an end token. With
    `ignore_eos` an end token is an id like any other.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    rows: int = 1024
    ignore_eos: bool = False


VecStep = tuple[NDArray[Any], Floats, NDArray[np.bool_], NDArray[np.bool_], dict[str, Floats]]


class VecEnv(Protocol):
    """Environments of arrays, one for each task, stepped together. An environment that is done ignores its action.

    `step` returns what is seen next (B,...), reward, terminated, truncated (B,), and by name what else is told of each step
    (B,): the streams of the turn (`Turn.token`) that a reward or a loss can read.
    """

    def reset(self) -> NDArray[Any]: ...

    def step(self, actions: Ids) -> VecStep: ...


@dataclass(frozen=True)
class TaskSource:
    """A task of the catalogue: named splits of data, how an episode is played, and what says whether it is right.

    `max_new_tokens` is the length that an answer needs; a stage that sets none takes it. `make_vec` makes the environments
    of arrays of some tasks, where the task is not a conversation.
    """

    splits: Mapping[str, Callable[[], list[Episode]]]
    verifier: Reward
    make_env: Callable[[], Env]
    max_new_tokens: int = 512
    make_vec: Callable[[list[Task]], VecEnv] | None = None


class Data(Protocol):
    """A data set of the catalogue, read when it is called."""

    def __call__(self) -> list[Episode]: ...


@dataclass(frozen=True)
class View:
    """What a text policy sees when it acts: its ids so far, their images, and a `prefix` that the turn has to begin with."""

    ids: Ids
    images: tuple[Image, ...] = ()
    prefix: Ids = field(default_factory=lambda: np.zeros(0, np.int64))


class Policy(Protocol):
    """What is trained. `module` holds the weights, `offers` names the fields that `forward` computes."""

    module: torch.nn.Module
    device: torch.device

    @property
    def offers(self) -> set[str]: ...

    def parameters(self) -> list[torch.nn.Parameter]: ...

    def collate(self, episodes: list[Episode]) -> Batch: ...

    def forward(self, batch: Batch, want: set[str], temperature: float = 1.0) -> dict[str, Tensor]: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def split(self, batch: Batch, token_budget: int, *, whole_groups: bool) -> list[list[int]]: ...

    def save(self, folder: Path) -> None: ...


class TextPolicy(Policy, Protocol):
    """A policy that speaks: a language model."""

    def tokenize(self, episode: Episode) -> Episode: ...

    def render(self, messages: Sequence[Message]) -> Ids: ...

    def extension(self, talk: Sequence[Message], num_replies: int) -> Ids: ...

    def pieces(self, ids: Ids) -> list[str]: ...

    def decode(self, ids: Ids) -> str: ...

    def act(
        self, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended | None = None
    ) -> list[list[Turn]]: ...


Ended = Callable[[int, Turn], object]  # is told of a turn, and its number among all, when it ends


class Rollout(Protocol):
    """The engine that samples: `len(keys[i])` next turns of each view, whose draws depend on their keys alone.

    It may tell `ended` of a turn before others have ended.
    """

    def __call__(
        self, policy: Any, views: list[View], keys: list[list[int]], sampling: Sampling, ended: Ended | None = None
    ) -> list[list[Turn]]: ...


class Optim(Protocol):
    """(parameters, lr) -> a torch optimiser; `clip`, `schedule` and `warmup` are read by the learner."""

    def __call__(self, parameters: Any, lr: float) -> Any: ...


class Model(Protocol):
    """Settings -> a policy, its weights drawn from `seed` where there are none to read."""

    def __call__(self, *, seed: int = 0) -> Any: ...


@dataclass(frozen=True)
class Play:
    """What a sampler plays with: the policy, the stage's other models by name, environments, and the stage's own rewards.

    `score` pays the stage's rewards for any episodes (it fills rewards, paid and reward); `ended` is told of episodes as they
    end, so that costly rewards are worked out meanwhile. `pools` are the stage's buffers. Draws depend on `seed`, which no
    other step or stage has, and on nothing else.
    """

    policy: Any
    make_env: Callable[[], Env]
    sampling: Sampling
    seed: tuple[int, ...]
    make_vec: Callable[[list[Task]], VecEnv] | None = None
    models: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[list[Episode]], None] = lambda episodes: None
    pools: Mapping[str, Sequence[Episode]] = field(default_factory=dict)
    step: int = 0
    ended: Callable[[Episode], object] = lambda episode: None


class Sampler(Protocol):
    """Plays `n` episodes of each row's task -> episodes, those of a group together."""

    def __call__(self, play: Play, rows: list[Episode], n: int) -> list[Episode]: ...


class Backend(Protocol):
    """A language model that is asked, not trained: conversations -> `n` texts for each."""

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> list[list[str]]: ...


Bound_co = TypeVar("Bound_co", covariant=True)


@dataclass(frozen=True)
class Component(Generic[Bound_co]):
    """A catalogue entry bound to its hyperparameters, with the framework's own keys taken out.

    `reads` are the fields that it asks for, after the recipe's `read:` renamed them. `into` and `add` say which field a
    derive writes, and whether it adds to what is there. A setting that is a ModelName becomes that model of the stage.
    """

    name: str
    call: Bound_co
    reads: tuple[str, ...] = ()
    weight: float = 1.0
    into: str = ""
    add: bool = False
    reduce: Component[Reduce] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class ModelName(str):
    """A model of the stage, named by a setting of a component (a parameter annotated Policy or TextPolicy)."""


@dataclass(frozen=True)
class ModelRef:
    """Where weights come from: an earlier stage (`@sft`, `@sft:best`, `@sft:step=80`, `@sft:20%`), a directory or a hub id.

    `@rl/critic` is another model than the policy that stage `rl` trained. `@model` is what the recipe starts from; no stage
    may be called that.
    """

    stage: str = ""
    pick: str = "last"
    path: str = ""
    name: str = "policy"

    def __str__(self) -> str:
        if not self.stage:
            return self.path
        name = "" if self.name == "policy" else f"/{self.name}"
        return f"@{self.stage}{name}" + ("" if self.pick == "last" else f":{self.pick}")


@dataclass(frozen=True)
class DataRef:
    """Where rows come from: a split of the task (`@task/train`), a stage that writes rows (`@pairs`), or a data set.

    `@sorted/medium` is what stage `sorted` selected under that name.
    """

    split: str = ""
    source: Component[Data] | None = None
    stage: str = ""

    def __str__(self) -> str:
        if self.source is not None:
            return self.source.name
        return f"@{self.stage or 'task'}" + (f"/{self.split}" if self.split else "")


class Stage(Protocol):
    """One word of a recipe's `stages`: a dataclass whose fields are its YAML keys."""

    def run(self, ctx: Any) -> dict[str, float]: ...

    def problems(self, base: frozenset[str]) -> list[str]: ...

    def describe(self) -> str: ...
