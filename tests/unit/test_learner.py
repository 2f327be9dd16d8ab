"""One optimiser step against plain autograd on each sequence alone, and what must not change it."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from architectures import episode, ids, random_episodes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlx import reduce
from rlx.learner import NonFinite, TorchLearner
from rlx.losses import likelihood, policy, watch
from rlx.marks import whole_batch
from rlx.models.language import LanguageModel
from rlx.models.layout import num_ids
from rlx.models.load import tiny
from rlx.optim import adamw, factor
from rlx.rollout.native import generate
from rlx.rollout.noise import key
from rlx.terms import Update
from rlx.types import Batch, Component, ConfigError, Episode, Sampling, Task, View
from rlx.units import counted, dealt, own_units, stop_gradient

NLL = Component("nll", likelihood.nll, ("logp", "mask"))
PG = Component("policy_gradient", policy.policy_gradient, ("logp", "adv", "mask"))
ENTROPY = Component("entropy", watch.entropy_value, ("entropy", "mask"))
REDUCTIONS: dict[str, Component[Any]] = {
    "token_mean": Component("token_mean", reduce.token_mean),
    "seq_mean": Component("seq_mean", reduce.seq_mean),
    "seq_sum": Component("seq_sum", reduce.seq_sum),
    "constant": Component("constant", partial(reduce.constant, length=10)),
}


def model(seed: int = 0) -> LanguageModel:
    return tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, seed=seed)


def sgd(**settings: Any) -> Component[Any]:
    """Weights move by -lr times the gradient (clip 0: as it is), so a step shows the gradient."""
    return Component("sgd", lambda parameters, lr: torch.optim.SGD(parameters, lr=lr), settings={"clip": 0.0, **settings})


def batch_of(made: LanguageModel, num: int = 7) -> Batch:
    batch = made.collate(random_episodes(num))
    torch.manual_seed(1)
    batch["adv"] = torch.randn(batch["mask"].shape)
    return batch


def weights(made: LanguageModel) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in made.module.parameters()])


def moved(update: Update, num: int = 7, seed: tuple[int, ...] = (0,)) -> tuple[dict[str, float], Tensor]:
    """Metrics, and the gradient that one step at lr 1 followed."""
    made = model()
    before = weights(made)
    metrics = TorchLearner(made, sgd(), lr=1.0, total=1).step(batch_of(made, num), update, seed)
    return metrics, before - weights(made)


def by_hand(name: str) -> tuple[float, Tensor]:
    """The policy-gradient loss and its gradient, sequence by sequence, without padding or units."""
    made = model()
    batch = batch_of(made)
    sums, lengths = [], []
    for i, (row, start) in enumerate((x.ids, x.prompt) for x in batch.inputs):
        logits = made.module(input_ids=torch.from_numpy(row)[None]).logits[0, start - 1 : -1]
        logp = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(row[start:])[:, None])[:, 0]
        sums.append((-batch["adv"][i, : len(logp)] * logp).sum())
        lengths.append(len(logp))
    loss = {
        "token_mean": sum(sums) / sum(lengths),
        "seq_mean": sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums),
        "seq_sum": sum(sums) / len(sums),
        "constant": sum(sums) / (10 * len(sums)),
    }[name]
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in made.module.parameters()]
    )


# --------------------------------------------------------------------------- the gradient
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_gradient_is_that_of_the_loss_by_hand(name: str, budget: int) -> None:
    loss, gradient = by_hand(name)
    metrics, found = moved(Update([PG], REDUCTIONS[name], token_budget=budget))
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    torch.testing.assert_close(found, gradient, atol=2e-6 + 1e-6 * float(gradient.abs().max()), rtol=1e-4)


class Casts(TorchDispatchMode):
    """Counts how often weights are copied to another type."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.own, self.number = {id(w) for w in weights}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._to_copy.default and id(args[0]) in self.own
        return func(*args, **(kwargs or {}))


