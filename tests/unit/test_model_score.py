"""`model_score`: a head of a model of the stage, read at the last token of what that model was trained on."""

from __future__ import annotations

import pytest
import torch

from rlx.data.formats import turn
from rlx.models.language import LanguageModel
from rlx.models.load import tiny
from rlx.rewards.learned import model_score
from rlx.types import ConfigError, Episode, Message, Status, Task


@pytest.fixture(scope="module")
def rm() -> LanguageModel:
    made = tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, seed=3)
    with torch.no_grad():
        for weight in made.module.parameters():
            if weight.dim() > 1:
                weight.mul_(6.0)
    return made.with_heads({"score": "last", "other": "last"}, seed=5)


def asked(*answers: str, status: Status = Status.FINISHED) -> list[Episode]:
    return [Episode(Task((Message("user", "Say b."),)), 0, [turn(text)], status) for text in answers]


def by_hand(rm: LanguageModel, text: str, head: str = "score") -> float:
    """The head's product with the state after the last id of a text, which is all that is read."""
    ids = torch.tensor([rm.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        state = rm.module(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    assert rm.heads is not None
    return float(state @ rm.heads.linear[head].weight[0])  # type: ignore[operator, index]


def test_a_score_is_the_heads_at_the_end_token(rm: LanguageModel) -> None:
    answers = ["b", "bbbb, of course", ""]
    wanted = [by_hand(rm, f"<|user|>Say b.<|assistant|>{text}<|end|>") for text in answers]
    assert max(wanted) - min(wanted) > 0.1
    assert model_score(asked(*answers), model=rm) == pytest.approx(wanted, abs=1e-5)
    assert [model_score([e], model=rm)[0] for e in asked(*answers)] == pytest.approx(wanted, abs=1e-5)
    assert model_score(asked(*answers), model=rm, shift=0.25) == pytest.approx([x - 0.25 for x in wanted], abs=1e-5)


def test_an_answer_that_was_cut_is_read_up_to_its_last_token(rm: LanguageModel) -> None:
    whole, cut = asked("bb") + asked("bb", status=Status.TRUNCATED)
    found = model_score([whole, cut], model=rm)
    assert found == pytest.approx(
        [by_hand(rm, "<|user|>Say b.<|assistant|>bb<|end|>"), by_hand(rm, "<|user|>Say b.<|assistant|>bb")], abs=1e-5
    )
    assert abs(found[0] - found[1]) > 0.01


def test_the_head_is_the_one_that_is_named(rm: LanguageModel) -> None:
    wanted = by_hand(rm, "<|user|>Say b.<|assistant|>b<|end|>", "other")
    assert model_score(asked("b"), model=rm, head="other") == pytest.approx([wanted], abs=1e-5)
    with pytest.raises(ConfigError, match=r"^reward model_score: the model has no head 'value'; it offers .*other.*score"):
        model_score(asked("b"), model=rm, head="value")
