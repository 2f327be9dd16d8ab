"""Train small networks on given batches, by any learner, in one process or as a rank of several."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx import reduce, world
from rlx.encoding import decode, encode
from rlx.launch import Launch
from rlx.learner import Learner, MakeLearner, TorchLearner
from rlx.llm.openai import part_of
from rlx.marks import stateful, vanishes_with, whole_batch
from rlx.models.nets import NetPolicy, mlp
from rlx.optim import adamw
from rlx.stages.spread import led
from rlx.stages.state import Generators
from rlx.tensors import inside
from rlx.terms import Update
from rlx.types import Component, ConfigError, Episode, Image, Message, Status, Task, Turn
from rlx.units import computed

DRAW = np.random.default_rng(0)
# Groups of unequal size and length; in the second batch one sequence alone, so that a rank has nothing.
BATCHES = [[[3, 7, 2], [9, 1], [4, 4, 4, 12], [5]], [[6]], [[2, 2], [8, 3]]]


def episode(group: int, number: int, length: int) -> Episode:
    token = {"seen": DRAW.normal(size=(length, 4)).astype(np.float32)}
    if (group, number) == (2, 1):
        token["trained"] = np.zeros(length, bool)  # fully masked
    logp = DRAW.normal(size=length).astype(np.float32) - 1
    turn = Turn(np.zeros(0, np.int64), DRAW.integers(0, 3, length), logp, token=token)
    return Episode(Task((Message("user", "?"),)), group, [turn], Status.FINISHED, reward=number % 2, label=number % 2 * 2.0 - 1)


def group_spread(logp: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    x = inside(logp, mask).sum(1)
    return torch.stack([x[group == g].square().mean() for g in group.unique()])


@whole_batch
@stateful("level", 0.0, lambda level, logp, mask: 0.5 * level + 0.5 * logp[mask].mean())
def batch_spread(logp: Tensor, mask: Tensor, level: Tensor) -> Tensor:
    x = inside(logp, mask).sum(1)
    return (x - x.mean()).square().mean() + (x.mean() - level).square()


@vanishes_with("reward")
def gradient_of_pay(logp: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
    return -inside(reward, mask) * inside(logp, mask)


NLL = Component("nll", lambda logp, mask: -logp, ("logp", "mask"))
VALUE = Component("value", lambda value, ret, mask: (value - ret[:, None]).square(), ("value", "ret", "mask"))
GROUPS = Component("groups", group_spread, ("logp", "mask", "group"))
COUPLED = Component("coupled", batch_spread, ("logp", "mask", "level"))
PAID = Component("paid", gradient_of_pay, ("logp", "reward", "mask"))
ENTROPY = Component("entropy", lambda entropy, mask: entropy, ("entropy", "mask"))
MEAN, SEQUENCES = (Component[Any]("r", f) for f in (reduce.token_mean, reduce.seq_mean))
UPDATES = [
    Update([NLL, VALUE], SEQUENCES, [ENTROPY], epochs=2, minibatches=2, token_budget=12, sampled=True),
    Update([NLL], MEAN, token_budget=1000),
    Update([GROUPS], MEAN, token_budget=20),
    Update([PAID], MEAN, [ENTROPY], token_budget=12),  # of the second batch nothing has signal
    Update([COUPLED], MEAN, token_budget=16),
]


ADAMW = Component[Any]("adamw", adamw, settings={"clip": 0.5, "schedule": "linear"})


class Rounded(NetPolicy):
    """Computes in bfloat16, and ZeRO may keep its weights so."""

    bf16 = True

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


def learned(
    make: MakeLearner, then: MakeLearner | None = None, updates: Sequence[Update] = UPDATES, kind: type[NetPolicy] = NetPolicy
) -> list[dict[str, float]]:
    """The metrics of each step, and the weights and a forward after them. From the fourth on it is `then` that learns."""
    global DRAW
    DRAW = np.random.default_rng(0)
    batches = [[episode(g, i, n) for g, ns in enumerate(sizes) for i, n in enumerate(ns)] for sizes in BATCHES]
    found: list[dict[str, float]] = []
    for update in updates:
        policy = network(kind)
        learner = make(policy, ADAMW, lr=1e-3, total=40)
        for step in range(6):
            if then is not None and step == 3:
                policy, learner = gone_on(policy, learner, then)
            found.append(learner.step(policy.collate(batches[step % len(batches)]), update, (step,)))
        logp = computed(policy, policy.collate(batches[0]), {"logp"}, 16)["logp"]
        sums = {name: float(weight.detach().double().sum()) for name, weight in policy.module.named_parameters()}
        found.append({**sums, "logp": float(logp.sum()), "steps": learner.steps, "tokens": learner.tokens})
    return found


def network(kind: type[NetPolicy] = NetPolicy) -> Any:
    """Weights of sizes that two ranks cannot share evenly."""
    made = mlp(inputs=4, actions=3, sizes=[7], seed=1)
    return kind(made.module, made.device, made.name, made.settings)


def gone_on(policy: Any, learner: Learner, then: MakeLearner) -> tuple[Any, Learner]:
    """A new policy and learner in the state of the old ones, by way of what rank 0 would write to a file."""
    state = learner.state_dict()
    whole = {"learner": state, "weights": {name: x.detach() for name, x in policy.module.named_parameters()}}
    read = decode(*world.first(lambda: encode(whole, {})), {})
    made = network(type(policy))
    other = then(made, ADAMW, lr=1e-3, total=40)
    with torch.no_grad():  # as a stage does: the learner has its own copies by then
        for name, weight in made.module.named_parameters():
            weight.copy_(read["weights"][name])
    other.load_state_dict(read["learner"])
    return made, other


def under(stage: int, *, offload: bool = False, persist: int = 0) -> MakeLearner:
    """The learner of a stage of ZeRO, with every weight divided; what can be is kept in the host's memory with `offload`."""
    from rlx.zero import learner_of

    launch = Launch(
        name="zero",
        stage=stage,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": persist}},
        offload_optimizer=offload,
        offload_parameters=offload and stage == 3,
    )
    return learner_of(stage, launch.settings(), 1.0)


