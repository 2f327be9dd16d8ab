"""Losses and gradients of DPO and Bradley-Terry against TRL's own trainers, on one batch of pairs and the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlx.data.formats import episodes
from rlx.losses.preference import bradley_terry, dpo
from rlx.models.language import LanguageModel
from rlx.models.load import tiny
from rlx.reduce import token_mean
from rlx.terms import Update, count, reduced, total
from rlx.types import Batch, Component

trl = pytest.importorskip("trl", reason="TRL is not installed; it is in the extra `dev`")

ROWS = [
    {"prompt": "one and one", "chosen": "two", "rejected": "three, I think"},
    {"prompt": "hello?", "chosen": "good morning to you", "rejected": "no"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
]
MEAN = Component("token_mean", token_mean)


def policy(seed: int) -> LanguageModel:
    return tiny(layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, seed=seed)


def batch_of(model: LanguageModel) -> Batch:
    return model.collate([model.tokenize(row) for row in episodes(ROWS, source="pairs")])


def padded(batch: Batch, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention and completion mask of the batch as TRL orders it: all chosen, then all rejected."""
    order = [*range(0, len(batch.inputs), 2), *range(1, len(batch.inputs), 2)]
    width = max(x.length for x in batch.inputs)
    ids, attend, answer = (torch.zeros(len(order), width, dtype=torch.long) for _ in range(3))
    ids += pad
    for i, x in enumerate(batch.inputs[j] for j in order):
        ids[i, : x.length], attend[i, : x.length], answer[i, x.prompt : x.length] = torch.from_numpy(x.ids), 1, 1
    return ids, attend, answer


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def arguments(kind: Any, folder: Path, **settings: Any) -> Any:
    return kind(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=len(ROWS), **settings
    )


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_equals_trl(tmp_path: Path, beta: float) -> None:
    from datasets import Dataset

    model, reference = policy(0), policy(1)
    batch = batch_of(model)
    with torch.no_grad():
        batch["ref_logp"] = reference.forward(batch, {"logp"})["logp"]
    twin = copy.deepcopy(model.module)
    args = arguments(trl.DPOConfig, tmp_path, beta=beta)
    trainer = trl.DPOTrainer(
        twin, copy.deepcopy(reference.module), args, train_dataset=Dataset.from_list(ROWS), processing_class=model.tokenizer
    )
    ids, attend, answer = padded(batch, int(model.tokenizer.pad_token_id))
    inputs = {"input_ids": ids, "attention_mask": attend, "completion_mask": answer}
    theirs = trainer.compute_loss(trainer.model.eval(), inputs)
    theirs.backward()

    term = Component("dpo", lambda *x: dpo(*x, beta=beta), reads=DPO_READS)
    ours = total(Update([term], MEAN), {**batch, **model.forward(batch, {"logp"})}, counts(batch), {})
    ours.backward()  # type: ignore[no-untyped-call]
    compare(ours, theirs, model.module, trainer.model)


def test_bradley_terry_equals_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    model = policy(0).with_heads({"score": "last"}, 0)
    assert model.heads is not None
    batch = batch_of(model)
    config = copy.deepcopy(model.module.config)
    config.num_labels = 1
    twin = AutoModelForSequenceClassification.from_config(config)
    twin.model.load_state_dict(model.backbone.state_dict())
    twin.score.load_state_dict(model.heads.linear["score"].state_dict())
    args = arguments(trl.RewardConfig, tmp_path)
    trainer = trl.RewardTrainer(twin, args, train_dataset=Dataset.from_list(ROWS), processing_class=model.tokenizer)
    ids, attend, _ = padded(batch, int(model.tokenizer.pad_token_id))
    theirs = trainer.compute_loss(trainer.model.eval(), {"input_ids": ids, "attention_mask": attend})
    theirs.backward()

    term = Component("bradley_terry", bradley_terry, reads=("score", "group", "label"))
    ours = reduced(term, {**batch, **model.forward(batch, {"score"})}, MEAN, counts(batch)["mask"])
    ours.backward()  # type: ignore[no-untyped-call]
    compare(ours, theirs, model.backbone, trainer.model.model)
    head = trainer.model.score.weight.grad
    torch.testing.assert_close(model.heads.linear["score"].weight.grad, head, atol=1e-5, rtol=0)


DPO_READS = ("logp", "ref_logp", "mask", "group", "label")


def counts(batch: Batch) -> dict[str, Any]:
    return {"mask": count(batch["mask"], batch["group"])}


def compare(ours: Tensor, theirs: Tensor, module: nn.Module, twin: nn.Module) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=0)
    found, expected = gradients(module), gradients(twin)
    assert found.keys() == expected.keys()
    assert sum(float(x.abs().sum()) for x in expected.values()) > 0
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
