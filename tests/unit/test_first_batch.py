"""`rlx check --first-batch`: what it reads, what it says, and the memory that it estimates."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import kept_bytes
from transformers import Gemma3TextConfig, Qwen2Config

from rlx import memory, probes
from rlx.compose import compose
from rlx.first_batch import look
from rlx.memory import Sizes
from rlx.models.load import outline, pretrained, shrunken, tiny
from rlx.models.tokenizer import TEMPLATE, byte_tokenizer
from rlx.plan import Plan, plan
from rlx.run import run
from rlx.types import Component, ConfigError, Episode, Message, Task

FIT = {"kind": "fit", "data": "@task/demos", "loss": [{"name": "nll"}], "steps": 1, "rows_per_step": 8, "lr": 1e-3}
ONLINE = {
    "kind": "online",
    "data": "@task/train",
    "reward": [{"name": "answer_match"}, {"name": "length"}],
    "advantage": [{"name": "group_mean"}],
    "loss": [{"name": "clipped_surrogate"}],
    "steps": 1,
    "prompts_per_step": 6,
    "group_size": 2,
    "minibatches": 2,
    "token_budget": 64,
    "lr": 1e-3,
}
EVALUATE = {"kind": "evaluate", "policies": {"rl": "@rl"}, "data": "@task/test", "metrics": ["accuracy"], "limit": 7}
MODEL = {"name": "tiny", "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 128}


def made(model: dict[str, Any] | None = None, **stages: dict[str, Any]) -> Plan:
    task = {"name": "arithmetic", "digits": 1, "dev": 5, "test": 10}
    return plan({"recipe": "mine", "seed": 3, "model": model or MODEL, "task": task, "track": {}, "stages": stages})


def changed(found: Plan, stage: str, **fields: Any) -> Plan:
    found.stages[stage] = dataclasses.replace(found.stages[stage], **fields)  # type: ignore[type-var]
    return found


def said(found: Plan) -> tuple[str, str]:
    """What is printed, and the error at the end."""
    lines: list[str] = []
    try:
        lines.extend(look(found))
    except ConfigError as error:
        return "\n".join(lines), str(error)
    return "\n".join(lines), ""


def qwen2(folder: Path, template: str = TEMPLATE, **settings: Any) -> str:
    """A directory with a configuration and a tokenizer, and no weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2Config(**{"vocab_size": 262, "num_hidden_layers": 5, **sizes, **settings}).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


# --------------------------------------------------------------------------- the whole
def test_rows_that_are_written_in_the_run_are_not_looked_for() -> None:
    collect = {"kind": "collect", "data": "@task/train", "reward": ["verifier"], "group_size": 2, "rows": "pairs", "limit": 9}
    text, error = said(made(rows=collect, sft={**FIT, "data": "@rows"}))
    assert error == ""
    assert "rows\n  9 rows: prompt, answer, carry; it writes pairs from 2 answers to each prompt" in text
    assert "sft\n  its rows are written by stage 'rows' in the run" in text


def test_every_stage_is_looked_at() -> None:
    text, error = said(made(sft=FIT, rl={**ONLINE, "policy": "@sft"}, test=EVALUATE))
    assert error == ""
    lines = text.splitlines()
    assert lines[:4] == [
        "",
        "sft",
        "  73 rows: prompt, completion, answer, carry, correct",
        "  first batch: 8 rows of 8 to 9 (mean 8.6) tokens; 30.4% of the positions are trained on",
    ]
    assert lines[4] == "  longest row: 9 tokens; max_length not set, the model's context 1024"
    assert lines[5].startswith("  loss of 4 rows with random weights: nll 5.")
    assert lines[6] == "  largest batch: 8 rows of 6 + 3 tokens in packed units of at most 72 tokens (token_budget 16384)"
    assert lines[8:12] == [
        "",
        "rl",
        "  73 rows: prompt, answer, carry",
        "  first batch: 6 prompts of 6 to 6 (mean 6.0) tokens; answers of at most 5",
    ]
    assert "  largest batch: 6 rows of 6 + 5 tokens in packed units of at most 64 tokens (token_budget 64)" in lines
    assert lines[-4:-1] == ["test", "  evaluates on 7 rows: prompt, answer, carry", ""]
    assert lines[-1].startswith("this machine: ")


