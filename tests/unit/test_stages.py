"""The loops on tiny models: they learn, they repeat bit by bit, and what they write can be taken up by the next stage."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlx import advantages, filters, metrics
from rlx.build import Binder
from rlx.envs.single import SingleTurn
from rlx.health import health
from rlx.losses import likelihood
from rlx.losses import policy as policy_losses
from rlx.models.load import tiny
from rlx.rewards.rules import answer_match
from rlx.rollout.samplers import plain
from rlx.stages.collect import Collect
from rlx.stages.context import Context
from rlx.stages.draw import draw
from rlx.stages.drawing import drawing
from rlx.stages.evaluate import Evaluate
from rlx.stages.evaluation import Eval, evaluate
from rlx.stages.fit import Fit
from rlx.stages.online import Online
from rlx.stages.prepare import credit
from rlx.stages.rows import Shuffled, tokenized
from rlx.stages.select import Select
from rlx.stages.summary import summary
from rlx.track import Lines, Log, NoTracker
from rlx.types import (
    Component,
    ConfigError,
    DataError,
    DataRef,
    Episode,
    Message,
    ModelRef,
    Play,
    Sampling,
    Status,
    Task,
    TaskSource,
    Turn,
)

SIZES = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}
NOTHING = np.zeros(0, np.int64)
NLL = Component("nll", likelihood.nll, ("logp", "mask"))
PG = Component("policy_gradient", policy_losses.policy_gradient, ("logp", "adv", "mask"))
GROUP_MEAN = Component("group_mean", advantages.group_mean, ("ret", "group", "mask"))
MIXED = Component("mixed_groups", filters.mixed_groups)
ACCURACY = Component("accuracy", metrics.accuracy, ("greedy",))
TIMES = ("seconds", "tokens_per_second")


def model(**settings: Any) -> Component[Any]:
    given = {**SIZES, **settings}
    return Component("tiny", partial(tiny, **given), settings=given)


def demo(question: str, answer: str, group: int = 0) -> Episode:
    said = Turn(NOTHING, NOTHING, np.zeros(0, np.float32), said=Message("assistant", answer))
    return Episode(Task((Message("user", question),), answer), group, [said], Status.FINISHED, label=1.0)


DEMOS = [demo(q, a, i) for i, (q, a) in enumerate(zip("abcdefgh", ["1", "22", "333", "1", "2", "3", "12", "21"], strict=True))]
QUESTIONS = [Episode(row.task, row.group) for row in DEMOS]
TASK = TaskSource(
    {"demos": lambda: DEMOS, "train": lambda: QUESTIONS},
    verifier=partial(answer_match, extract="whole"),
    make_env=SingleTurn,
    max_new_tokens=5,
)
DATA, TRAIN = DataRef(split="demos"), DataRef(split="train")


def context(run_dir: Path, name: str, *, seed: int = 0, objective: str = "", **settings: Any) -> Context:
    log = Log(run_dir / name, name, display=Lines(), tracker=NoTracker(), health=health)
    return Context(run_dir=run_dir, name=name, seed=seed, model=model(**settings), task=TASK, log=log, objective=objective)


def record(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The stage's metrics, without what a clock says."""
    rows = [json.loads(line) for line in (run_dir / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def fit(**settings: Any) -> Fit:
    return Fit(**{"data": DATA, "loss": [NLL], "steps": 2, "lr": 1e-2, "rows_per_step": 4, "log_every": 1, **settings})


def online(reward: Any, **settings: Any) -> Online:
    made: dict[str, Any] = {
        "data": TRAIN,
        "reward": [Component("mine", reward)],
        "loss": [PG],
        "advantage": [GROUP_MEAN],
        "steps": 2,
        "lr": 1e-2,
        "prompts_per_step": 4,
        "group_size": 4,
    }
    return Online(**{**made, **settings})


def share_of_a(episodes: list[Episode]) -> list[float]:
    """How much of the completion is the letter a."""
    return [e.completion.count("a") / max(1, e.num_tokens) for e in episodes]


def by_sample(episodes: list[Episode]) -> list[float]:
    """1 for the first episode of a group, 0 for the others."""
    return [float(i == 0) for i in range(len(episodes))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------- learning
def test_fit_learns_its_rows_by_heart(tmp_path: Path) -> None:
    settings = Eval(data=TRAIN, metrics=[ACCURACY])
    last = fit(steps=60, rows_per_step=8, eval=settings).run(context(tmp_path, "sft"))
    rows = record(tmp_path, "sft")
    assert rows[1]["loss"] > 3.0
    assert last["loss"] < 0.1
    assert [row["eval/accuracy"] for row in rows if "eval/accuracy" in row] == [0.0, 1.0]


def test_online_learns_what_is_paid(tmp_path: Path) -> None:
    online(share_of_a, steps=25, group_size=16, lr=2e-2).run(context(tmp_path, "rl"))
    reward = [row["reward"] for row in record(tmp_path, "rl")]
    assert np.mean(reward[:3]) < 0.1
    assert np.mean(reward[-3:]) > 0.9


def test_bf16_learns_and_writes_float32(tmp_path: Path) -> None:
    last = fit(steps=60, rows_per_step=8).run(context(tmp_path, "sft", dtype="bf16"))
    assert last["loss"] < 0.2
    assert {w.dtype for w in weights(tmp_path / "sft" / "out").values()} == {torch.float32}


# --------------------------------------------------------------------------- repetition
@pytest.mark.parametrize("kind", ["fit", "online"])
def test_same_seed_same_metrics_bit_by_bit(tmp_path: Path, kind: str) -> None:
    def run(name: str, seed: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        stage = fit(steps=3) if kind == "fit" else online(share_of_a, steps=3, epochs=2, minibatches=2)
        stage.run(context(tmp_path / name, "s", seed=seed))
        return record(tmp_path / name, "s"), weights(tmp_path / name / "s" / "out")

    torch.manual_seed(5)
    one = run("one", 0)
    torch.manual_seed(6)
    two, other = run("two", 0), run("other", 1)
    assert one[0] == two[0] != other[0]
    assert same(one[1], two[1])


def test_arms_share_prompts_and_first_samples(tmp_path: Path) -> None:
    """Whatever an arm changes of loss, learning rate and filters: step by step it gets the same prompts."""
    seen: dict[str, list[list[str]]] = {"one": [], "two": []}
    said: dict[str, list[list[str]]] = {"one": [], "two": []}

    def watched(arm: str) -> Component[Any]:
        def played(play: Play, rows: list[Episode], n: int) -> list[Episode]:
            episodes = plain(play, rows, n)
            seen[arm].append([row.task.prompt[0].text for row in rows])
            said[arm].append([e.completion for e in episodes])
            return episodes

        return Component("watched", played)

    online(by_sample, steps=4, sampler=watched("one")).run(context(tmp_path / "one", "rl"))
    other = online(by_sample, steps=4, sampler=watched("two"), lr=0.1, keep=[MIXED], epochs=2, loss=[NLL])
    other.run(context(tmp_path / "two", "rl"))
    assert seen["one"] == seen["two"]
    assert len({str(prompts) for prompts in seen["one"]}) > 1
    assert said["one"][0] == said["two"][0]
    assert said["one"][1] != said["two"][1]


def test_batches_are_epochs_of_permutations() -> None:
    rows = [demo("q", str(i), i) for i in range(5)]
    batches = Shuffled(rows, 3, (0, 1), "here")
    drawn = [[row.group for row in next(batches)] for _ in range(5)]  # three epochs
    assert all(len(set(batch)) == 3 for batch in drawn)
    assert sorted(g for batch in drawn for g in batch) == sorted(list(range(5)) * 3)
    again = Shuffled(rows, 3, (0, 1), "here")
    assert [[row.group for row in next(again)] for _ in range(5)] == drawn
    with pytest.raises(ConfigError) as error:
        next(Shuffled(rows, 6, (0,), "stages.sft.rows_per_step"))
    assert str(error.value) == "stages.sft.rows_per_step: 6 asked for, but the data has 5 rows"


# --------------------------------------------------------------------------- what is trained on
def test_rows_without_a_trained_token_are_an_error() -> None:
    policy = tiny(**SIZES)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError) as error:
        tokenized(DEMOS, policy, None, "stages.sft.data")
    assert str(error.value) == (
        "stages.sft.data: no token of its 8 rows is trained on: the chat template marks no assistant text (see `rlx data show`)"
    )
    with pytest.raises(DataError) as error:
        tokenized(QUESTIONS, policy, None, "stages.sft.data")
    assert str(error.value) == "stages.sft.data: its rows are prompts alone; to fit it needs completions, messages or pairs"


def test_long_rows_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    policy = tiny(**SIZES)
    kept = tokenized(DEMOS, policy, 5, "stages.sft.data")  # a question is 3 tokens, an answer its digits and the end
    assert [row.group for row in kept] == [0, 3, 4, 5]
    assert capsys.readouterr().out == (
        "stages.sft.data: 0 rows without a trained token and 4 longer than max_length; 4 of 8 are left out, whole groups\n"
    )
    with pytest.raises(DataError) as error:
        tokenized(DEMOS, policy, 4, "stages.sft.data")
    assert str(error.value) == "stages.sft.data: every row is longer than max_length=4 tokens"


def test_keep_and_refill_train_on_whole_groups_of_new_prompts(tmp_path: Path) -> None:
    """Half of the prompts have no signal; a second draw makes up for them."""

    def half(episodes: list[Episode]) -> list[float]:
        return by_sample(episodes) if episodes[0].group % 2 else [1.0] * len(episodes)

    stage = online(half, keep=[MIXED], refill=3)
    ctx = context(tmp_path, "rl")
    policy = ctx.policy(None)
    kept, seen = draw(stage, {"policy": policy}, Shuffled(ctx.data(TRAIN), 4, ctx.seeds(), "here"), {}, ctx, 1)
    groups = [e.group for e in kept]
    assert sorted(groups) == sorted([1, 3, 5, 7] * 4)  # all that there are, none twice
    assert len(seen) == 32
    numbers = summary(kept, seen)
    assert (numbers["episodes"], numbers["kept"], numbers["groups/no_signal"]) == (32, 0.5, 0.5)
    assert numbers["reward"] == pytest.approx((0.25 + 1.0) / 2)


def test_refill_takes_no_prompt_twice_and_no_more_than_asked(tmp_path: Path) -> None:
    def few(episodes: list[Episode]) -> list[float]:
        return by_sample(episodes) if episodes[0].group < 5 else [0.0] * len(episodes)

    ctx = context(tmp_path, "rl")
    stage = online(few, keep=[MIXED], refill=9, prompts_per_step=5)
    kept, _ = draw(stage, {"policy": ctx.policy(None)}, Shuffled(ctx.data(TRAIN), 5, ctx.seeds(), "here"), {}, ctx, 1)
    assert sorted(e.group for e in kept) == sorted([0, 1, 2, 3, 4] * 4)
    without: set[int] = set()

    def all_but_the_first(episodes: list[Episode]) -> list[float]:
        without.add(episodes[0].group if not without else next(iter(without)))
        return [0.0] * len(episodes) if episodes[0].group in without else by_sample(episodes)

    stage = online(all_but_the_first, keep=[MIXED], refill=1, prompts_per_step=3)  # two groups are kept, then three more
    kept, seen = draw(stage, {"policy": ctx.policy(None)}, Shuffled(ctx.data(TRAIN), 3, ctx.seeds(), "here"), {}, ctx, 1)
    assert (len(kept), len(seen), len({e.group for e in kept})) == (12, 24, 3)
    stage = online(by_sample, keep=[MIXED], refill=9, prompts_per_step=3)
    kept, seen = draw(stage, {"policy": ctx.policy(None)}, Shuffled(ctx.data(TRAIN), 3, ctx.seeds(), "here"), {}, ctx, 1)
    assert len(kept) == len(seen) == 12


def test_each_step_and_each_refill_draws_anew(tmp_path: Path) -> None:
    ctx = context(tmp_path, "rl")
    policy = ctx.policy(None)
    stage = online(lambda episodes: [0.5] * len(episodes), keep=[MIXED], refill=1)

    def said(step: int) -> list[str]:
        prompts = iter([QUESTIONS[:4]] * 2)
        return [e.completion for e in draw(stage, {"policy": policy}, prompts, {}, ctx, step)[1]]

    one, two = said(1), said(2)
    assert one == said(1)
    assert len({*one, *two}) == len(one) + len(two) == 64


def test_step_without_a_kept_group_trains_nothing_and_is_logged(tmp_path: Path) -> None:
    stage = online(lambda episodes: [0.5] * len(episodes), keep=[MIXED], refill=1)
    stage.run(context(tmp_path, "rl"))
    rows = record(tmp_path, "rl")
    assert [(row["step"], row["reward"], row["kept"], row["groups/no_signal"]) for row in rows] == [
        (1, 0.5, 0, 1),
        (2, 0.5, 0, 1),
    ]
    assert "loss" not in rows[0]
    tiny(**SIZES).save(tmp_path / "start")
    assert same(weights(tmp_path / "rl" / "out"), weights(tmp_path / "start"))


def test_episodes_without_a_score_are_left_out_and_counted(tmp_path: Path) -> None:
    def broken(episodes: list[Episode]) -> list[float]:
        return [math.nan, *by_sample(episodes)[:-1]]

    online(broken).run(context(tmp_path, "rl"))
    row = record(tmp_path, "rl")[0]
    assert (row["reward/failures"], row["episodes"], row["kept"]) == (4, 16, 0.75)
    assert row["reward"] == pytest.approx(1 / 3)
    assert math.isfinite(row["loss"])


def test_sampled_and_trained_log_probs_agree(tmp_path: Path) -> None:
    online(share_of_a, epochs=2, minibatches=2, temperature=0.7).run(context(tmp_path, "rl"))
    assert all(row["gap/max"] < 1e-5 for row in record(tmp_path, "rl"))


def test_what_is_paid_by_a_derive_is_part_of_the_return() -> None:
    policy = tiny(**SIZES)
    rows = [policy.tokenize(row) for row in DEMOS[:2]]
    for row, reward in zip(rows, (1.0, 0.0), strict=True):
        row.group, row.reward = 0, reward
    batch = policy.collate(rows)
    price = Component("price", lambda mask: -0.25 * mask, ("mask",), into="reward", add=True)
    credit(batch, [price], [GROUP_MEAN])
    assert batch["reward"].tolist() == [[-0.25, 0.75, 0.0], [-0.25, -0.25, -0.25]]
    assert batch["ret"].tolist() == [0.5, -0.75]
    assert batch["adv"].tolist() == [[0.625, 0.625, 0.0], [-0.625, -0.625, -0.625]]


# --------------------------------------------------------------------------- evaluation and checkpoints
def scripted(*values: float) -> Component[Any]:
    """A metric that says what it is told to."""
    left: Iterator[float] = iter(values)
    return Component("scripted", lambda groups: next(left), ("greedy",))


@pytest.mark.parametrize("kind", ["fit", "online"])
def test_best_checkpoint_and_patience(tmp_path: Path, kind: str) -> None:
    measured = Eval(data=TRAIN, metrics=[scripted(0.1, 0.5, 0.5, 0.3)], every=1, patience=2)
    more = {"steps": 9, "eval": measured, "checkpoint_every": 1}
    stage = fit(**more) if kind == "fit" else online(share_of_a, **more)
    stage.run(context(tmp_path, "s", objective="eval/scripted"))
    assert [row["step"] for row in record(tmp_path, "s")] == [0, 1, 2, 3]
    folder = tmp_path / "s" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best", "step-000001", "step-000002", "step-000003"]
    assert same(weights(folder / "best"), weights(folder / "step-000001"))
    assert not same(weights(folder / "best"), weights(folder / "step-000002"))
    assert same(weights(tmp_path / "s" / "out"), weights(folder / "step-000003"))


def test_best_of_a_metric_of_which_less_is_better(tmp_path: Path) -> None:
    script = iter([0.5, 0.1, 0.3, 0.2])
    length = Component("length", lambda groups: next(script), ("greedy",))
    stage = fit(steps=9, eval=Eval(data=TRAIN, metrics=[length], every=1, patience=2), checkpoint_every=1)
    stage.run(context(tmp_path, "s", objective="eval/length"))
    folder = tmp_path / "s" / "checkpoints"
    assert [row["step"] for row in record(tmp_path, "s")] == [0, 1, 2, 3]
    assert same(weights(folder / "best"), weights(folder / "step-000001"))


def test_the_start_may_be_the_best(tmp_path: Path) -> None:
    measured = Eval(data=TRAIN, metrics=[scripted(0.9, 0.5)])
    fit(eval=measured).run(context(tmp_path, "s", objective="eval/scripted"))
    tiny(**SIZES).save(tmp_path / "start")
    assert same(weights(tmp_path / "s" / "checkpoints" / "best"), weights(tmp_path / "start"))


@pytest.mark.parametrize("kind", ["fit", "online"])
def test_every_evaluation_is_logged(tmp_path: Path, kind: str) -> None:
    more = {"steps": 5, "log_every": 4, "eval": Eval(data=TRAIN, metrics=[ACCURACY], every=3)}
    stage = fit(**more) if kind == "fit" else online(share_of_a, **more)
    stage.run(context(tmp_path, "s"))
    assert [(row["step"], "eval/accuracy" in row) for row in record(tmp_path, "s")] == [
        (0, True),
        (3, True),
        (4, False),
        (5, True),
    ]


def test_fit_counts_what_it_has_spent(tmp_path: Path) -> None:
    fit(steps=5, rows_per_step=8, log_every=4, eval=Eval(data=TRAIN, metrics=[ACCURACY])).run(context(tmp_path, "s"))
    # the answers of the 8 rows have 13 digits and 8 ends
    assert spent(record(tmp_path, "s")) == [(0, 0, 0, 0), (4, 4, 0, 84), (5, 5, 0, 105)]


def test_online_counts_what_it_has_spent(tmp_path: Path) -> None:
    """A step that keeps nothing samples all the same; each epoch trains on its tokens again."""

    def first_step_only(episodes: list[Episode]) -> list[float]:
        calls.append(episodes)
        return by_sample(episodes) if len(calls) <= 4 else [0.5] * len(episodes)

    calls: list[list[Episode]] = []
    stage = online(first_step_only, steps=3, keep=[MIXED], refill=1, epochs=3, minibatches=2, log_every=3)
    stage.run(context(tmp_path, "s"))
    tokens = 3 * sum(e.num_tokens for group in calls[:4] for e in group)
    assert spent(record(tmp_path, "s")) == [(3, 6, 16 + 32 + 32, tokens)]


def spent(rows: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [tuple(row[key] for key in ("step", "spent/updates", "spent/rollouts", "spent/tokens")) for row in rows]


def test_references_name_weights_of_earlier_stages(tmp_path: Path) -> None:
    measured = Eval(data=TRAIN, metrics=[scripted(0.1, 0.5, 0.3)], every=1)
    fit(eval=measured, checkpoint_every=2).run(context(tmp_path, "sft", objective="eval/scripted"))
    ctx = context(tmp_path, "rl")

    def loaded(ref: ModelRef) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in ctx.policy(ref).module.parameters()])

    last, best, second = (loaded(ModelRef("sft", pick)) for pick in ("last", "best", "step=2"))
    assert torch.equal(last, second)
    assert not torch.equal(last, best)
    with pytest.raises(ConfigError) as error:
        ctx.policy(ModelRef("sft", "step=1"))
    folder = tmp_path / "sft" / "checkpoints" / "step-000001"
    assert str(error.value) == f"stages.rl: @sft:step=1 names {folder}, which stage 'sft' did not write"


def test_evaluate_measures_each_policy_on_the_same_tasks(tmp_path: Path) -> None:
    fit(steps=60, rows_per_step=8).run(context(tmp_path, "sft"))
    tiny(**SIZES).save(tmp_path / "start")
    refs = {"start": ModelRef(path=str(tmp_path / "start")), "sft": ModelRef("sft")}
    pass_at = Component("pass@4", partial(metrics.pass_at, k=4), ("sampled",), settings={"k": 4})
    found = Evaluate(policies=refs, data=TRAIN, metrics=[ACCURACY, pass_at]).run(context(tmp_path, "test"))
    assert found == {"start/accuracy": 0.0, "start/pass@4": 0.0, "sft/accuracy": 1.0, "sft/pass@4": 1.0}
    rows = record(tmp_path, "test")
    assert [(row["policy"], row["accuracy"], row["n"]) for row in rows] == [("start", 0.0, 8), ("sft", 1.0, 8)]
    assert rows[1]["accuracy/low"] == pytest.approx(0.6756, abs=1e-4)  # Wilson: 8 / (8 + 1.96^2)


def test_tasks_that_cannot_be_scored_do_not_count(tmp_path: Path) -> None:
    tiny(**SIZES).save(tmp_path / "start")

    def measured(name: str, unscored: set[int]) -> dict[str, Any]:
        verify = Component("half", lambda es: [math.nan if e.group in unscored else 1.0 for e in es])
        refs = {"start": ModelRef(path=str(tmp_path / "start"))}
        stage = Evaluate(policies=refs, data=TRAIN, metrics=[ACCURACY], verifier=verify)
        stage.run(context(tmp_path, name))
        return record(tmp_path, name)[0]

    half = measured("half", {0, 1, 2, 3})
    assert (half["accuracy"], half["n"], half["accuracy/high"], half["failures"]) == (1.0, 4, 1.0, 4.0)
    assert half["accuracy/low"] == pytest.approx(0.5101, abs=1e-4)  # Wilson: 4 / (4 + 1.96^2)
    none = measured("none", set(range(8)))
    assert (none["accuracy"], none["n"], none["accuracy/low"], none["accuracy/high"]) == (None, 0, 0.0, 1.0)


def test_sampled_evaluation_cuts_the_tail(tmp_path: Path) -> None:
    """From the likeliest token alone, sampling is greedy decoding."""
    pass_at = Component("pass@4", partial(metrics.pass_at, k=4), ("sampled",), settings={"k": 4})

    def said(**settings: Any) -> list[set[str]]:
        ctx = context(tmp_path, "s")
        groups = evaluate(ctx.policy(None), Eval(data=TRAIN, **settings), ctx)[1]
        return [{e.completion for e in group} for group in groups]

    greedy = said(metrics=[ACCURACY])
    assert said(metrics=[pass_at], top_k=1) == said(metrics=[pass_at], top_p=1e-6) == greedy
    assert said(metrics=[pass_at], min_p=0.9999) == greedy
    assert said(metrics=[pass_at]) != greedy


def test_stop_strings_of_a_stage_end_its_turns(tmp_path: Path) -> None:
    """The ids up to the stop string are those without it, its last id is the turn's, and the mask holds them and no more."""
    ctx = context(tmp_path, "s")
    policy = ctx.policy(None)

    def played(**settings: Any) -> list[Episode]:
        return draw(online(by_sample, **settings), {"policy": policy}, iter([ctx.data(TRAIN)]), {}, ctx, 1)[1]

    free = played()
    stop = policy.tokenizer.decode(next(e.turns[0].did for e in free if e.num_tokens == 5)[1:3])  # two bytes, two ids
    stopped = played(stop=[stop])
    assert online(by_sample, stop=["x", ""]).problems() == ["stop.1: an empty text would end every answer at its first token"]
    ended = 0
    for was, now in zip(free, stopped, strict=True):
        said = policy.tokenizer.decode(was.turns[0].did)
        length = next((n for n in range(6) if stop in policy.tokenizer.decode(was.turns[0].did[:n])), was.num_tokens)
        assert now.turns[0].did.tolist() == was.turns[0].did[:length].tolist()
        assert now.turns[0].logp == pytest.approx(was.turns[0].logp[:length], abs=1e-5)
        if stop in said:
            ended += 1
            assert now.status is Status.FINISHED
    assert ended
    assert policy.collate(stopped)["mask"].sum(1).tolist() == [e.num_tokens for e in stopped]


@pytest.mark.parametrize("stage", ["collect", "select", "evaluate"])
def test_stages_that_sample_say_how(tmp_path: Path, stage: str) -> None:
    keys = {"temperature": 0.7, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "stop": ["\n", "END"], "max_new_tokens": 4}
    made = {
        "collect": lambda: Collect(data=TRAIN, reward=[], rows="demonstrations", **keys),
        "select": lambda: Select(data=TRAIN, into={"x": []}, **keys),
        "evaluate": lambda: Evaluate(policies={}, data=TRAIN, metrics=[ACCURACY], **keys),
    }[stage]()
    assert made.problems() == []
    assert drawing(made, context(tmp_path, "s")) == Sampling(4, 0.7, 3, 0.8, 0.1, ("\n", "END"))


def test_mistakes_in_what_is_measured() -> None:
    pass_at = Component("pass@8", partial(metrics.pass_at, k=8), ("sampled",), settings={"k": 8})
    wrong = {
        "data": TRAIN,
        "metrics": [ACCURACY, pass_at],
        "samples": 4,
        "top_k": -1,
        "top_p": 0.0,
        "min_p": 1.0,
        "stop": [".", ""],
    }
    lines = [
        "top_k: expected 0 (all tokens) or more, got -1",
        "top_p: expected more than 0 and at most 1, got 0.0",
        "min_p: expected 0 to below 1, a share of the likeliest token's probability, got 1.0",
        "stop.1: an empty text would end every answer at its first token",
        "samples: metric 'pass@8' needs at least 8 samples of each task, got 4",
    ]
    assert Evaluate(policies={}, **wrong).problems() == lines
    assert fit(eval=Eval(**wrong)).problems() == [f"eval.{line}" for line in lines]
    assert online(by_sample, eval=Eval(**wrong)).problems() == [f"eval.{line}" for line in lines]
    assert Evaluate(policies={}, data=TRAIN, metrics=[ACCURACY, pass_at], samples=8).problems() == []


@pytest.mark.parametrize("key", ["every", "patience"])
def test_evaluate_takes_no_key_of_evaluation_during_training(key: str) -> None:
    binder = Binder()
    node = {"policies": {"rl": "@rl"}, "data": "@task/test", "metrics": ["accuracy"], key: 2}
    assert binder.record(Evaluate, "stage kind 'evaluate'", node, "stages.test") is None
    known = "data, metrics, samples, temperature, top_k, top_p, min_p, stop, max_new_tokens, limit, verifier, sampler, policies"
    assert binder.errors == [f"stages.test.{key}: stage kind 'evaluate' takes no '{key}' (known: {known})"]


def test_evaluation_depends_on_the_policy_and_the_seed_alone(tmp_path: Path) -> None:
    pass_at = Component("pass@4", partial(metrics.pass_at, k=4), ("sampled",), settings={"k": 4})
    alone = Eval(data=TRAIN, metrics=[ACCURACY, pass_at], limit=3)
    said = []
    for name in ("one", "two"):
        ctx = context(tmp_path, name)
        said.append([e.completion for group in evaluate(ctx.policy(None), alone, ctx)[1] for e in group])
    assert said[0] == said[1]
    assert len(said[0]) == 3


@pytest.mark.parametrize("kind", ["fit", "online"])
def test_lora_from_stage_to_stage(tmp_path: Path, kind: str) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    stage = fit(steps=3, lr=0.05) if kind == "fit" else online(share_of_a, lr=0.05)
    stage.run(context(tmp_path, "s", lora=lora))
    tiny(**SIZES).save(tmp_path / "start")
    before, after = weights(tmp_path / "start"), weights(tmp_path / "s" / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj.weight" in name or "up_proj.weight" in name}
    ctx = context(tmp_path, "next", lora=lora)
    ids = torch.tensor([[3, 70, 4]])
    plain_model = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "out")
    with torch.no_grad():
        taken_up = ctx.policy(ModelRef("s")).module(input_ids=ids).logits
        torch.testing.assert_close(taken_up, plain_model(input_ids=ids).logits, atol=1e-5, rtol=0)
