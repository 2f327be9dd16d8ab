"""The byte tokenizer, and conversations to tokens for chat templates of every kind: what is trained on is written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rlx.models.language import LanguageModel
from rlx.models.load import finish
from rlx.models.tokenizer import byte_tokenizer
from rlx.types import DataError, Episode, Message, Task, Turn

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Only the last assistant message is kept whole, as where a template drops earlier reasoning.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}...{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def policy(template: str | None = None, *, special: tuple[str, ...] = (), tokenizer: Any = None) -> LanguageModel:
    """A policy that is never run: `template` "" is a base model, None the shipped one."""
    tokenizer = tokenizer or byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if template is not None:
        tokenizer.chat_template = template or None
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return finish(Qwen2ForCausalLM(config), tokenizer, dtype="fp32", lora=None, device="cpu", seed=0, source="here")


def chatml(template: str = CHATML) -> LanguageModel:
    return policy(template, special=("<|im_start|>", "<|im_end|>"))


def demo(prompt: list[Message], *said: Message | tuple[Message, tuple[Message, ...]]) -> Episode:
    nothing = np.zeros(0, np.int64)
    turns = []
    for one in said:
        message, replies = (one, ()) if isinstance(one, Message) else one
        turns.append(Turn(nothing, nothing, np.zeros(0, np.float32), said=message, replies=replies))
    return Episode(Task(tuple(prompt)), 0, turns, label=1.0)


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str) -> Message:
    return Message("assistant", text)


def shown(model: LanguageModel, episode: Episode) -> list[tuple[str, str]]:
    """Each turn as (text seen, text trained on), special tokens included."""
    return [("".join(model.pieces(t.seen)), "".join(model.pieces(t.did))) for t in model.tokenize(episode).turns]


# --------------------------------------------------------------------------- the byte tokenizer
@pytest.mark.parametrize("text", ["57+68=125", " two  spaces\n\ttab ", "naïve Ω 中文 🙂", "", "\x00\x7f", "it 's . , ?"])
def test_bytes_round_trip(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_vocabulary_is_six_special_tokens_and_256_bytes() -> None:
    tokenizer = byte_tokenizer()
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    assert len(tokenizer) == 262
    assert [tokenizer.encode(s, add_special_tokens=False) for s in specials] == [[0], [1], [2], [3], [4], [5]]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode([3, *tokenizer.encode("a"), 1], skip_special_tokens=True) == "a"


def test_a_vocabulary_of_some_characters_has_no_others(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(only="cabé")
    assert len(tokenizer) == 7 + 5
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each.encode("<|user|>abcé<|end|>", add_special_tokens=False)
        assert ids == [3, 7, 8, 9, 11, 10, 1]
        assert each.decode(ids, skip_special_tokens=True) == "abcé"
        assert each.encode("azb", add_special_tokens=False) == [7, 6, 8]
        assert each.decode([7, 6, 8]) == "a<|unknown|>b"


# --------------------------------------------------------------------------- what is trained on
def test_single_turn_of_the_shipped_template() -> None:
    model = policy()
    made = model.tokenize(demo([user("1+1=")], bot("2")))
    assert model.pieces(made.turns[0].seen) == ["<|user|>", "1", "+", "1", "=", "<|assistant|>"]
    assert model.pieces(made.turns[0].did) == ["2", "<|end|>"]
    assert made.label == 1.0


def test_conversation_of_the_shipped_template() -> None:
    episode = demo([Message("system", "s"), user("a")], (bot("b"), (user("c"),)), bot("d"))
    expected = [("<|system|>s<|user|>a<|assistant|>", "b<|end|>"), ("<|user|>c<|assistant|>", "d<|end|>")]
    assert shown(policy(), episode) == expected


def test_conversation_of_a_template_without_markers() -> None:
    """The newline after the end token is the template's, not the policy's: it belongs to what is seen next."""
    episode = demo([user("a")], (bot("b"), (user("c"),)), bot("d"))
    assert shown(chatml(), episode) == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>"),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", "d<|im_end|>"),
    ]


def test_base_model_reads_the_text_as_it_is() -> None:
    assert shown(policy(""), demo([user("1+1=")], bot("2"))) == [("1+1=", "2<|end|>")]
    two = demo([user("a")], (bot("b"), (user("c"),)), bot("d"))
    assert shown(policy(""), two) == [("a", "b<|end|>"), ("c", "d<|end|>")]


def test_base_model_gets_the_first_token_that_its_tokenizer_puts() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 2)])
    assert shown(policy("", tokenizer=tokenizer), demo([user("a")], bot("b"))) == [("<|system|>a", "b<|end|>")]


@pytest.mark.parametrize("make", [policy, chatml, lambda: policy("")], ids=["markers", "prefix", "base"])
@pytest.mark.parametrize(
    "prompt",
    [
        [user("1+1=")],
        [Message("system", "be short"), user("hi")],
        [user("1+1="), bot("2"), user("2+2=")],
        [user("1+1="), bot("It is ")],
    ],
    ids=["plain", "system", "few-shot", "unfinished"],
)
def test_demonstrations_see_what_sampling_sees(make: Any, prompt: list[Message]) -> None:
    model = make()
    turn = model.tokenize(demo(prompt, bot("4"))).turns[0]
    assert turn.seen.tolist() == model.render(prompt).tolist()
    assert "".join(model.pieces(turn.did)) == "4" + model.end_token


@pytest.mark.parametrize("make", [policy, chatml], ids=["markers", "prefix"])
def test_later_turns_see_what_sampling_sees(make: Any) -> None:
    model = make()
    episode = demo([user("a")], (bot("b"), (Message("tool", "c"), user("d"))), bot("e"))
    talk = [user("a"), bot("b"), Message("tool", "c"), user("d")]
    assert model.tokenize(episode).turns[1].seen.tolist() == model.extension(talk, 2).tolist()


def test_few_shot_answers_in_the_prompt_are_not_trained_on() -> None:
    episode = demo([user("1+1="), bot("2"), user("2+2=")], bot("4"))
    assert shown(policy(), episode) == [("<|user|>1+1=<|assistant|>2<|end|><|user|>2+2=<|assistant|>", "4<|end|>")]


def test_unfinished_answer_is_continued() -> None:
    model = policy()
    prompt = [user("1+1="), bot("It is ")]
    assert "".join(model.pieces(model.render(prompt))) == "<|user|>1+1=<|assistant|>It is "
    assert shown(model, demo(prompt, bot("2"))) == [("<|user|>1+1=<|assistant|>It is ", "2<|end|>")]


def test_template_that_marks_nothing_trains_on_nothing() -> None:
    unreached = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + unreached
    made = policy(template).tokenize(demo([user("a")], bot("b")))
    assert made.num_tokens == 0


def test_end_token_after_the_markers_is_trained_on() -> None:
    """Some templates mark the text alone; a policy that never trains on the end token would not learn to stop."""
    marked = "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n"
    template = CHATML.replace(
        "{{ message['content'] }}<|im_end|>\n",
        "{% if message['role'] == 'assistant' %}" + marked + "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}",
    )
    made = chatml(template)
    talk = demo([user("1+1="), bot("3"), user("No.")], (bot("2"), (user("2+2="),)), bot("4"))
    turns, plain = made.tokenize(talk).turns, chatml().tokenize(talk).turns
    assert ["".join(made.pieces(turn.did)) for turn in turns] == ["2<|im_end|>", "4<|im_end|>"]
    assert [turn.seen.tolist() for turn in turns] == [turn.seen.tolist() for turn in plain]


def test_markers_are_found_with_and_without_spaces() -> None:
    tight = byte_tokenizer().chat_template.replace("{% generation %}", "{%- generation -%}").replace("% endgen", "%- endgen")
    assert shown(policy(tight), demo([user("a")], bot("b"))) == [("<|user|>a<|assistant|>", "b<|end|>")]


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    model = chatml(FORGETFUL)
    with pytest.raises(DataError) as error:
        model.tokenize(demo([user("a")], (bot("b"), (user("c"),)), bot("d")))
    assert str(error.value) == (
        "model 'here': its chat template rewrites earlier turns, so the assistant's tokens cannot be told apart; "
        "give the template {% generation %} markers"
    )
    with pytest.raises(DataError) as error:
        model.extension([user("a"), bot("b"), user("c")], 1)
    assert str(error.value) == "model 'here': its chat template rewrites earlier turns; it cannot play several turns"


def test_empty_prompt_is_refused() -> None:
    for act in (lambda m: m.render([user("")]), lambda m: m.tokenize(demo([user("")], bot("b")))):
        with pytest.raises(DataError) as error:
            act(policy(""))
        assert str(error.value) == "model 'here': an empty prompt; the first token of an answer needs one before it"


# --------------------------------------------------------------------------- where an answer ends
def test_answers_end_at_the_tokens_of_template_tokenizer_and_model() -> None:
    assert policy().end_ids == [1]
    assert policy("").end_ids == [1]
    model = chatml()
    assert model.end_token == "<|im_end|>"
    assert model.end_ids == [1, model.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=262, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=[5, 2]
    )
    listed = finish(Qwen2ForCausalLM(config), tokenizer, dtype="fp32", lora=None, device="cpu", seed=0, source="here")
    assert listed.end_ids == [1, 2, 5]
    assert listed.module.generation_config.eos_token_id == [1, 2, 5]