def test_the_first_batch_is_the_one_that_training_draws(tmp_path: Path) -> None:
    found = made(sft={**FIT, "log_every": 1})
    text, _ = said(found)
    run(found, tmp_path / "run")
    trained = json.loads((tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()[0])
    assert trained["tokens"] == 69.0
    assert "first batch: 8 rows of 8 to 9 (mean 8.6) tokens" in text  # 69 / 8


def test_rollouts_are_cut_and_rewards_are_told_the_real_limit() -> None:
    overlong = {"name": "soft_overlong", "budget": 100}
    text, error = said(made(rl={**ONLINE, "reward": [overlong], "max_new_tokens": 200, "token_budget": 16384}))
    assert error == ""
    rows = {line[2:42].strip(): line[42:].split() for line in text.splitlines()}
    assert rows["repetition"] == ["200", "-1", "-1"]
    assert rows["gold answer"] == ["2", "0", "0"]
    assert rows["rollouts, mean of 8, cut at 64 tokens"][1:] == ["0", "0"]
    assert text.count("is paid as much as the gold answer") == 2


def test_a_reference_is_scored_and_counted() -> None:
    kl = {**ONLINE, "loss": [*ONLINE["loss"], {"name": "kl"}], "policy": "@sft", "reference": "@sft"}  # type: ignore[misc]
    text, error = said(made(sft=FIT, rl=kl))
    assert error == ""
    assert "loss of 8 rows with random weights: clipped_surrogate 0, kl 0" in text
    assert re.search(r"weights, gradient, AdamW, reference \d\.\d MB; ", text)


def test_weights_of_a_stage_come_from_where_its_first_stage_began(tmp_path: Path) -> None:
    sft = {**FIT, "policy": qwen2(tmp_path)}
    text, error = said(made(sft=sft, more={**FIT, "policy": "@sft"}, other=FIT))
    assert error == ""
    assert [line.split()[2] for line in text.splitlines() if "memory of" in line] == ["55,840", "55,840", "128,192"]


# --------------------------------------------------------------------------- mistakes
def test_the_mistakes_of_all_stages_are_told_at_the_end() -> None:
    text, error = said(made(sft={**FIT, "rows_per_step": 99}, more={**FIT, "max_length": 4}, test={**EVALUATE, "policies": {}}))
    assert error.splitlines() == [
        "stages.sft.rows_per_step: 99 asked for, but the data has 73 rows",
        "stages.more.data: every row is longer than max_length=4 tokens",
    ]
    assert "test\n  evaluates on 7 rows" in text


def test_rows_without_a_trained_token_are_an_error(tmp_path: Path) -> None:
    unmarked = TEMPLATE.replace(
        "message['role'] == 'assistant'", "message['role'] == 'assistant' and 'x' not in message['content']"
    )
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "completion": c}) + "\n" for c in ("b", "xx", "c")))
    fit = {**FIT, "data": {"name": "jsonl", "path": str(file)}, "rows_per_step": 2}
    _, error = said(made({"name": qwen2(tmp_path / "model", unmarked)}, sft=fit))
    assert error == "stages.sft.data: 1 of 3 rows have no token that is trained on (see `rlx data show`)"


def test_what_is_longer_than_the_context_is_an_error() -> None:
    _, error = said(made({**MODEL, "context": 8}, sft=FIT, rl=ONLINE))
    assert error.splitlines() == [
        "stages.sft.max_length: a row has 9 tokens and the model's context 8; set it",
        "stages.rl.max_new_tokens: 5 after a prompt of 6 tokens exceed the model's context of 8",
    ]


