"""Several models, updates and buffers in one `online` stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import episode
from test_stages import DATA, DEMOS, GROUP_MEAN, NLL, PG, by_sample, context, fit, online, record

from rlx.build import Binder
from rlx.data.files import jsonl
from rlx.data.formats import turn
from rlx.data.rows import row_of
from rlx.derive import rollout_correction
from rlx.models.load import tiny
from rlx.plan import plan
from rlx.rollout.native import generate
from rlx.rollout.samplers import plain, resampled
from rlx.stages.buffers import Buffer, BufferSpec
from rlx.stages.draw import draw
from rlx.stages.models import ModelSpec, Refresh, target_of, weights
from rlx.stages.online import Online
from rlx.stages.prepare import fill
from rlx.stages.updates import UpdateSpec
from rlx.tensors import inside
from rlx.types import (
    Component,
    ConfigError,
    DataError,
    DataRef,
    Episode,
    Failed,
    Message,
    ModelRef,
    Play,
    Policy,
    Sampling,
    Status,
    Task,
)

CRITIC = ModelSpec(heads={"value": "token"})


def squared(value: Any, ret: Any, mask: Any) -> Any:
    return inside((value - ret[:, None]) ** 2, mask)


def baseline(ret: Any, old_value: Any, mask: Any) -> Any:
    return inside(ret[:, None] - old_value, mask)


VALUE = Component("squared", squared, ("value", "ret", "mask"))
BASELINE = Component("baseline", baseline, ("ret", "old_value", "mask"))


def two(**settings: Any) -> Online:
    updates = {
        "critic": UpdateSpec(train="critic", loss=[VALUE], lr=1e-2, steps=2),
        "actor": UpdateSpec(loss=[PG], start=2, advantage=[BASELINE]),
    }
    return online(by_sample, loss=[], models={"critic": CRITIC}, updates=updates, steps=3, **settings)


# --------------------------------------------------------------------------- updates
def test_each_update_trains_its_model_at_its_time(tmp_path: Path) -> None:
    stage = two()
    assert stage.problems() == []
    ctx = context(tmp_path, "rl")
    start = ctx.models(stage.specs())
    before = {name: [x.clone() for x in weights(m)] for name, m in start.items()}
    stage.run(ctx)
    rows = record(tmp_path, "rl")
    assert ["critic/loss" in row for row in rows] == [True, True, True]
    assert ["actor/loss" in row for row in rows] == [False, True, True]
    assert rows[-1]["spent/updates"] == 3 * 2 + 2
    out = {"policy": ModelRef(stage="rl"), "critic": ModelRef(stage="rl", name="critic")}
    after = context(tmp_path, "next").models({name: ModelSpec(from_=ref) for name, ref in out.items()})
    for name in out:
        assert any(not torch.equal(a, b) for a, b in zip(before[name], weights(after[name]), strict=True))
    assert after["critic"].offers == {"logp", "entropy", "value"}


def test_an_update_whose_mask_is_empty_takes_no_step_and_the_others_do(tmp_path: Path) -> None:
    """The actor's tokens are all taken out of its mask, which only the critic's mask has."""

    def nothing(mask: Any) -> Any:
        return torch.zeros_like(mask)

    masks = [Component("nothing", nothing, ("mask",), into="no_mask")]
    stage = two(derive=masks)
    stage.updates["actor"].loss = [replace(PG, reads=("logp", "adv", "no_mask"))]
    stage.run(context(tmp_path, "rl"))
    rows = record(tmp_path, "rl")
    assert ["actor/loss" in row for row in rows] == [False, False, False]
    assert rows[-1]["spent/updates"] == 3 * 2


def test_a_step_in_which_no_update_has_a_token_is_refused(tmp_path: Path) -> None:
    def nothing(mask: Any) -> Any:
        return torch.zeros_like(mask)

    masks = [Component("nothing", nothing, ("mask",), into="no_mask")]
    stage = online(by_sample, derive=masks, loss=[replace(PG, reads=("logp", "adv", "no_mask"))])
    with pytest.raises(Failed, match="no token of this step is trained on: every mask is empty"):
        stage.run(context(tmp_path, "rl"))


def test_an_update_of_a_frozen_rate_changes_nothing(tmp_path: Path) -> None:
    stage = two()
    stage.updates["actor"].lr = 0.0
    ctx = context(tmp_path, "rl")
    before = weights(ctx.models(stage.specs())["policy"])
    stage.run(ctx)
    after = weights(context(tmp_path, "next").policy(ModelRef(stage="rl")))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_old_fields_are_of_the_time_before_the_updates(tmp_path: Path) -> None:
    """With a critic that jumps, the actor's advantage sees its values of the step's beginning, wherever the actor stands."""
    seen: list[Any] = []

    def spy(ret: Any, old_value: Any, mask: Any) -> Any:
        seen.append(old_value.clone())
        return baseline(ret, old_value, mask)

    for order in (("actor", "critic"), ("critic", "actor")):
        stage = two()
        stage.steps = 1
        stage.updates["critic"].lr = 1.0
        stage.updates["actor"] = UpdateSpec(loss=[PG], advantage=[Component("spy", spy, BASELINE.reads)])
        stage.updates = {name: stage.updates[name] for name in order}
        stage.run(context(tmp_path / order[0], "rl"))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("step", "due"), [(1, False), (2, False), (3, True), (4, False), (5, True)])
def test_start_and_every(step: int, due: bool) -> None:
    spec = UpdateSpec(loss=[NLL], start=3, every=2, when=4)
    assert spec.due(step, 4) is due
    assert not spec.due(step, 3)
    assert UpdateSpec(loss=[NLL], start=3, every=2, steps=5, minibatches=2).total(6) == 2 * 5 * 2


def test_what_is_wrong_with_updates_is_said_at_once() -> None:
    stage = two()
    stage.loss = [NLL]
    stage.updates["critic"].train = "critc"
    stage.updates["actor"].on = "replay"
    stage.models["target"] = ModelSpec(ema="critik", heads={"x": "nowhere"})
    assert stage.problems() == [
        "models.target.heads.x: no head reads 'nowhere' (known: token, last, before_turn, after_turn)",
        "models.target.ema: the stage has no model 'critik'; did you mean 'critic'? (known: policy, critic, target)",
        "loss: with `updates`, each update has its own; leave it out",
        "updates.critic.train: the stage has no model 'critc'; did you mean 'critic'? (known: policy, critic, target)",
        "models: loss 'squared' reads value, which no model of the stage computes; give one heads: {value: token}",
        "updates.actor.on: no buffer is called 'replay' (known: kept)",
        "models: advantage 'baseline' reads old_value, which no model of the stage computes; give one heads: {value: token}",
    ]


def test_a_model_is_a_reference_or_a_mapping() -> None:
    binder = Binder()
    node = {"critic": {"from": "@sft", "heads": {"value": "token"}}, "old": "@sft:20%", "x": "@rl/critic:best"}
    made = binder.value(dict[str, ModelRef | ModelSpec], node, "models")
    assert binder.errors == []
    assert made["critic"] == ModelSpec(from_=ModelRef(stage="sft"), heads={"value": "token"})
    assert made["old"] == ModelRef(stage="sft", pick="20%")
    assert str(made["x"]) == "@rl/critic:best"
    binder.value(dict[str, ModelRef | ModelSpec], {"critic": {"form": "@sft"}}, "models")
    assert binder.errors[0].startswith("models.critic.form: `critic` takes no 'form'; did you mean 'from'?")


# --------------------------------------------------------------------------- models
def test_a_target_follows_after_each_update(tmp_path: Path) -> None:
    stage = two()
    stage.models["target"] = ModelSpec(ema="critic", decay=0.75)
    del stage.updates["actor"]
    stage.updates["critic"].steps, stage.steps = 1, 1
    ctx = context(tmp_path, "rl")
    start = [x.clone() for x in weights(ctx.models(stage.specs())["critic"])]
    kept: dict[str, Any] = {}
    load = ctx.models
    ctx.models = lambda specs, trained=(): kept.setdefault("m", load(specs, trained))  # type: ignore[method-assign]
    stage.run(ctx)
    for old, now, target in zip(start, weights(kept["m"]["critic"]), weights(kept["m"]["target"]), strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * now)
        assert not target.requires_grad


def test_a_copy_shares_nothing() -> None:
    made = tiny(layers=1, hidden=8, heads=1, kv_heads=1, ffn=8).with_heads({"value": "token"}, 0)
    copied = target_of(made)
    with torch.no_grad():
        made.parameters()[0].add_(1.0)
    assert not torch.equal(weights(made)[0], weights(copied)[0])
    assert copied.parameters() == []


def test_checkpoints_at_shares_of_the_steps(tmp_path: Path) -> None:
    online(by_sample, steps=5, checkpoints=["20%", "60%"]).run(context(tmp_path, "rl"))
    assert sorted(p.name for p in (tmp_path / "rl" / "checkpoints").iterdir()) == ["at-20-percent", "at-60-percent"]
    assert context(tmp_path, "next").policy(ModelRef(stage="rl", pick="20%")).offers == {"logp", "entropy"}
    with pytest.raises(ConfigError, match="@rl:40% names"):
        context(tmp_path, "next").policy(ModelRef(stage="rl", pick="40%"))


def test_data_of_a_stage_that_writes_no_rows_is_refused() -> None:
    fit = {"kind": "fit", "data": "@task/demos", "loss": ["nll"], "steps": 1, "lr": 0.1}
    config = {"task": {"name": "arithmetic"}, "stages": {"a": fit, "b": {**fit, "data": "@a"}}}
    with pytest.raises(ConfigError, match="stage 'a' writes no rows"):
        plan(config)


# --------------------------------------------------------------------------- buffers
def test_a_buffer_keeps_the_last_and_draws_without_repeats() -> None:
    buffer = Buffer(BufferSpec(capacity=5))
    for group in range(8):
        buffer.add([episode(([1], [2, 3]), group=group, reward=1.0)])
    assert [e.group for e in buffer.episodes] == [3, 4, 5, 6, 7]
    drawn = [e.group for e in buffer.draw(4, (0, 1))]
    assert len(set(drawn)) == 4
    assert drawn == [e.group for e in buffer.draw(4, (0, 1))] != [e.group for e in buffer.draw(4, (0, 2))]
    assert len(buffer.draw(9, (0,))) == 5
    newest = Buffer(BufferSpec(order="newest"))
    newest.add([episode(([1], [2]), group=g) for g in range(4)])
    assert [e.group for e in newest.draw(2, (0,))] == [2, 3]


def test_a_buffer_takes_only_what_could_be_scored_and_passes_keep() -> None:
    first = Component("first", lambda episodes: episodes[:1])
    buffer = Buffer(BufferSpec(keep=[first], as_="demonstration"))
    buffer.add([episode(([1], [2]), reward=float("nan")), episode(([1], [])), episode(([1], [3]), reward=2.0, logp=-0.5)])
    (only,) = buffer.episodes
    assert (only.label, only.turns[0].logp.tolist(), only.turns[0].did.tolist()) == (1.0, [], [3])


def test_an_update_on_a_buffer(tmp_path: Path) -> None:
    stage = two()
    stage.buffers = {"replay": BufferSpec(capacity=40)}
    stage.updates["critic"].on, stage.updates["critic"].rows, stage.updates["critic"].when = "replay", 3, 17
    stage.run(context(tmp_path, "rl"))
    rows = record(tmp_path, "rl")
    assert [row["buffer/replay"] for row in rows] == [16, 32, 40]
    assert ["critic/loss" in row for row in rows] == [False, True, True]


def test_resampling_keeps_the_states_and_trains_the_last_turn_alone() -> None:
    made = tiny(layers=1, hidden=16, heads=1, kv_heads=1, ffn=16)
    made.engine = generate
    stored = episode(([10, 11], [12, 1]), ([13], [14, 15, 1]), group=7, reward=1.0)
    fresh = resampled(made, [(stored, 0), (stored, 1)], Sampling(4), (0,))
    assert [len(e.turns) for e in fresh] == [1, 2]
    assert [t.tolist() for t in (fresh[1].turns[0].seen, fresh[1].turns[0].did, fresh[1].turns[1].seen)] == [
        [10, 11],
        [12, 1],
        [13],
    ]
    batch = made.collate([stored, *fresh])
    assert batch["fresh"].tolist() == [False, True, True]
    assert batch["group"].tolist() == [7, 7, 7]
    assert batch["turn_mask"].tolist() == [[True, True], [True, False], [False, True]]
    assert not batch["mask"][2, :2].any()
    logp = made.forward(batch, {"logp"})["logp"]
    torch.testing.assert_close(
        torch.where(batch["fresh"][:, None] & batch["mask"], logp, 0.0),
        torch.where(batch["fresh"][:, None] & batch["mask"], batch["rollout_logp"], 0.0),
        atol=1e-5,
        rtol=0,
    )


def test_a_fresh_turn_that_the_limit_cuts_does_not_end_its_episode() -> None:
    made = tiny(layers=1, hidden=16, heads=1, kv_heads=1, ffn=16)
    made.engine = generate
    stored = [episode(([10 + g], [12, 1]), ([13], [14, 1]), group=g) for g in range(20)]
    made.end_ids = [1, *range(6, 200)]
    fresh = resampled(made, [(e, k) for e in stored for k in range(2)], Sampling(2), (0,))
    cut = [int(e.turns[-1].did[-1]) not in made.end_ids for e in fresh]
    assert 0 < sum(cut) < len(cut)
    assert [e.status for e in fresh] == [Status.TRUNCATED if c else Status.FINISHED for c in cut]
    done = made.collate(fresh)["turn_done"]
    assert [float(row[len(e.turns) - 1]) for row, e in zip(done, fresh, strict=True)] == [float(not c) for c in cut]


def test_a_step_of_a_resampling_buffer() -> None:
    made = tiny(layers=1, hidden=16, heads=1, kv_heads=1, ffn=16)
    made.engine = generate
    buffer = Buffer(BufferSpec(resample="policy", states=3))
    buffer.add([episode(([10], [11, 1]), ([12], [13, 1]), group=g, reward=1.0) for g in range(6)])
    buffer.open({"policy": made}, Sampling(3), (0,))
    drawn: list[Episode] = buffer.draw(2, (0, 5))
    assert [bool(e.info.get("fresh")) for e in drawn] == [False, True] * 2
    for stored, fresh in zip(drawn[::2], drawn[1::2], strict=True):
        assert stored.group == fresh.group
        k = len(fresh.turns) - 1
        assert fresh.turns[k].seen.tolist() == stored.turns[k].seen.tolist()
    assert {e.group for e in buffer.draw(9, (0, 6))} >= {e.group for e in drawn}
    assert len(buffer.draw(9, (0, 6))) == 2 * 3


def test_every_state_of_a_buffer_is_equally_likely_to_be_drawn_at() -> None:
    made = tiny(layers=1, hidden=16, heads=1, kv_heads=1, ffn=16)
    made.engine = generate
    buffer = Buffer(BufferSpec(resample="policy", states=4))
    buffer.add([episode(([10], [11, 1]), ([12], [13, 1]), ([12], [13, 1]), group=0), episode(([10], [11, 1]), group=1)])
    buffer.open({"policy": made}, Sampling(3), (0,))
    fresh = buffer.draw(9, (0, 5))[1::2]
    assert sorted((e.group, len(e.turns)) for e in fresh) == [(0, 1), (0, 2), (0, 3), (1, 1)]


def test_group_mean_is_read_from_the_stage(tmp_path: Path) -> None:
    stage = online(by_sample, loss=[], updates={"one": UpdateSpec(loss=[PG])}, advantage=[GROUP_MEAN])
    stage.run(context(tmp_path / "a", "rl"))
    online(by_sample).run(context(tmp_path / "b", "rl"))
    one, plain = record(tmp_path / "a", "rl"), record(tmp_path / "b", "rl")
    assert [row["one/loss"] for row in one] == [row["loss"] for row in plain]


def test_an_old_value_has_one_owner() -> None:
    heads = [{"value": "token"}, {"value": "token"}]
    models = {name: ModelSpec(heads=h) for name, h in zip(("one", "two"), heads, strict=True)}
    updates = {
        **{name: UpdateSpec(train=name, loss=[VALUE]) for name in models},
        "actor": UpdateSpec(loss=[PG], advantage=[BASELINE]),
    }
    stage = online(by_sample, loss=[], models=models, updates=updates)
    assert stage.problems() == [
        "updates: old_value could be of one or two, which are all trained and compute value; give their heads different names "
        "(heads: {value_2: ...}) and rename what is read (read: {value: value_2, old_value: old_value_2})"
    ]
    models["two"].heads = {"value_2": "token"}
    updates["two"].loss = [replace(VALUE, reads=("value_2", "ret", "mask"))]
    assert stage.problems() == []
    updates["actor"].advantage = [GROUP_MEAN]
    models["two"].heads, updates["two"].loss = {"value": "token"}, [VALUE]
    assert stage.problems() == []  # nobody reads an old value


# --------------------------------------------------------------------------- models that components use
def test_a_frozen_model_is_renewed_in_its_turn(tmp_path: Path) -> None:
    stage = online(by_sample, steps=3, lr=0.1, models={"old": ModelSpec(refresh=Refresh(every=2))})
    ctx = context(tmp_path, "rl")
    kept: dict[str, Any] = {}
    load = ctx.models
    ctx.models = lambda specs, trained=(): kept.setdefault("m", load(specs, trained))  # type: ignore[method-assign]
    seen: list[bool] = []

    def same(episodes: list[Episode]) -> list[float]:
        a, b = kept["m"]["policy"], kept["m"]["old"]
        seen.append(all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True)))
        return by_sample(episodes)

    stage.reward = [Component("same", same)]
    stage.run(ctx)
    assert [seen[0], seen[4], seen[8]] == [True, False, True]  # four groups a step; renewed after the second


def by_model(episodes: list[Episode], *, judge: Policy) -> list[float]:
    """The judge's log-prob of each completion."""
    batch = judge.collate(episodes)
    return (judge.forward(batch, {"logp"})["logp"] * batch["mask"]).sum(1).tolist()


