"""PeBR-R1: the rewards of both stages by hand, the split by pass rate, and what each stage trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlx.advantages import group_zscore
from rlx.compose import compose
from rlx.data.shapes import HEADINGS, Question, Thing, describe, trace
from rlx.filters import chain
from rlx.losses.policy import clipped_surrogate, kl
from rlx.models.tiny_vlm import tiny_vlm
from rlx.plan import plan
from rlx.rewards.alignment import clip_similarity, scaled
from rlx.rewards.score import score
from rlx.run import run
from rlx.stages.summary import summary
from rlx.types import Component, ConfigError, Episode, Message, Task, Turn

FOUR = [HEADINGS[0], HEADINGS[1], HEADINGS[3], HEADINGS[4]]
SCENE = (Thing(2, "red", "circle"), Thing(3, "blue", "square"), Thing(8, "red", "cross"))


@pytest.fixture(scope="module")
def stages() -> Any:
    """The bound stages of the recipe."""
    return plan(compose(["pebr_r1"]).config).stages


def said(text: str, tokens: int, group: int = 0, answer: str = "2") -> Episode:
    """An episode about SCENE."""
    turn = Turn(np.zeros(1, np.int64), np.zeros(tokens, np.int64), np.zeros(tokens, np.float32), Message("assistant", text))
    names = tuple(thing.name for thing in SCENE)
    return Episode(Task((), answer, {"keywords": names, "vocabulary": (*names, "green cross")}), group, [turn])


def paid(rewards: list[Component[Any]], *episodes: Episode) -> list[float]:
    """What a stage's rewards pay in all."""
    score(list(episodes), rewards, "stages.x.reward")
    return [episode.reward for episode in episodes]


def test_the_cards_perception_reward() -> None:
    """s = 0.2, 2 of 3 keywords, all headings, 300 tokens: 0.4 0.5 + 0.4 2/3 + 0.1 + 0.1."""
    rewards = compose(["paper/pebr_r1"]).config["stages"]["perceive"]["reward"]
    assert [(r["name"], r["weight"]) for r in rewards] == [
        ("clip_similarity", 0.4),
        ("keyword_recall", 0.4),
        ("sections", 0.1),
        ("length_limit", 0.1),
    ]
    alignment, *others = plan(compose(["paper/pebr_r1"]).config).stages["perceive"].reward
    text = " ".join([HEADINGS[0], "red circle red cross", *FOUR[1:]])
    total = alignment.weight * scaled(0.2, alignment.settings["scale"]) + paid(others, said(text, 300))[0]
    assert total == pytest.approx(0.666667, abs=1e-6)


def test_the_stand_ins_perception_reward(stages: Any) -> None:
    """Two of three names: cosine 2 / sqrt(2 3), recall 2/3; 46 tokens are twice the limit."""
    text = f"{HEADINGS[0]} red circle red cross {HEADINGS[1]} {HEADINGS[3]} {HEADINGS[4]}"
    expected = 0.4 * 2 / 6**0.5 + 0.4 * 2 / 3 + 0.1 + 0.05
    assert paid(stages["perceive"].reward, said(text, 46)) == pytest.approx([expected])
    gold = trace(Question("colour", ("red",)), SCENE)
    assert paid(stages["perceive"].reward, said(gold, 20)) == pytest.approx([1.0])


def test_the_reasoning_reward_has_four_values(stages: Any) -> None:
    gold = trace(Question("colour", ("red",)), SCENE)
    texts = [gold, gold.removesuffix("2") + "3", f"{HEADINGS[4]} 2", "3"]
    assert paid(stages["reason"].reward, *(said(text, 20) for text in texts)) == pytest.approx([1.0, 0.1, 0.9, 0.0])


def test_the_split_is_a_partition_by_the_number_of_right_answers(stages: Any) -> None:
    episodes = [Episode(Task(()), group, reward=float(i < right)) for group, right in enumerate(range(9)) for i in range(8)]
    found = {name: {e.group for e in chain(episodes, keep)} for name, keep in stages["sort"].into.items()}
    assert found == {"hard": {0}, "medium": set(range(1, 8)), "easy": {8}}
    assert stages["sort"].samples == 8