def test_rewards_that_cannot_score_are_counted_and_an_error_when_none_is() -> None:
    def first_only(episodes: list[Episode]) -> list[float]:
        return [1.0] + [math.nan] * (len(episodes) - 1)

    text, error = said(changed(made(rl=ONLINE), "rl", reward=[Component("first", first_only)]))
    assert "  reward failures: 4 of 8 rollouts could not be scored" in text
    assert error == ""
    nothing = [Component("never", lambda episodes: [math.nan] * len(episodes))]
    text, error = said(changed(made(rl=ONLINE), "rl", reward=nothing))
    assert error == "stages.rl.reward: none of 8 rollouts could be scored"


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    endless = Component("endless", lambda logp: logp / 0.0, reads=("logp",))
    _, error = said(changed(made(sft=FIT), "sft", loss=[endless]))
    assert error == "stages.sft.loss: 'endless' is -inf on the first batch"


# --------------------------------------------------------------------------- completions made by hand
def test_completions_made_by_hand_and_their_table() -> None:
    row = Episode(Task((Message("user", "2+2="),), "4"), group=5)
    found = probes.completions(row, shrunken(Component("tiny", tiny)), 9)
    assert {name: e.completion for name, e in found.items()} == {
        "gold answer": "4",
        "nothing": "",
        "prompt echoed": "2+2=",
        "repetition": "the the t",
    }
    assert [e.num_tokens for e in found.values()] == [2, 1, 5, 9]
    assert [e.status.value for e in found.values()] == ["finished", "finished", "finished", "truncated"]
    assert {e.info["max_new_tokens"] for e in found.values()} == {9}
    for episode, value in zip(found.values(), (1.0, 0.0, math.nan, 1.0), strict=True):
        episode.rewards, episode.reward = {"mine": value}, 2 * value
    reward = [Component("mine", lambda episodes: [0.0] * len(episodes), weight=2.0)]
    assert probes.table(reward, found, [found["gold answer"], found["nothing"], found["prompt echoed"]], "rollouts") == [
        "rewards of     tokens  mine  total",
        "gold answer         2     1      2",
        "nothing             1     0      0",
        "prompt echoed       5   nan    nan",
        "repetition          9     1      2",
        "rollouts          1.5   0.5      1",
        "note: 'repetition' is paid as much as the gold answer",
    ]


def test_a_task_without_an_answer_has_no_gold_completion() -> None:
    row = Episode(Task((Message("user", "Tell a story."),)), group=0)
    found = probes.completions(row, shrunken(Component("tiny", tiny)), 20)
    assert list(found) == ["nothing", "prompt echoed", "repetition"]


# --------------------------------------------------------------------------- shrunken models and outlines
def test_a_shrunken_model_keeps_all_but_its_layers_and_needs_no_weights(tmp_path: Path) -> None:
    small = shrunken(Component("pretrained", pretrained, settings={"path": qwen2(tmp_path), "dtype": "bf16"}))
    config = small.module.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 32, 48)
    assert len(config.layer_types) == 2
    assert small.bf16
    assert small.tokenizer.chat_template == TEMPLATE


def test_a_shrunken_model_of_one_layer_stays_one(tmp_path: Path) -> None:
    small = shrunken(Component("pretrained", pretrained, settings={"path": qwen2(tmp_path, num_hidden_layers=1)}))
    assert small.module.config.num_hidden_layers == 1