def test_a_reward_gets_the_model_that_it_names(tmp_path: Path) -> None:
    binder = Binder(provided={("reward", "by_model"): by_model})
    reward = binder.component("reward", {"name": "by_model", "judge": "rm"}, "reward")
    assert binder.errors == []
    assert reward.settings == {"judge": "rm"}
    stage = online(by_sample, models={"rm": ModelSpec()}, steps=1)
    stage.reward = [reward]
    assert stage.problems() == []
    stage.run(context(tmp_path, "rl"))
    assert record(tmp_path, "rl")[0]["reward"] < -1.0
    stage.models = {"mr": ModelSpec()}
    assert stage.problems() == ["reward: 'by_model' has judge='rm'; the stage has no such model (known: policy, mr)"]


def test_a_sampler_may_score_and_see_the_pools(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []

    def best_of_two(play: Play, rows: list[Episode], n: int) -> list[Episode]:
        played = plain(play, rows, 2 * n)
        play.score(played)
        told.append((len(play.pools["seen"]), sum(e.reward for e in played)))
        return sorted(played, key=lambda e: (e.group, -e.reward))[: len(rows) * n]

    stage = online(by_sample, steps=2, sampler=Component("best_of_two", best_of_two), buffers={"seen": BufferSpec()})
    stage.run(context(tmp_path, "rl"))
    assert [size for size, _ in told] == [0, 16]
    assert told[0][1] == 4.0


def test_a_column_of_the_data_is_a_field(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def weighted(logp: Any, margin: Any, mask: Any) -> Any:
        seen.append(margin.tolist())
        return -inside(logp, mask) * margin[:, None]

    rows = [replace(row, task=replace(row.task, meta={"margin": row.group / 2})) for row in DEMOS]
    ctx = context(tmp_path, "sft")
    loss = Component("weighted", weighted, ("logp", "margin", "mask"))
    data = DataRef(source=Component("rows", lambda: rows))
    stage = fit(data=data, loss=[loss], columns=["margin"], steps=1, rows_per_step=8)
    assert stage.problems() == []
    assert fit(loss=stage.loss).problems()[0].startswith("loss: 'weighted' reads 'margin', which this stage does not make")
    stage.run(ctx)
    assert sorted(seen[0]) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


@pytest.mark.parametrize("name", ["mask", "score", "index"])
def test_a_column_is_not_called_like_a_field(name: str) -> None:
    line = f"columns.1: {name!r} is already a field of every batch; rename the column of the data"
    assert fit(columns=["level", name]).problems() == online(by_sample, columns=["level", name]).problems() == [line]


def test_a_stream_is_not_called_like_a_field() -> None:
    def mine(play: Play, rows: list[Episode], n: int) -> list[Episode]:
        return plain(play, rows, n)

    mine.streams = ("who", "turn")  # type: ignore[attr-defined]
    line = "sampler: its stream 'turn' is already a field of every batch; the sampler has to rename it"
    assert online(by_sample, sampler=Component("mine", mine)).problems() == [line]


@pytest.mark.parametrize(("level", "said"), [(None, "no column 'levle'; did you mean 'level'? (known: level)"), ("x", "'x'")])
@pytest.mark.parametrize("kind", ["fit", "online"])
def test_a_column_that_is_not_there(tmp_path: Path, kind: str, level: Any, said: str) -> None:
    meta = {"level": 1.0} if level is None else {"level": 1.0, "levle": level}
    rows = [replace(row, task=replace(row.task, meta=meta if row.group == 2 else {"level": 0.0, "levle": 2})) for row in DEMOS]
    ctx = context(tmp_path, "s")
    ctx.rows["/train"] = rows
    more: dict[str, Any] = {"data": DataRef(split="train"), "columns": ["levle"]}
    with pytest.raises(DataError) as caught:
        (fit(**more) if kind == "fit" else online(by_sample, **more)).run(ctx)
    assert str(caught.value).startswith("stages.s.columns: @task/train: row 2")
    assert str(caught.value).endswith(said)


def test_a_reference_to_data_is_said_as_a_recipe_says_it() -> None:
    refs = [DataRef(split="dev"), DataRef(stage="pairs"), DataRef(stage="sort", split="easy")]
    assert [str(x) for x in (*refs, DataRef(source=Component("gsm8k", list)))] == [
        "@task/dev",
        "@pairs",
        "@sort/easy",
        "gsm8k",
    ]


# --------------------------------------------------------------------------- pools
def test_updates_train_on_the_rows_that_a_buffer_starts_with(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = []

    def likely(logp: Any, label: Any, mask: Any) -> Any:
        fields.append({"label": label.tolist(), "tokens": mask.sum(1).tolist(), "logp": logp.detach()})
        return -inside(logp, mask)

    def stage(*reads: str, **settings: Any) -> Online:
        loss = Component("likely", likely, reads or ("logp", "label", "mask"))
        update = UpdateSpec(loss=[loss], on="demos", rows=8)
        return online(by_sample, loss=[], updates={"bc": update}, buffers={"demos": BufferSpec(**settings)}, steps=1)

    never = [Component("never", lambda episodes: [])]
    made = stage(start=DATA, keep=never)
    assert made.problems() == []
    made.run(context(tmp_path, "rl"))
    (batch,) = fields
    assert batch["label"] == [1.0] * 8
    assert sorted(batch["tokens"]) == sorted(len(e.completion) + 1 for e in DEMOS)
    unpaid = (
        "updates.bc.on: the update reads old_logp, ret, which buffer 'demos' does not have: the rows of its `start` were not"
    )
    assert stage("logp", "old_logp", "ret", start=DATA).problems() == [unpaid + " played"]
    kept = "updates.bc.on: the update reads old_logp, which buffer 'demos' does not have: it keeps demonstrations"
    assert stage("logp", "old_logp", "ret", as_="demonstration").problems() == [kept]
    assert stage("logp", "old_logp", "ret").problems() == []


def test_an_update_on_demonstrations_may_leave_the_stage_s_credit_unread() -> None:
    weigh = Component("whiten", lambda reward, mask: reward, ("reward", "mask"), into="w")
    bc = UpdateSpec(loss=[NLL], on="demos")
    stage = online(by_sample, loss=[], derive=[weigh], updates={"bc": bc}, buffers={"demos": BufferSpec(start=DATA)})
    assert stage.problems() == []  # its advantage and its derive are the stage's, and the loss reads neither
    bc.loss = [Component("weighted", lambda logp, w, mask: -logp * w, ("logp", "w", "mask"))]
    assert "the update reads reward," in stage.problems()[0]
    bc.loss = [PG]
    assert "the update reads ret," in stage.problems()[0]


def test_buffers_that_draw_again_draw_apart(tmp_path: Path) -> None:
    drawn: dict[str, list[Any]] = {"a": [], "b": []}

    def noted(name: str) -> Component[Any]:
        def loss(logp: Any, rollout_logp: Any, mask: Any) -> Any:
            drawn[name].append(rollout_logp.tolist())
            return inside(0 * logp, mask)

        return Component("noted", loss, ("logp", "rollout_logp", "mask"))

    updates = {name: UpdateSpec(loss=[noted(name)], on=name, advantage=[]) for name in drawn}
    buffers = {name: BufferSpec(resample="policy", states=4) for name in drawn}
    online(by_sample, loss=[], lr=0.0, steps=1, updates=updates, buffers=buffers).run(context(tmp_path, "rl"))
    assert drawn["a"] != drawn["b"]


def test_a_saved_buffer_is_in_every_checkpoint_and_starts_another_run(tmp_path: Path) -> None:
    pool, own = BufferSpec(capacity=64, save=True), BufferSpec(capacity=64)
    first = context(tmp_path / "first", "rl")
    online(by_sample, buffers={"pool": pool, "own": own}, checkpoint_every=1).run(first)
    written = [first.folder / at / "buffers" for at in ("checkpoints/step-000001", "checkpoints/step-000002", "out")]
    assert [[x.name for x in at.iterdir()] for at in written] == [["pool.jsonl"]] * 3
    rows = [jsonl(path=str(at / "pool.jsonl")) for at in written]
    assert [len(x) for x in rows] == [16, 32, 32]
    assert [(e.task.prompt, e.completion) for e in rows[1]] == [(e.task.prompt, e.completion) for e in rows[2]]

    again = context(tmp_path / "again", "rl")
    seen: list[list[str]] = []

    def sampler(play: Play, rows: list[Episode], n: int) -> list[Episode]:
        seen.append([e.completion for e in play.pools["pool"]])
        return plain(play, rows, n)

    data = DataRef(source=Component("jsonl", lambda: rows[2]))
    online(by_sample, buffers={"pool": BufferSpec(start=data, save=True)}, sampler=Component("mine", sampler)).run(again)
    assert seen[0] == [e.completion for e in rows[2]]
    assert len(seen[1]) == 32 + 16
    assert len(jsonl(path=str(again.folder / "out/buffers/pool.jsonl"))) == 32 + 32


def test_a_row_of_an_episode_says_what_is_plain() -> None:
    one = Episode(Task((Message("user", "2+2"),), "4", {"level": 1, "image": object()}), 0, [turn("4")], info={"question": "q"})
    one.reward, one.agent = 0.5, "solver"
    prompt = [{"role": "user", "content": "2+2"}]
    said = {"level": 1, "question": "q", "answer": "4", "agent": "solver", "reward": 0.5}
    assert row_of(one) == {**said, "prompt": prompt, "completion": "4"}
    assert row_of(replace(one, turns=[])) == {**said, "prompt": prompt}
    noted = replace(one, info={"question": "q", "answer": "5"})
    assert row_of(noted)["answer"] == "4"
    assert row_of(replace(noted, task=Task(one.task.prompt)))["answer"] == "5"  # a task without one: what was answered
    two = replace(one, turns=[turn("3", [Message("tool", "no")]), turn("4")])
    talk = [*prompt, {"role": "assistant", "content": "3"}, {"role": "tool", "content": "no"}]
    assert row_of(two) == {**said, "messages": [*talk, {"role": "assistant", "content": "4"}]}


def test_a_model_is_named_only_where_the_stage_puts_it_in_place() -> None:
    fit = {"kind": "fit", "data": "@task/demos", "loss": ["nll"], "steps": 1, "lr": 0.1}
    test = {"kind": "evaluate", "policies": {"a": "@a"}, "data": "@task/test", "metrics": ["accuracy"]}
    test["verifier"] = {"name": "model_score", "model": "nobody"}
    with pytest.raises(ConfigError) as error:
        plan({"task": {"name": "arithmetic"}, "stages": {"a": fit, "test": test}})
    assert str(error.value) == (
        "stages.test.verifier: 'model_score' is given a model of the stage (model), which works in the reward, keep and "
        "sampler of online and collect only"
    )


def test_who_reads_the_engine_s_log_probs_beside_the_old_policy_s_gets_the_trainer_s_own(tmp_path: Path) -> None:
    stage = two()
    ctx = context(tmp_path, "rl")
    models = ctx.models(stage.specs())
    episodes = draw(stage, models, iter([ctx.data(stage.data)[:2]]), {}, ctx, 1)[0]
    for played in episodes:
        played.turns[0].logp = played.turns[0].logp - 0.5  # as an engine with other numbers
    owners = {"logp": models["critic"]}
    models["critic"].module.get_output_embeddings().weight.data.mul_(3.0)
    found = []
    for reads in ({"old_logp"}, {"old_logp", "rollout_logp"}):
        batch = models["policy"].collate(episodes)
        fill(batch, reads, models, owners, 4096, 1.0)
        found.append((batch["old_logp"] - batch["rollout_logp"])[batch["mask"]])
    assert not found[0].any()
    assert torch.allclose(found[1], torch.tensor(0.5), atol=1e-5)


def test_gap_and_correction_of_the_native_engine_are_logged_and_change_nothing(tmp_path: Path) -> None:
    correct = Component("c", rollout_correction, ("old_logp", "rollout_logp", "mask"), into="correction")
    rows = []
    for name, derive in (("plain", []), ("corrected", [correct])):
        stage = online(by_sample, derive=derive)
        assert stage.problems() == []
        stage.run(context(tmp_path / name, "rl"))
        rows.append(record(tmp_path / name, "rl"))
    for free, corrected in zip(*rows, strict=True):
        assert corrected["gap/mean"] < 1e-5
        assert {k: round(v, 4) for k, v in corrected.items() if k.startswith("correction/")} == {
            "correction/mean": 1.0,
            "correction/min": 1.0,
            "correction/max": 1.0,
            "correction/zero": 0.0,
        }
        assert corrected["loss"] == pytest.approx(free["loss"], abs=1e-4)
