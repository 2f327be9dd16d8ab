"""The reward that a trained sequence classifier pays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from rlx import offload
from rlx.data.formats import turn
from rlx.models.tokenizer import byte_tokenizer
from rlx.rewards.model import batches, load, reward_model
from rlx.types import ConfigError, Episode, Message, Status, Task

SAID = ["5", "", "the answer is five", "5" * 40, "no"]


def tiny_config(num_labels: int = 1) -> Qwen2Config:
    tokenizer = byte_tokenizer()
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A classifier with one label and its tokenizer, as save_pretrained writes them."""
    torch.manual_seed(0)
    module = Qwen2ForSequenceClassification(tiny_config())
    torch.nn.init.normal_(module.score.weight)
    module.save_pretrained(tmp_path / "rm")
    byte_tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def episode(said: str, status: Status = Status.FINISHED) -> Episode:
    return Episode(Task((Message("user", "2+3="),)), 0, [turn(said)], status)


def alone(folder: Path, text: str) -> float:
    """The score of one text by itself, with nothing of rlx."""
    module = Qwen2ForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([byte_tokenizer().encode(text, add_special_tokens=False)])
    with torch.no_grad():
        return float(module(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize("token_budget", [1, 100, 16384])
def test_scores_are_those_of_each_text_alone_whatever_the_batching(saved: Path, token_budget: int) -> None:
    found = reward_model([episode(said) for said in SAID], path=str(saved), token_budget=token_budget)
    expected = [alone(saved, f"<|user|>2+3=<|assistant|>{said}<|end|>") for said in SAID]
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_what_an_environment_replied_is_read_too(saved: Path) -> None:
    told = Episode(Task((Message("user", "2+3="),)), 0, [turn("add", [Message("tool", "5")]), turn("5")], Status.FINISHED)
    expected = alone(saved, "<|user|>2+3=<|assistant|>add<|end|><|tool|>5<|assistant|>5<|end|>")
    assert reward_model([told], path=str(saved)) == pytest.approx([expected], abs=1e-5)


def test_without_a_template_the_end_token_follows_a_completion_that_was_not_cut(saved: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    (saved / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(saved)
    found = reward_model([episode("5"), episode("5", Status.TRUNCATED)], path=str(saved))
    assert found == pytest.approx([alone(saved, "2+3=5<|end|>"), alone(saved, "2+3=5")], abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_a_text_of_more_than_max_length_tokens_is_not_scored(saved: Path) -> None:
    scores = reward_model([episode("5"), episode("55")], path=str(saved), max_length=8)  # 8 tokens and 9
    assert [math.isnan(score) for score in scores] == [False, True]


def test_a_model_is_loaded_once(saved: Path) -> None:
    assert load(str(saved)) is load(str(saved))


def test_its_weights_are_in_the_hosts_memory_while_nothing_asks_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reward_model([episode(said) for said in SAID], path=str(saved))
    load.cache_clear()
    monkeypatch.setattr(offload, "enabled", True)
    with offload.present():
        assert reward_model([episode(said) for said in SAID], path=str(saved)) == expected
        assert len(offload.here) == 1
    assert not offload.here
    load.cache_clear()


def test_batches_hold_the_budget_with_padding_counted() -> None:
    assert batches([5, 2, 9, 2, 30], [0, 1, 2, 3, 4], 10) == [[1, 3], [0], [2], [4]]
    assert batches([5, 2, 9, 2, 30], [0, 1, 3], 15) == [[1, 3, 0]]


# --------------------------------------------------------------------------- mistakes
def message(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        reward_model([episode("5")], path=str(folder))
    return str(caught.value)


def test_more_labels_than_one(tmp_path: Path) -> None:
    Qwen2ForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert message(tmp_path) == f"model {str(tmp_path)!r}: it has 3 labels; a reward model has one (num_labels: 1)"


def test_no_padding_token(tmp_path: Path) -> None:
    config = tiny_config()
    config.pad_token_id = None
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    expected = "neither its config nor its tokenizer has a padding token; set pad_token_id"
    assert message(tmp_path) == f"model {str(tmp_path)!r}: {expected}"


def test_weights_without_the_head_are_not_drawn_at_random(tmp_path: Path) -> None:
    Qwen2ForCausalLM(tiny_config()).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert message(tmp_path) == f"model {str(tmp_path)!r}: its weights lack score.weight"


def test_no_tokenizer(tmp_path: Path) -> None:
    Qwen2ForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
    said = message(tmp_path)
    assert said.startswith(f"model {str(tmp_path)!r}: no tokenizer could be loaded (")
    assert said.endswith("; save one beside the model with tokenizer.save_pretrained(DIR)")
    assert "\n" not in said


def test_no_model(tmp_path: Path) -> None:
    expected = "is no directory; expected a directory that save_pretrained wrote, or a hub id"
    assert message(tmp_path / "rm") == f"model {str(tmp_path / 'rm')!r}: {expected}"