def test_bf16_weights_are_cast_once_for_all_units() -> None:
    made = tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, dtype="bf16")
    batch = batch_of(made)
    numbers, moves = [], []
    for budget in (1, 10_000):
        learner = TorchLearner(copy.deepcopy(made), sgd(), lr=1.0, total=1)
        with Casts(learner.parameters) as casts:
            learner.step(batch, Update([PG], REDUCTIONS["token_mean"], token_budget=budget), (0,))
        numbers.append(casts.number)
        moves.append(weights(made) - weights(learner.policy))
    assert numbers[0] == numbers[1] > 0
    torch.testing.assert_close(*moves, atol=0.02 * float(moves[1].abs().max()), rtol=0)
    assert float(moves[1].abs().max()) > 0.0


def test_terms_have_their_own_weights_and_reductions() -> None:
    terms = [dataclasses.replace(PG, weight=0.5), dataclasses.replace(NLL, weight=2.0, reduce=REDUCTIONS["seq_sum"])]
    metrics, found = moved(Update(terms, REDUCTIONS["token_mean"]))
    parts = [moved(Update([term], REDUCTIONS[name])) for term, name in ((PG, "token_mean"), (NLL, "seq_sum"))]
    assert metrics["loss/policy_gradient"] == pytest.approx(parts[0][0]["loss"], abs=1e-5)
    assert metrics["loss/nll"] == pytest.approx(parts[1][0]["loss"], rel=1e-5)
    assert metrics["loss"] == pytest.approx(0.5 * parts[0][0]["loss"] + 2 * parts[1][0]["loss"], rel=1e-5)
    torch.testing.assert_close(found, 0.5 * parts[0][1] + 2 * parts[1][1], atol=1e-4, rtol=1e-4)


def test_term_of_a_number_a_sequence_is_averaged_over_sequences() -> None:
    term = Component("score", lambda logp, mask: torch.where(mask, logp, 0.0).sum(1), ("logp", "mask"))
    summed = dataclasses.replace(NLL, reduce=REDUCTIONS["seq_sum"])
    one, two = (moved(Update([t], REDUCTIONS["token_mean"])) for t in (term, summed))
    assert one[0]["loss"] == pytest.approx(-two[0]["loss"], rel=1e-5)


def test_term_of_a_number_a_sequence_takes_no_reduction() -> None:
    score = Component("score", lambda logp, mask: torch.where(mask, logp, 0.0).sum(1), ("logp", "mask"))
    with pytest.raises(ConfigError) as error:
        moved(Update([dataclasses.replace(score, reduce=REDUCTIONS["seq_sum"])], REDUCTIONS["token_mean"]))
    assert str(error.value) == (
        "loss 'score' is one number for each sequence, averaged over sequences; "
        "`reduce: seq_sum` is for terms of one number for each token: leave it out"
    )


# --------------------------------------------------------------------------- groups
def margin(logp: Tensor, mask: Tensor, group: Tensor, label: Tensor) -> Tensor:
    """-log sigmoid of the pair's margin: (P,)."""
    score = label * torch.where(mask, logp, 0.0).sum(1)
    return -torch.nn.functional.logsigmoid(0.1 * ((group.unique()[:, None] == group) * score).sum(1))


PAIRED = Component("margin", margin, ("logp", "mask", "group", "label"))


def paired(budget: int, order: list[int], minibatches: int = 1) -> tuple[dict[str, float], Tensor]:
    """Loss, and the gradient that a step at lr 1 followed, of four pairs whose sequences differ in length."""
    made = model()
    before = weights(made)
    batch = batch_of(made, 8).take(order)
    batch["label"] = torch.tensor([1.0 - 2 * (i % 2) for i in order])
    update = Update([PAIRED], REDUCTIONS["token_mean"], token_budget=budget, minibatches=minibatches)
    metrics = TorchLearner(made, sgd(), lr=1.0 if minibatches == 1 else 0.0, total=1).step(batch, update, (0,))
    return metrics, before - weights(made)


MIXED_UP = [5, 0, 3, 6, 1, 4, 7, 2]