def test_layers_of_several_kinds_are_cut_together(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    Gemma3TextConfig(vocab_size=262, num_hidden_layers=6, **sizes).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    small = shrunken(Component("pretrained", pretrained, settings={"path": str(tmp_path)}))
    assert small.module.config.layer_types == ["sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_an_outline_has_the_sizes_of_the_real_model_and_no_memory(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    real = tiny(layers=3, hidden=32, heads=2, kv_heads=1, ffn=48)
    real.save(tmp_path / "model")
    found = outline(Component("pretrained", pretrained, settings={"path": str(tmp_path / "model"), "lora": lora}))
    assert all(weight.is_meta for weight in found.module.parameters())
    assert memory.sizes(found) == memory.sizes(pretrained(path=str(tmp_path / "model"), lora=lora))
    assert memory.sizes(found).trained == (5568 if lora else 31840)


@pytest.mark.parametrize("make", [shrunken, outline])
def test_a_directory_without_a_model_is_named(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ConfigError) as error:
        make(Component("pretrained", pretrained, settings={"path": str(tmp_path)}))
    expected = "has no config.json; expected a directory that save_pretrained wrote, or a hub id"
    assert str(error.value) == f"model '{tmp_path}': {expected}"


# --------------------------------------------------------------------------- memory
SIZES = Sizes(weights=1000, trained=100, layers=2, hidden=10, ffn=30, cached=4, vocabulary=50, context=None, bf16=False)
HALF = dataclasses.replace(SIZES, bf16=True)


def test_memory_by_hand() -> None:
    assert memory.states(SIZES, None) == 4 * 1000 + 12 * 100
    assert memory.states(HALF, SIZES) == 4 * 1000 + 12 * 100 + 2 * 1000 + 4 * 1000
    assert memory.activations(SIZES, 7) == 2 * 7 * (40 * 10 + 16 * 30)
    assert memory.activations(HALF, 7) == 2 * 7 * (40 * 10 + 8 * 30)
    again = dataclasses.replace(SIZES, recomputes=True)
    assert memory.activations(again, 7) == 2 * 7 * 4 * 10 + 7 * (40 * 10 + 16 * 30)
    assert memory.of_key(SIZES) == 2 * 2 * 4 * 4 / memory.activations(SIZES, 1)
    assert memory.of_key(HALF) == 2 * 2 * 4 * 2 / memory.activations(HALF, 1)
    assert memory.of_key(again) == 2 * 4 * 4 / memory.activations(again, 1)
    assert memory.logits(SIZES, 3) == 3 * 50 * 20
    assert memory.rollouts(SIZES, 3, 11) == 3 * (2 * 2 * 4 * 4 * 11 + 50 * 24)
    assert memory.rollouts(HALF, 3, 11) == 3 * (2 * 2 * 4 * 2 * 11 + 50 * 24)


def test_memory_of_a_rank_by_hand() -> None:
    """4 ranks; 1000 weights, 100 of them trained."""
    assert [memory.divided_states(SIZES, None, stage, 4) for stage in range(4)] == [
        4000 + 400 + 800,
        4000 + 400 + 300,
        4000 + 100 + 300,
        4000 + 100 + 300 + 1000,
    ]
    assert memory.divided_states(HALF, None, 0, 4) == 4000 + 400 + 800
    assert memory.divided_states(HALF, SIZES, 3, 4) == 2000 + 100 + 300 + 500 + 4000


def test_weights_that_a_rank_cannot_sample_with_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    large = dataclasses.replace(SIZES, weights=30 * 10**9, trained=30 * 10**9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert memory.in_ranks(large, None, 2, 8) == [
        "each of 8 ranks: 180.0 GB stay, 120.0 GB of them the whole weights to sample with"
    ]
    assert memory.in_ranks(large, large, 2, 8, offloaded=True) == [
        "each of 8 ranks: 180.0 GB stay, 120.0 GB of them the whole weights to sample with; reference 120.0 GB in the host's "
        "memory for each of them"
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (70 * 10**9, 80 * 10**9))
    with pytest.raises(ConfigError) as error:
        memory.in_ranks(large, None, 2, 8)
    assert str(error.value) == (
        "launch: each rank samples with whole weights, 120.0 GB when they are read, and a GPU has 80.0 GB; "
        "take a smaller model; vLLM divides them where it samples (rollout=vllm_server), "
        "but a rank needs them whole to hand them over"
    )
    assert len(memory.in_ranks(dataclasses.replace(large, weights=20 * 10**9), None, 3, 8)) == 1


def test_the_estimate_in_words() -> None:
    large = Sizes(
        weights=494_032_768,
        trained=494_032_768,
        layers=24,
        hidden=896,
        ffn=4864,
        cached=128,
        vocabulary=151_936,
        context=None,
        bf16=True,
    )
    assert memory.estimate(large, large, rows=100, prompt=100, answer=400, budget=4096, decoded=256) == [
        "largest batch: 100 rows of 100 + 400 tokens = 13 units of at most 8 rows (token_budget 4096)",
        "memory of 494,032,768 weights: weights, gradient, AdamW, reference 10.9 GB; a unit's logits 9.7 GB and activations "
        "7.2 GB; rollouts of 256 rows 2.5 GB; at the peak 27.8 GB",
    ]
    offloaded = memory.estimate(large, large, rows=100, prompt=100, answer=400, budget=4096, decoded=256, offloaded=True)
    assert offloaded[1] == (
        "memory of 494,032,768 weights: weights, gradient, AdamW 8.9 GB; a unit's logits 9.7 GB and activations 7.2 GB; "
        "rollouts of 256 rows 2.5 GB; reference 2.0 GB in the host's memory; at the peak 25.8 GB"
    )
    other = dataclasses.replace(large, weights=10 * 10**9)  # asked with the logits of a unit, it takes more than an update
    offloaded = memory.estimate(large, other, rows=100, prompt=100, answer=400, budget=4096, offloaded=True)
    assert offloaded[1].endswith("; reference 40.0 GB in the host's memory; at the peak 58.6 GB")
    assert memory.estimate(large, None, rows=2, prompt=5000, answer=1, budget=4096)[0] == (
        "largest batch: 2 rows of 5000 + 1 tokens = 2 units of at most 1 row (token_budget 4096)"
    )
    assert memory.estimate(large, large, rows=100, prompt=100, answer=400, budget=4096, packs=True) == [
        "largest batch: 100 rows of 100 + 400 tokens in packed units of at most 4096 tokens (token_budget 4096)",
        "memory of 494,032,768 weights: weights, gradient, AdamW, reference 10.9 GB; a unit's logits 1.3 GB and activations "
        "7.3 GB; at the peak 19.6 GB",
    ]
    for packs in (False, True):  # groups that stay whole, whatever the budget
        assert memory.estimate(large, None, rows=100, prompt=100, answer=400, budget=4096, packs=packs, together=16)[0] == (
            "largest batch: 100 rows of 100 + 400 tokens "
            + ("in packed units of at most 8000 tokens" if packs else "= 7 units of at most 16 rows")
            + " (token_budget 4096)"
        )
    assert memory.estimate(large, None, rows=2, prompt=5000, answer=1, budget=4096, packs=True)[0] == (
        "largest batch: 2 rows of 5000 + 1 tokens in packed units of at most 5001 tokens (token_budget 4096)"
    )


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_are_those_that_the_backward_keeps(dtype: Any, *, again: bool) -> None:
    """What two layers more keep: with activation checkpointing their inputs, and no layer's casts."""
    settings: Any = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 256, "dtype": dtype, "activation_checkpointing": again}

    def kept(layers: int) -> int:
        model = tiny(layers=layers, **settings)
        ids = torch.ones(4, 128, dtype=torch.long)
        return kept_bytes(model, lambda: model.module.model(input_ids=ids, use_cache=False))

    two, four = (memory.sizes(tiny(layers=layers, **settings)) for layers in (2, 4))
    halved = 2 * 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 256)  # the casts of two layers' weights, counted with the weights
    casts = halved if dtype == "bf16" and not again else 0
    more = memory.activations(four, 4 * 128) - memory.activations(two, 4 * 128)
    assert kept(4) - kept(2) - casts == pytest.approx(more, rel=0.15)


def test_a_policy_that_does_not_speak_plays_its_first_tasks() -> None:
    lines = "\n".join(look(plan(compose(["words_as_beacons", "task.train=40"]).config)))
    assert "first batch: 16 tasks of at most 150 steps" in lines
    assert "subgoal_bonus" in lines
    assert "loss of 4 rows with random weights: clipped_surrogate" in lines
    assert "memory of 8,551 weights" in lines