def test_the_warm_up_leaves_vision_and_projector_as_they_are_and_perception_trains_them(tmp_path: Path) -> None:
    anywhere = "stages.perceive.reward=[{name: keyword_recall}]"  # what a model of two steps says has no sections yet
    run(plan(compose(["pebr_r1", "scale=smoke", anywhere]).config), tmp_path)
    base, sft, perceive = (load_file(tmp_path / stage / "out/model.safetensors") for stage in ("base", "sft", "perceive"))
    eyes = [name for name in base if "vision_tower" in name or "multi_modal_projector" in name]
    moving = [n for n in eyes if "head." not in n and "post_layernorm.bias" not in n]
    assert len(moving) > 10
    assert all(torch.equal(base[name], sft[name]) for name in eyes)
    assert any(not torch.equal(base[name], sft[name]) for name in base if name not in eyes)
    assert sum(not torch.equal(sft[name], perceive[name]) for name in moving) > len(moving) / 2


@pytest.mark.parametrize("name", ["pebr_r1", "paper/pebr_r1"])
def test_each_stage_of_rl_is_held_to_the_model_that_it_starts_from(name: str) -> None:
    stages = plan(compose([name]).config).stages
    for stage in ("perceive", "reason"):
        assert stages[stage].reference == stages[stage].policy
    assert str(stages["reason"].reference) == "@perceive"


def test_a_scorer_that_fails_is_counted_and_not_paid_as_0() -> None:
    """One that cannot score says nan, and the episode is left out; one that raises stops the run."""
    whole, broken = said(HEADINGS[0], 20), said(HEADINGS[0], 20)
    alignment = Component("alignment", lambda group: [0.5, float("nan")], weight=0.4)
    score([whole, broken], [alignment], "stages.perceive.reward")
    metrics = summary([whole], [whole, broken])
    assert (metrics["reward"], metrics["reward/failures"]) == (pytest.approx(0.2), 1.0)
    clip = Component("clip_similarity", partial(clip_similarity, path="./none"), weight=0.4)
    with pytest.raises(ConfigError, match="expected a directory that save_pretrained wrote"):
        score([said(HEADINGS[0], 20)], [clip], "stages.perceive.reward")


def test_a_group_of_equal_rewards_contributes_the_kl_term_alone() -> None:
    policy = tiny_vlm(layers=1, hidden=32, heads=2, ffn=64, vision_hidden=16)
    turn = Turn(np.array([3, 20, 5]), np.array([30, 31, 1]), np.zeros(3, np.float32), Message("assistant", "x"))
    batch = policy.collate([Episode(Task(()), 0, [turn], reward=0.1) for _ in range(4)])
    adv = group_zscore(batch["ret"], batch["group"], batch["mask"])
    assert not adv.any()

    def gradient(with_surrogate: bool) -> Tensor:
        policy.module.zero_grad()
        logp = policy.forward(batch, {"logp"})["logp"]
        loss = 0.01 * kl(logp, logp.detach() - 0.3, batch["mask"]).mean()
        if with_surrogate:
            loss = loss + clipped_surrogate(logp, logp.detach(), adv, batch["mask"]).mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    alone = gradient(False)
    assert float(alone.abs().max()) > 0
    torch.testing.assert_close(gradient(True), alone)


def test_the_demonstrations_fit_the_limits_of_the_recipe(stages: Any) -> None:
    policy = tiny_vlm(layers=1, hidden=32, heads=2, ffn=64, words=compose(["pebr_r1"]).config["model"]["words"])
    task = plan(compose(["pebr_r1", "task.train=300", "task.demos=300", "task.error_rate=0"]).config).task
    assert task is not None
    lengths = [policy.tokenize(row).num_tokens for row in task.splits["demos"]()]
    assert max(lengths) <= stages["perceive"].max_new_tokens
    limit = next(r.settings["limit"] for r in stages["perceive"].reward if r.name == "length_limit")
    assert limit == pytest.approx(1.2 * np.mean(lengths), abs=1)
    assert len(policy._ids(describe(SCENE))[0]) < 30
