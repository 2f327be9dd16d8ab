"""Heads read the state that they say, whatever the padding, and travel with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import episode, model
from test_stages import NLL, by_sample, context, fit, online

from rlx.models.heads import Heads, ends, saved_heads
from rlx.models.language import LanguageModel
from rlx.models.load import read
from rlx.stages.models import ModelSpec
from rlx.stages.updates import UpdateSpec
from rlx.types import Batch, Episode, ModelRef

WHERE = {"value": "token", "score": "last", "v": "before_turn", "q": "after_turn"}


@pytest.fixture
def small() -> LanguageModel:
    return model("llama").with_heads(WHERE, seed=3)


def talks() -> list[Episode]:
    one = episode(([10, 11], [12, 13, 1]), group=0)
    two = episode(([20], [21]), ([22, 23], [24, 1]), ([25], [26, 27, 1]), group=1)
    return [one, two]


def alone(made: LanguageModel, name: str, row: list[int], at: int) -> float:
    """What a head says of the state after position `at` of a sequence by itself."""
    hidden = made.backbone(input_ids=torch.tensor([row])).last_hidden_state[0, at]
    assert made.heads is not None
    return float(made.heads.linear[name](hidden))


def test_each_head_reads_its_state(small: LanguageModel) -> None:
    batch = small.collate(talks())
    found = small.forward(batch, set(WHERE))
    one, two = ([int(i) for i in x.ids] for x in batch.inputs)
    for i, row, prompt in ((0, one, 2), (1, two, 1)):
        for t in range(len(row) - prompt):
            assert float(found["value"][i, t]) == pytest.approx(alone(small, "value", row, prompt + t - 1), abs=1e-5)
        assert float(found["score"][i]) == pytest.approx(alone(small, "score", row, len(row) - 1), abs=1e-5)
    before, after = [0, 3, 6], [1, 5, 9]  # the last id before each turn of the second, and its own last
    assert found["v"].shape == found["q"].shape == (2, 3)
    for k in range(3):
        assert float(found["v"][1, k]) == pytest.approx(alone(small, "v", two, before[k]), abs=1e-5)
        assert float(found["q"][1, k]) == pytest.approx(alone(small, "q", two, after[k]), abs=1e-5)
    assert float(found["v"][0, 0]) == pytest.approx(alone(small, "v", one, 1), abs=1e-5)


def test_heads_leave_the_log_probs_as_they_are(small: LanguageModel) -> None:
    batch = small.collate(talks())
    both = small.forward(batch, {"logp", "entropy", *WHERE})
    mask = batch["mask"]
    for name, x in model("llama").forward(batch, {"logp", "entropy"}).items():
        torch.testing.assert_close(both[name][mask], x[mask], atol=1e-5, rtol=0)
    apart = small.forward(batch, set(WHERE))
    for name in WHERE:
        torch.testing.assert_close(both[name], apart[name], atol=1e-5, rtol=0)


def test_a_part_of_a_batch_keeps_the_width_of_the_whole(small: LanguageModel) -> None:
    batch = small.collate(talks())
    found = small.forward(batch.take([0]), set(WHERE))
    assert {name: tuple(x.shape) for name, x in found.items()} == {"value": (1, 9), "score": (1,), "v": (1, 3), "q": (1, 3)}
    whole = small.forward(batch, set(WHERE))
    torch.testing.assert_close(found["value"][:, :3], whole["value"][:1, :3], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["q"][:, :1], whole["q"][:1, :1], atol=1e-5, rtol=0)


def test_ends_of_turns() -> None:
    turn = torch.tensor([[0, 0, -1, 1, 1], [0, -1, -1, -1, -1]])
    assert ends(turn, 2, last=False).tolist() == [[0, 3], [0, 0]]
    assert ends(turn, 2, last=True).tolist() == [[1, 4], [0, 0]]


def test_heads_travel_with_a_checkpoint(small: LanguageModel, tmp_path: Path) -> None:
    small.save(tmp_path / "out")
    assert saved_heads(tmp_path / "out") == WHERE
    again = read(str(tmp_path / "out"), {}, seed=9)
    batch = small.collate(talks())
    for name, x in small.forward(batch, set(WHERE)).items():
        torch.testing.assert_close(again.forward(batch, set(WHERE))[name], x, atol=1e-5, rtol=0)


def test_a_critic_starts_from_a_reward_model(tmp_path: Path) -> None:
    rm = model("llama").with_heads({"score": "last"}, seed=3)
    rm.save(tmp_path / "out")
    critic = read(str(tmp_path / "out"), {}, seed=9, heads={"value": "token"})
    assert rm.heads is not None
    assert critic.heads is not None
    assert torch.equal(critic.heads.linear["value"].weight, rm.heads.linear["score"].weight)  # type: ignore[arg-type]


def test_a_random_head_of_a_model_that_is_not_trained_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model("llama").save(tmp_path / "sft" / "out")
    model("llama").with_heads({"score": "last"}, seed=3).save(tmp_path / "rm" / "out")
    sft, rm = ModelRef(stage="sft"), ModelRef(stage="rm")
    specs = {
        "policy": ModelSpec(from_=sft),
        "rm": ModelSpec(from_=rm),
        "renamed": ModelSpec(from_=rm, heads={"value": "token"}),
        "more": ModelSpec(from_=rm, heads={"score": "last", "value": "token"}),
        "none": ModelSpec(from_=sft, heads={"score": "last"}),
        "made": ModelSpec(heads={"score": "last"}),
        "critic": ModelSpec(from_=sft, heads={"value": "token"}),
        "target": ModelSpec(ema="critic"),
        "mix": ModelSpec(mix={"policy": 1.0}),
    }
    context(tmp_path, "rl").models(specs, trained=["policy", "critic"])
    rest = "are random, because none were saved with the model, and this stage does not train them"
    assert capsys.readouterr().out.splitlines() == [
        f"! stages.rl.models.{name}: the weights of its head {head!r} {rest}"
        for name, head in (("more", "value"), ("none", "score"), ("made", "score"))
    ]


def test_stages_note_no_head_that_they_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rm = ModelSpec(heads={"score": "last"})
    fit(steps=1, models={"policy": rm}).run(context(tmp_path, "fit"))
    updates = {"critic": UpdateSpec(loss=[NLL], train="critic")}
    stage = online(by_sample, steps=1, loss=[], updates=updates, models={"critic": rm})
    stage.run(context(tmp_path, "trains"))
    assert "random" not in capsys.readouterr().out
    stage.models["rm"] = rm
    stage.run(context(tmp_path, "pays"))
    assert capsys.readouterr().out.count("! stages.pays.models.rm: the weights of its head 'score' are random") == 1


def test_heads_are_drawn_from_the_seed() -> None:
    one, two, other = (Heads(WHERE, 8, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["linear.q.weight"], other["linear.q.weight"])
    assert "linear.score.bias" not in one


def test_only_heads_are_trained_where_only_they_are_read(small: LanguageModel) -> None:
    batch: Batch = small.collate(talks())
    small.forward(batch, {"value"})["value"].sum().backward()  # type: ignore[no-untyped-call]
    grads = {name: p.grad is not None for name, p in small.module.named_parameters()}
    assert not grads["lm_head.weight"]
    assert len(small.parameters()) == len(grads) + 7


def test_heads_that_were_drawn_begin_with_a_bias(tmp_path: Path) -> None:
    """Not those of a checkpoint, and not that of the last position, which has none."""
    Heads({"value": "token"}, 8, 0).save(tmp_path)
    heads = Heads({"value": "token", "q": "after_turn", "score": "last"}, 8, 1)
    heads.load(tmp_path)
    heads.begin(-6.0)
    assert {name: x.item() for name, x in heads.state_dict().items() if name.endswith("bias")} == {
        "linear.value.bias": 0.0,
        "linear.q.bias": -6.0,
    }