@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("order", [list(range(8)), MIXED_UP])
def test_pairwise_loss_is_the_same_for_any_token_budget(budget: int, order: list[int]) -> None:
    made = model()
    batch = batch_of(made, 8)
    logp = torch.where(batch["mask"], made.forward(batch, {"logp"})["logp"], 0.0).sum(1).detach()
    expected = -torch.nn.functional.logsigmoid(0.1 * (logp[::2] - logp[1::2])).mean()
    metrics, found = paired(budget, order)
    assert metrics["loss"] == pytest.approx(float(expected), abs=1e-5)
    torch.testing.assert_close(found, paired(10_000, list(range(8)))[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("minibatches", [2, 4, 9])
def test_minibatches_keep_groups_whole(minibatches: int) -> None:
    """Four pairs make equal minibatches, so the mean over them is the whole's; a pair cut in two would change it."""
    whole, parts = paired(10_000, MIXED_UP)[0], paired(10_000, MIXED_UP, minibatches)[0]
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_a_watch_that_reads_group_keeps_groups_whole_too() -> None:
    size = Component("group_size", lambda group, mask: mask * (group[:, None] == group).sum(1, keepdim=True), ("group", "mask"))
    metrics, _ = moved(Update([NLL], REDUCTIONS["token_mean"], watch=[size], token_budget=1, minibatches=4), num=8)
    assert metrics["group_size"] == 2.0


def test_gradient_variance_changes_neither_loss_nor_gradient() -> None:
    plain, halved = (moved(Update([PG], REDUCTIONS["seq_mean"], grad_variance=on), num=8) for on in (False, True))
    assert halved[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-5)
    assert halved[0]["grad_variance"] > 0
    torch.testing.assert_close(halved[1], plain[1], atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------- steps, clipping, schedule
def test_epochs_and_minibatches_count_optimiser_steps() -> None:
    made = model()
    learner = TorchLearner(made, sgd(), lr=0.0, total=100)
    learner.step(batch_of(made), Update([NLL], REDUCTIONS["seq_mean"], epochs=2, minibatches=3), (0,))
    assert learner.steps == 6
    learner.step(batch_of(made, 2), Update([NLL], REDUCTIONS["seq_mean"], epochs=1, minibatches=5), (0,))
    assert learner.steps == 8  # two rows make two parts


def test_trained_tokens_are_counted_each_epoch() -> None:
    made = model()
    learner = TorchLearner(made, sgd(), lr=0.0, total=100)
    batch = made.collate([episode(([10, 11], [20, 21, 22]), ([12], [23])), episode(([10], [20]))])
    learner.step(batch, Update([NLL], REDUCTIONS["seq_mean"], epochs=3, minibatches=2, token_budget=1), (0,))
    assert learner.tokens == 15
    learner.step(batch, Update([NLL], REDUCTIONS["seq_mean"]), (0,))
    assert learner.tokens == 20


def test_metrics_are_means_over_minibatches() -> None:
    made = model()
    learner = TorchLearner(made, sgd(), lr=0.0, total=100)
    batch = batch_of(made, 8)
    whole = learner.step(batch, Update([NLL], REDUCTIONS["seq_mean"], watch=[ENTROPY]), (0,))
    parts = learner.step(batch, Update([NLL], REDUCTIONS["seq_mean"], epochs=2, minibatches=4), (0,))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)  # equal parts: the mean of means is the mean
    out = made.forward(batch, {"entropy"})
    assert whole["entropy"] == pytest.approx(float(out["entropy"][batch["mask"]].mean().detach()), rel=1e-5)


def test_a_step_starts_from_no_gradient() -> None:
    made = model()
    learner = TorchLearner(made, sgd(), lr=0.0, total=2)
    one, two = (learner.step(batch_of(made), Update([PG], REDUCTIONS["seq_mean"]), (0,))["grad_norm"] for _ in range(2))
    assert one == two


def test_minibatches_follow_the_seed() -> None:
    update = Update([NLL], REDUCTIONS["seq_mean"], minibatches=3)
    one, same, other = (moved(update, seed=seed)[1] for seed in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_clip_limits_the_norm_and_reports_the_one_before() -> None:
    made = model()
    before = weights(made)
    batch = batch_of(made)
    metrics = TorchLearner(made, sgd(clip=0.01), lr=1.0, total=1).step(batch, Update([PG], REDUCTIONS["seq_sum"]), (0,))
    assert metrics["grad_norm"] > 0.1
    assert float((before - weights(made)).norm()) == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, [0.5, 1, 1, 0.5, 0]),
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447, 0]),
        ("cosine", 2, [0.5, 1, 1, 0.5, 0]),
    ],
)
def test_schedule_values(schedule: str, warmup: int, expected: list[float]) -> None:
    """Of 4 steps: the last is at index 3; 0 is where the schedule would arrive, and stays."""
    values = [factor(step, total=4, schedule=schedule, warmup=warmup) for step in range(5)]
    assert values == pytest.approx(expected, abs=1e-6)
    assert factor(9, total=4, schedule=schedule, warmup=warmup) == pytest.approx(expected[-1])


