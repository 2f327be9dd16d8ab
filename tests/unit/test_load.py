"""Models from settings and from disk: what is refused, what is random, and that plain transformers reads what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import episode
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlx import reduce
from rlx.learner import TorchLearner
from rlx.losses import likelihood
from rlx.models.language import LanguageModel
from rlx.models.load import pretrained, tiny
from rlx.optim import adamw
from rlx.terms import Update
from rlx.types import Component, ConfigError, Message

SIZES = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def small(**settings: Any) -> LanguageModel:
    return tiny(**SIZES, **settings)


def saved(folder: Path) -> Path:
    small().save(folder)
    return folder


def trained(policy: LanguageModel) -> LanguageModel:
    """After three steps that matter."""
    learner = TorchLearner(policy, Component("adamw", adamw), lr=0.05, total=3)
    nll = Component("nll", likelihood.nll, ("logp", "mask"))
    for _ in range(3):
        batch = policy.collate([episode(([3, 70, 4], [80, 81, 1])), episode(([3, 71, 4], [82, 1]))])
        learner.step(batch, Update([nll], Component("token_mean", reduce.token_mean)), (0,))
    return policy


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = module(input_ids=torch.tensor([[3, 70, 4, 80, 81]])).logits
    return out


def weights(policy: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.module.named_parameters()}


# --------------------------------------------------------------------------- seeds
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_weights_are_drawn_from_the_seed_alone(lora: dict[str, Any] | None) -> None:
    one, two, other = small(seed=1, lora=lora), small(seed=1, lora=lora), small(seed=2, lora=lora)
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))
    drawn = [name for name, p in weights(one).items() if not torch.equal(p, weights(other)[name])]
    assert any("lora_A" in name for name in drawn) == (lora is not None)
    assert len(drawn) > 10
    state = torch.random.get_rng_state()
    small(seed=3, lora=lora)
    assert torch.equal(torch.random.get_rng_state(), state)


# --------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_plain_transformers_loads_what_is_saved(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    policy = trained(small(lora=lora))
    policy.save(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(policy.module), atol=1e-5, rtol=0)
    assert float((logits(plain) - logits(small().module)).abs().max()) > 0.01
    assert plain.generation_config.eos_token_id == [1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = policy.render([Message("user", "1+1=")])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}], add_generation_prompt=True, return_dict=False
    )
    assert list(rendered) == prompt.tolist()
    again = pretrained(path=str(tmp_path / "out"))
    torch.testing.assert_close(logits(again.module), logits(plain))
    assert again.end_ids == [1]
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_lora_trains_its_adapter_alone(tmp_path: Path) -> None:
    policy = small(lora=LORA)
    before = weights(policy)
    trained(policy)
    changed = {name for name, p in weights(policy).items() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 8  # A and B of two projections of two layers
    policy.save(tmp_path / "out")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 8
    assert all("lora_" in name for name in adapter)
    assert any("lora_" in name for name, _ in policy.module.named_parameters())  # saving leaves the policy as it was


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({**LORA, "lora_dropout": 0.1}, "model.lora.lora_dropout: rlx trains without dropout; leave it out"),
        ({**LORA, "rank": 4}, "model.lora: LoraConfig.__init__() got an unexpected keyword argument 'rank'"),
    ],
)
def test_lora_settings_that_cannot_be_used(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        small(lora=lora)
    assert str(error.value) == message


def test_words_are_a_token_each_here_and_in_what_is_saved(tmp_path: Path) -> None:
    policy = small(words=["Is it", " a", " cow"])
    policy.save(tmp_path)
    for tokenizer in (policy.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer.encode("Is it a cow?", add_special_tokens=False)
        assert [tokenizer.decode([i]) for i in ids] == ["Is it", " a", " cow", "?"]
        assert tokenizer.decode(ids) == "Is it a cow?"
    assert max(ids) < policy.module.get_input_embeddings().weight.shape[0]


def test_a_policy_has_no_dropout() -> None:
    assert not small().module.training
    assert not small(lora=LORA).module.training


# --------------------------------------------------------------------------- what is refused
def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        pretrained(path=str(path))
    return str(error.value).replace(str(path), "DIR")


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    assert refused(tmp_path) == "model 'DIR': has no config.json; expected a directory that save_pretrained wrote, or a hub id"
    assert (
        refused(tmp_path / "no") == "model 'DIR': is no directory; expected a directory that save_pretrained wrote, or a hub id"
    )


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert refused(folder) == (
        "model 'DIR': no tokenizer could be loaded (it has no vocabulary); "
        "save one beside the model with tokenizer.save_pretrained(DIR)"
    )


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert message.startswith("model 'DIR': ")
    assert "safetensors" in message
    assert "\n" not in message


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert refused(folder).startswith("model 'DIR': ")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """transformers would draw them at random and go on."""
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = "model 'DIR': its files lack 1 weights of the model, such as model.layers.1.mlp.up_proj.weight"
    assert refused(folder) == expected
