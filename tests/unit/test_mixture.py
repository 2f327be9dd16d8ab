"""A mixture of policies is their geometric mean, token by token, and moves with them."""

from __future__ import annotations

import pytest
import torch
from architectures import ids, model, random_episodes
from test_stages import by_sample, context, online

from rlx.models.load import tiny_t5
from rlx.models.mixture import Mixture
from rlx.models.tiny_vlm import tiny_vlm
from rlx.rollout.native import generate
from rlx.rollout.noise import key
from rlx.stages.models import ModelSpec
from rlx.types import Component, ConfigError, Episode, Play, Sampling, Task, View

PARTS = [("policy", 0.75), ("reference", 0.25)]


def test_log_probs_by_hand() -> None:
    a, b = model("llama", 0), model("llama", 1)
    made = Mixture([(a, 0.75), (b, 0.25)])
    batch = a.collate(random_episodes(4))
    row, prompt = batch.inputs[0].ids, batch.inputs[0].prompt
    x = torch.from_numpy(row)[None]
    logits = 0.75 * a.module(input_ids=x).logits.log_softmax(-1) + 0.25 * b.module(input_ids=x).logits.log_softmax(-1)
    want = logits.log_softmax(-1)[0, prompt - 1 : -1].gather(-1, x[0, prompt:, None])[:, 0]
    found = made.forward(batch, {"logp", "entropy"})
    torch.testing.assert_close(found["logp"][0, : len(want)], want, atol=1e-5, rtol=0)
    assert made.parameters() == []
    assert made.offers == {"logp", "entropy"}


def test_a_mixture_of_one_is_that_one() -> None:
    a = model("qwen2", 0)
    batch = a.collate(random_episodes(4))
    for name, x in a.forward(batch, {"logp", "entropy"}).items():
        torch.testing.assert_close(Mixture([(a, 1.0)]).forward(batch, {name})[name], x, atol=1e-5, rtol=0)


def test_what_it_samples_has_its_log_probs() -> None:
    made = Mixture([(model("qwen2", 0), 0.5), (model("qwen2", 1), 0.5)])
    made.engine = generate
    views = [View(ids(3, 60, 61, 4)), View(ids(3, 70, 4))]
    played = made.act(views, [[key(i, j) for j in range(4)] for i in range(2)], Sampling(8))
    batch = made.collate([Episode(Task(()), i, [turn]) for i, row in enumerate(played) for turn in row])
    logp = made.forward(batch, {"logp"})["logp"]
    torch.testing.assert_close(logp * batch["mask"], batch["rollout_logp"], atol=1e-5, rtol=0)


def test_only_causal_models_of_one_vocabulary_are_mixed() -> None:
    a = model("qwen2", 0)
    for other in (tiny_t5(layers=1), tiny_vlm(layers=1)):
        with pytest.raises(ConfigError, match=rf"^mix: model '{other.source}' is no causal language model of text alone"):
            Mixture([(a, 0.5), (other, 0.5)])
    b = model("qwen2", 1)
    b.tokenizer.add_tokens(["<more>"])
    with pytest.raises(ConfigError, match=r"^mix: models 'qwen2' and 'qwen2' have different vocabularies"):
        Mixture([(a, 0.5), (b, 0.5)])


def test_a_mixture_ends_where_its_parts_end_and_plays_by_their_engine() -> None:
    a = model("qwen2", 0)
    a.engine = generate
    made = Mixture([(a, 1.0)])
    assert (made.end_ids, made.engine, made.heads) == (a.end_ids, generate, None)


def test_a_stage_mixes_its_models(tmp_path) -> None:  # type: ignore[no-untyped-def]
    seen: list[float] = []

    def rival(play: Play, rows: list[Episode], n: int) -> list[Episode]:
        from rlx.rollout.samplers import plain

        played = plain(play, rows, n)
        mix, policy = play.models["opponent"], play.models["policy"]
        batch = policy.collate(played)
        seen.append(float((mix.forward(batch, {"logp"})["logp"] - policy.forward(batch, {"logp"})["logp"]).abs().sum()))
        return played

    stage = online(by_sample, steps=2, lr=0.1, sampler=Component("rival", rival))
    stage.models = {"old": ModelSpec(), "opponent": ModelSpec(mix={"policy": 0.5, "old": 0.5})}
    assert stage.problems() == []
    stage.run(context(tmp_path, "rl"))
    assert seen[0] == pytest.approx(0.0, abs=1e-3)
    assert seen[1] > 0.1
    stage.models["opponent"] = ModelSpec(mix={"policy": 0.5, "odl": 0.5})
    assert stage.problems() == [
        "models.opponent.mix: 'odl' is none of the models to be mixed; did you mean 'old'? (known: policy, old)"
    ]