class Pooled(torch.optim.SGD):
    """Keeps two numbers of each weight, however large."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["ends"] = p.detach().flatten()[[0, -1]]


def refused(make: MakeLearner) -> str:
    """What is said of an optimiser whose state cannot be divided."""
    policy = network()
    batch = policy.collate([episode(0, i, 3) for i in range(4)])
    try:
        make(policy, Component("pooled", Pooled), lr=1e-3, total=4).step(batch, UPDATES[1], (0,))
    except ConfigError as error:
        return str(error)
    return ""


def moved(make: MakeLearner) -> list[bool]:
    """Whether the critic moves in a step that has a gradient for it, and in one after that which has none."""
    policy = network()
    learner = make(policy, Component("sgd", torch.optim.SGD), lr=0.1, total=4)
    batch = policy.collate([episode(0, i, 3) for i in range(4)])
    sums = [float(policy.module.critic[0].weight.detach().double().sum())]
    for step, update in enumerate([UPDATES[0], UPDATES[1]]):
        learner.step(batch, update, (step,))
        sums.append(float(policy.module.critic[0].weight.detach().double().sum()))
    return [before != after for before, after in itertools.pairwise(sums)]


def drawn_again() -> list[bool]:
    """Whether each rank draws the same after its state is read, and another than the first rank does."""
    generators = Generators(7)
    torch.rand(1 + world.rank())
    saved = decode(*encode(generators.state_dict(), {}), {})
    drawn = [(float(torch.rand(())), float(np.random.random()), random.random()) for _ in (0, 1)]
    generators.load_state_dict(saved)
    same = drawn[0] == (float(torch.rand(())), float(np.random.random()), random.random())
    firsts = world.gathered(drawn[0][0])
    return world.gathered(same) + [len(set(firsts)) == len(firsts)]


def shared() -> list[bool]:
    """Whether what rank 0 makes of tasks that all have is of each rank's own tasks."""
    tasks = [Task((Message("user", ("look", Image(np.zeros((2, 2, 3), np.uint8)))),)) for _ in range(3)]
    made = led(lambda: [Episode(task, i) for i, task in enumerate(tasks)], tasks)
    return world.gathered(all(e.task is task for e, task in zip(made, tasks, strict=True)))


def in_one() -> list[dict[str, float]]:
    """What one process learns."""
    return learned(TorchLearner)


def in_ranks() -> dict[str, Any]:
    """What is learned under each stage of ZeRO, gone on with from a state, under another stage, too; what is refused."""
    stages = ["0", "1", "2", "3"]
    made = {stage: under(int(stage)) for stage in stages}
    first, some = UPDATES[:1], [UPDATES[0], UPDATES[-1]]
    found: dict[str, Any] = {"refused": refused(made["2"]), "drawn": drawn_again(), "shared": shared(), "other": {}}
    found["budget"] = world.gathered([part_of(budget) for budget in (None, 1, 5, 8)])
    found["steps"] = {stage: learned(learner) for stage, learner in made.items()}
    found["again"] = {stage: learned(learner, learner, some if stage == "2" else first) for stage, learner in made.items()}
    for stage in stages[1:]:
        name = f"{stage} in bf16"
        found["steps"][name] = learned(made[stage], None, first, Rounded)
        found["again"][name] = learned(made[stage], made[stage], first, Rounded)
    for i, stage in enumerate(stages):
        found["other"][f"{stage} {stages[i - 1]}"] = learned(made[stage], made[stages[i - 1]], some if stage == "3" else first)
    offloaded = [under(stage, offload=True) for stage in (2, 3)]
    found["other"]["offloaded 3 2"] = learned(offloaded[1], offloaded[0], first)
    found["moved"] = [moved(learner) for learner in (*list(made.values())[1:], *offloaded)]
    whole = under(3, persist=10**6)
    found["steps"]["3 whole"] = found["steps"]["3"]
    found["again"]["3 whole"] = learned(whole, whole, first)
    return found