def test_learning_rate_follows_the_schedule() -> None:
    made = model()
    learner = TorchLearner(made, sgd(schedule="linear"), lr=0.1, total=4)
    rates = [learner.step(batch_of(made), Update([NLL], REDUCTIONS["token_mean"]), (0,))["lr"] for _ in range(4)]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_adamw_takes_its_settings() -> None:
    group = adamw([torch.nn.Parameter(torch.zeros(1))], 0.5, betas=[0.8, 0.9], eps=1e-3, weight_decay=0.2).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 1e-3, 0.2)


# --------------------------------------------------------------------------- what stops a run
def test_loss_that_is_not_finite_leaves_the_weights() -> None:
    made = model()
    before = weights(made)
    batch = batch_of(made)
    batch["adv"][2, 0] = float("inf")
    learner = TorchLearner(made, sgd(), lr=1.0, total=1)
    with pytest.raises(NonFinite, match=r"the loss or its gradient is not finite .* on the groups \[0, 1, 2, 3\]; the weights"):
        learner.step(batch, Update([PG], REDUCTIONS["token_mean"]), (0,))
    assert torch.equal(weights(made), before)
    assert all(p.grad is None for p in made.module.parameters())
    batch["adv"][2, 0] = 0.0
    assert learner.step(batch, Update([PG], REDUCTIONS["token_mean"]), (0,))["grad_norm"] > 0


def test_a_minibatch_without_a_trained_token_is_no_step() -> None:
    """Of two minibatches, one has nothing: a step is taken on the other, whose gap is seen whichever comes first."""
    for seed in range(4):
        made = model()
        batch = made.collate([*random_episodes(1), episode(([10], [20]))])
        batch["mask"][1] = False
        learner = TorchLearner(made, sgd(), lr=1.0, total=2)
        metrics = learner.step(batch, Update([NLL], REDUCTIONS["token_mean"], minibatches=2, sampled=True), (seed,))
        assert learner.steps == 1
        assert metrics["gap/max"] > 0


@pytest.mark.parametrize("did", [[], [20]])
def test_a_batch_without_a_trained_token_moves_nothing(did: list[int]) -> None:
    made = model()
    before = weights(made)
    batch = made.collate([episode(([10], did))])
    batch["mask"] = torch.zeros_like(batch["mask"])
    learner = TorchLearner(made, sgd(), lr=1.0, total=1)
    assert learner.step(batch, Update([NLL], REDUCTIONS["token_mean"]), (0,)) == {}
    assert learner.steps == 0
    assert torch.equal(weights(made), before)


# --------------------------------------------------------------------------- on-policy
def sampled(made: LanguageModel) -> Batch:
    prompts = [View(ids(3, 60, 61, 4)), View(ids(3, 70, 4))]
    played = generate(made, prompts, [[key(i, j) for j in range(6)] for i in range(2)], Sampling(8))
    return made.collate([Episode(Task(()), i, [turn]) for i, row in enumerate(played) for turn in row])


def test_gap_is_measured_before_the_first_update() -> None:
    made = model()
    update = Update([NLL], REDUCTIONS["token_mean"], epochs=3, minibatches=2, sampled=True)
    metrics = TorchLearner(made, sgd(), lr=5.0, total=6).step(sampled(made), update, (0,))
    assert 0.0 <= metrics["gap/mean"] <= metrics["gap/max"] < 1e-5


def test_gap_shows_another_policy() -> None:
    batch = sampled(model(seed=1))
    other = model(seed=2)
    update = Update([NLL], REDUCTIONS["token_mean"], sampled=True)
    metrics = TorchLearner(other, sgd(), lr=0.0, total=1).step(batch, update, (0,))
    gap = (other.forward(batch, {"logp"})["logp"] - batch["rollout_logp"]).abs()[batch["mask"]].detach()
    assert metrics["gap/mean"] == pytest.approx(float(gap.mean()), rel=1e-4)
    assert metrics["gap/max"] == pytest.approx(float(gap.max()), rel=1e-4)
    assert metrics["gap/max"] > 0.01


# --------------------------------------------------------------------------- several ranks, too little memory
def test_units_are_dealt_evenly() -> None:
    sizes = [7, 1, 9, 3, 3, 5]
    assert dealt(sizes, 1) == [[0, 1, 2, 3, 4, 5]]
    assert dealt(sizes, 2) == [[2, 3, 4], [0, 1, 5]]
    assert dealt([4], 3) == [[0], [], []]
    for ranks in (2, 3, 5):
        found = dealt(sizes, ranks)
        assert sorted(i for own in found for i in own) == list(range(6))
        load = [sum(sizes[i] for i in own) for own in found]
        assert max(load) - min(load) <= max(sizes)


def test_smaller_units_are_smaller_whatever_bounds_them() -> None:
    """With a budget above what the batch has, and with one that is what it has once shared prompts count once."""
    made = model()
    batch = batch_of(made, 4)
    for budget in (10**6, num_ids([x.ids for x in batch.inputs])):
        whole, half = own_units(made, batch, budget), own_units(made, batch, budget, 0.5)
        assert len(half) >= 2 * len(whole) >= 2
        assert sum(len(unit.inputs) for unit, _ in half) == 4
    assert len(own_units(made, batch, 1, 0.5)) == 4


def test_a_unit_that_is_gone_through_once_more_adds_nothing_whatever_its_loss_is() -> None:
    weight = torch.tensor([0.5, 1.0], requires_grad=True)
    fields = {"logp": weight.log(), "entropy": torch.ones(2)}
    stop_gradient(fields)
    (fields["logp"] / 0.0).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 0.0]
    assert counted(torch.tensor([float("inf"), float("nan")]), True).tolist() == [0.0, 0.0]


def test_halved_units_are_halved_in_forwards_without_gradient_too() -> None:
    made, sizes = model(), list[int]()
    forward = made.forward

    def seen(unit: Batch, *rest: Any) -> dict[str, Tensor]:
        sizes.append(len(unit.inputs))
        return forward(unit, *rest)

    made.forward = seen  # type: ignore[method-assign]
    coupled = Component("coupled", whole_batch(lambda logp, mask: logp[mask].mean().square()), ("logp", "mask"))
    learner = TorchLearner(made, sgd(), lr=1.0, total=1)
    learner.share = 0.5
    learner.step(batch_of(made, 4), Update([coupled], REDUCTIONS["token_mean"], token_budget=10**6), (0,))
    half = len(sizes) // 2
    assert sizes[:half] == sizes[half:]
    assert half >= 2


def test_what_exceeds_the_memory_is_repeated_once_with_half_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    def hungry(logp: Tensor, mask: Tensor, *, most: int) -> Tensor:
        if len(mask) > most:
            raise torch.OutOfMemoryError
        return -logp

    def step(most: int, budget: int, times: int = 1) -> tuple[list[dict[str, float]], Tensor]:
        made = model()
        term = Component("hungry", partial(hungry, most=most), ("logp", "mask"))
        learner = TorchLearner(made, sgd(), lr=0.1, total=times)
        update = Update([term], REDUCTIONS["token_mean"], token_budget=budget)
        return [learner.step(batch_of(made, 6), update, (0,)) for _ in range(times)], weights(made)

    width = max(x.length for x in batch_of(model(), 6).inputs)
    plain, there = step(6, 2 * width, times=2)
    budget = num_ids([x.ids for x in batch_of(model(), 6).inputs])  # all six rows
    said = capsys.readouterr().out
    halved, here = step(5, budget, times=2)
    assert [m.pop("token_budget") for m in halved] == [budget // 2, budget // 2]
    assert (said, capsys.readouterr().out) == ("", f"! out of memory: token_budget {budget} is halved, and the step repeated\n")
    for a, b in zip(plain, halved, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert torch.allclose(here, there, atol=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        step(0, budget)
