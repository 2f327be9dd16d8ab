"""VisionLanguage: images in prompts, in the rollout and in the training forward, against the model's own processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from rlx.models.language import LanguageModel
from rlx.models.load import finish, outline, pretrained, shrunken
from rlx.models.tiny_vlm import tiny_vlm
from rlx.models.tokenizer import IMAGE, TEMPLATE, byte_tokenizer
from rlx.models.vision import VisionLanguage
from rlx.rollout.native import generate
from rlx.types import Component, ConfigError, DataError, Episode, Image, Message, Sampling, Status, Task, Turn, View

SIZES = ((24, 24), (16, 32), (8, 8))


def images(seed: int = 0) -> list[Image]:
    """Random pictures of three sizes."""
    rng = np.random.default_rng(seed)
    return [Image(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def loud(policy: Any) -> VisionLanguage:
    """A policy whose weights are large enough for its distributions to be far from uniform."""
    with torch.no_grad():
        for weight in policy.module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    policy.engine = generate
    assert isinstance(policy, VisionLanguage)
    return policy


def llava() -> VisionLanguage:
    """The tiny model: every image is resized to the same nine features."""
    torch.manual_seed(0)
    return loud(tiny_vlm(layers=2, hidden=32, heads=2, ffn=64, vision_hidden=16, words=[" red", "nothing"]))


def paddle() -> VisionLanguage:
    """Another architecture: features in number as the image is large, and positions in time, height and width."""
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    tokenizer = byte_tokenizer(images=True)
    tokenizer.add_tokens(["<|video|>", "<|begin|>", "<|close|>"], special_tokens=True)
    tokenizer.image_token, tokenizer.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)
    tokenizer.chat_template = TEMPLATE.replace(IMAGE, f"<|begin|>{IMAGE}<|close|>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = transformers.PaddleOCRVLConfig(
        text_config={
            **sizes,
            **ends,
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": rope,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 4, "spatial_merge_size": 2},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|begin|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|close|>"),
    )
    torch.manual_seed(0)
    module = transformers.PaddleOCRVLForConditionalGeneration(config)
    pictures = PaddleOCRVLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    processor = transformers.PaddleOCRVLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    return loud(finish(module, processor, dtype="fp32", lora=None, device="cpu", seed=0, source="paddle"))


MODELS = {"llava": llava, "paddle": paddle}


@pytest.fixture(scope="module", params=MODELS)
def policy(request: pytest.FixtureRequest) -> VisionLanguage:
    return MODELS[request.param]()


def conversations() -> list[tuple[Message, ...]]:
    """Prompts with one image, with two, and with none."""
    a, b, c = images()
    return [
        (Message("user", (a, "What?")),),
        (Message("user", ("And this: ", b)),),
        (Message("system", "Look."), Message("user", (c, "a", a, " b?"))),
        (Message("user", "No picture."),),
    ]


def played(policy: VisionLanguage, talks: list[tuple[Message, ...]], sampling: Sampling) -> list[Episode]:
    """Three samples of each prompt."""
    views = [View(policy.render(talk), tuple(i for m in talk for i in m.images)) for talk in talks]
    turns = policy.act(views, [[3 * k + j for j in range(3)] for k in range(len(talks))], sampling)
    return [Episode(Task(talk), k, [t]) for k, (talk, row) in enumerate(zip(talks, turns, strict=True)) for t in row]


def own_forward(policy: VisionLanguage, episode: Episode) -> Tensor:
    """log-probs of the ids of an episode's one turn, by the model alone on what its processor makes of the conversation."""
    parts = [(m, [m.content] if isinstance(m.content, str) else list(m.content)) for m in episode.task.prompt]
    talk = [
        {
            "role": m.role,
            "content": [{"type": "image"} if isinstance(p, Image) else {"type": "text", "text": p} for p in content],
        }
        for m, content in parts
    ]
    text = policy.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    pictures = [i.pixels for m in episode.task.prompt for i in m.images] or None
    read = policy.processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=False)
    (turn,) = episode.turns
    assert read["input_ids"][0].tolist() == turn.seen.tolist()
    read["input_ids"] = torch.cat([read["input_ids"], torch.from_numpy(turn.did)[None]], 1)
    read["attention_mask"] = torch.ones_like(read["input_ids"])
    if "mm_token_type_ids" in read:
        read["mm_token_type_ids"] = torch.tensor(policy.processor.create_mm_token_type_ids(read["input_ids"].tolist()))
        policy.backbone.rope_deltas = None
    with torch.no_grad():
        logits = policy.module(**read).logits[0, len(turn.seen) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(turn.did)[:, None])[:, 0]


# --------------------------------------------------------------------------- messages -> tokens
def test_an_image_stands_as_its_placeholders_by_hand() -> None:
    policy = llava()
    user, assistant = (policy.tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant"))
    a, b = images()[:2]
    (question,) = policy._ids("a red?")
    assert policy.pieces(question) == ["a", " red", "?"]
    one = policy.render([Message("user", (a, "a red?"))])
    assert one.tolist() == [user, *[policy.placeholder] * 9, *question, assistant]
    two = policy.render([Message("user", (a, b, "a red?", a))])
    assert two.tolist() == [user, *[policy.placeholder] * 18, *question, *[policy.placeholder] * 9, assistant]


def test_demonstrations_are_tokenised_as_they_are_sampled(policy: VisionLanguage) -> None:
    a, b, _ = images()
    none = np.zeros(0, np.int64)
    prompt, replies = (Message("user", (a, "What?")),), (Message("user", ("And this: ", b)),)
    turns = [Turn(none, none, np.zeros(0, np.float32), Message("assistant", text)) for text in ("one", "two")]
    turns[0].replies = replies
    made = policy.tokenize(Episode(Task(prompt), 0, turns, Status.FINISHED, label=1.0))
    assert made.turns[0].seen.tolist() == policy.render(prompt).tolist()
    talk = [*prompt, Message("assistant", "one"), *replies]
    assert made.turns[1].seen.tolist() == policy.extension(talk, 1).tolist()
    assert (made.turns[1].seen == policy.placeholder).sum() == len(policy.encode(b)[0])
    (tokens,) = policy.collate([made]).inputs
    assert tokens.images == (a, b)


def test_text_that_holds_the_placeholder_is_refused(policy: VisionLanguage) -> None:
    with pytest.raises(DataError, match="a text holds"):
        policy.render([Message("user", f"What is {IMAGE}?")])


def test_each_image_of_a_row_of_placeholders_is_used_up() -> None:
    policy = llava()
    a, b, c = images()
    ids = np.array([policy.placeholder, policy.placeholder, 70, policy.placeholder], np.int64)
    made, left = policy.expanded(ids, [a, b, c, a, b])
    assert made.tolist() == [policy.placeholder] * 18 + [70] + [policy.placeholder] * 9
    assert left == [a, b]


def test_a_template_that_leaves_images_out_is_refused() -> None:
    policy = llava()
    a, b, _ = images()
    policy.tokenizer.chat_template = TEMPLATE.replace(IMAGE, "")
    none = np.zeros(0, np.int64)
    prompt = (Message("user", (a, b, "What?")),)
    said = Turn(none, none, np.zeros(0, np.float32), Message("assistant", "one"))
    wanted = "its chat template shows no image where {} of the messages' stand"
    with pytest.raises(DataError, match=wanted.format(2)):
        policy.render(prompt)
    with pytest.raises(DataError, match=wanted.format(2)):
        policy.tokenize(Episode(Task(prompt), 0, [said], Status.FINISHED))
    with pytest.raises(DataError, match=wanted.format(1)):
        policy.extension([Message("user", "?"), Message("assistant", "one"), Message("user", (a,))], 1)
    assert policy.tokenize(Episode(Task(prompt), 0)).turns == []


# --------------------------------------------------------------------------- rollout and training
def test_a_rollout_goes_on_right_after_an_image(policy: VisionLanguage) -> None:
    """Positions of an image are in time, height and width; what follows stands after the largest of the three."""
    a = images()[0]
    talk = (Message("user", (a, "What?")),)
    ids = policy.render(talk)
    ids = ids[: np.flatnonzero(ids == policy.placeholder)[-1] + 1]
    (turns,) = policy.act([View(ids, (a,))], [[0, 1, 2]], Sampling(8))
    batch = policy.collate([Episode(Task(talk), 0, [turn]) for turn in turns])
    with torch.no_grad():
        logp = policy.forward(batch, {"logp"})["logp"]
    torch.testing.assert_close(logp[batch["mask"]], batch["rollout_logp"][batch["mask"]], atol=1e-5, rtol=0)


def test_an_image_in_the_reply_to_the_last_turn_is_read_by_nobody(policy: VisionLanguage) -> None:
    a, b, _ = images()
    first, *others = played(policy, [(Message("user", (a, "What?")),)], Sampling(6))
    with torch.no_grad():
        wanted = policy.forward(policy.collate([first, *others]), {"logp"})["logp"]
        first.turns[-1].replies = (Message("user", ("It was this: ", b)),)
        batch = policy.collate([first, *others])
        torch.testing.assert_close(policy.forward(batch, {"logp"})["logp"], wanted, atol=1e-5, rtol=0)
    assert [x.images for x in batch.inputs] == [(a,)] * 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_training_forward_equals_the_rollout(policy: VisionLanguage, temperature: float) -> None:
    batch = policy.collate(played(policy, conversations(), Sampling(12, temperature)))
    with torch.no_grad():
        out = policy.forward(batch, {"logp", "entropy"}, temperature)
    mask = batch["mask"]
    assert float(out["logp"][mask].std()) > 0.5
    torch.testing.assert_close(out["logp"][mask], batch["rollout_logp"][mask], atol=1e-5, rtol=0)
    assert bool(out["entropy"].isfinite().all())


def test_the_training_forward_equals_the_models_own(policy: VisionLanguage) -> None:
    episodes = played(policy, conversations(), Sampling(12))
    with torch.no_grad():
        logp = policy.forward(policy.collate(episodes), {"logp"})["logp"]
    for episode, row in zip(episodes, logp, strict=True):
        torch.testing.assert_close(row[: episode.num_tokens], own_forward(policy, episode), atol=1e-5, rtol=0)


def test_the_image_is_looked_at(policy: VisionLanguage) -> None:
    a, other = images()[0], images(seed=1)[0]
    (episode,) = played(policy, [(Message("user", (a, "What?")),)], Sampling(6))[:1]
    swapped = Episode(Task((Message("user", (other, "What?")),)), 0, episode.turns)
    with torch.no_grad():
        logp = policy.forward(policy.collate([episode, swapped]), {"logp"})["logp"]
    assert float((logp[0] - logp[1]).abs().max()) > 1e-2


def test_a_batch_gives_what_each_sequence_gives_alone_and_the_same_gradients() -> None:
    policy = llava()
    episodes = played(policy, conversations(), Sampling(8))
    together = policy.collate(episodes)
    grads = []
    for batches in ([together], [policy.collate([e]) for e in episodes]):
        policy.module.zero_grad()
        for batch in batches:
            (policy.forward(batch, {"logp"})["logp"] * batch["mask"]).sum().backward()
        grads.append({n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None})
    assert {"model.vision_tower", "model.multi_modal_projector"} <= {".".join(n.split(".")[:2]) for n in grads[0]}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_samples_of_a_prompt_share_one_look_at_its_image() -> None:
    policy = llava()
    looks: list[int] = []
    hook = policy.module.model.vision_tower.register_forward_hook(lambda module, args, out: looks.append(len(out[0])))
    episodes = played(policy, conversations()[:1], Sampling(4))
    policy.forward(policy.collate(episodes), {"logp"})
    hook.remove()
    assert looks == [1, 1]


def test_the_policy_never_says_a_placeholder() -> None:
    policy = llava()
    with torch.no_grad():  # what would be said nearly always
        policy.module.get_output_embeddings().weight[policy.placeholder] = 0.0
        policy.module.get_output_embeddings().weight.mul_(0.001)
    episodes = played(policy, conversations(), Sampling(60))
    assert not any((t.did == policy.placeholder).any() for e in episodes for t in e.turns)
    with torch.no_grad():
        entropy = policy.forward(policy.collate(episodes), {"entropy"})["entropy"]
    assert float(entropy[0, 0]) == pytest.approx(np.log(len(policy.tokenizer) - 1), abs=1e-3)


def test_a_head_reads_states_that_have_seen_the_image() -> None:
    policy = llava()
    policy.with_heads({"value": "token"}, seed=0)
    a, other = images()[0], images(seed=1)[0]
    (episode,) = played(policy, [(Message("user", (a, "What?")),)], Sampling(6))[:1]
    swapped = Episode(Task((Message("user", (other, "What?")),)), 0, episode.turns)
    batch = policy.collate([episode, swapped])
    with torch.no_grad():
        alone = policy.forward(batch, {"value"})["value"]
        both = policy.forward(batch, {"value", "logp"})["value"]
    torch.testing.assert_close(alone, both, atol=1e-5, rtol=1e-5)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-3


# --------------------------------------------------------------------------- to disk and back
def test_a_directory_is_read_back_with_its_processor(tmp_path: Path) -> None:
    policy = llava()
    policy.save(tmp_path / "model")
    again = pretrained(path=str(tmp_path / "model"))
    assert isinstance(again, VisionLanguage)
    episodes = played(policy, conversations(), Sampling(8))
    batch = policy.collate(episodes)
    assert [again.render(e.task.prompt).tolist() for e in episodes] == [e.turns[0].seen.tolist() for e in episodes]
    with torch.no_grad():
        torch.testing.assert_close(again.forward(batch, {"logp"})["logp"], policy.forward(batch, {"logp"})["logp"])


def test_a_directory_works_with_transformers_alone(tmp_path: Path) -> None:
    policy = llava()
    policy.save(tmp_path / "model")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    module = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    read = processor(text=text, images=images()[0].pixels, return_tensors="pt", add_special_tokens=False)
    said = module.generate(**read, max_new_tokens=6, do_sample=False)[0, read["input_ids"].shape[1] :]
    view = View(policy.render([Message("user", (images()[0], "What?"))]), (images()[0],))
    ((turn,),) = policy.act([view], [[0]], Sampling(6, temperature=0.0))
    assert turn.did.tolist() == said.tolist()[: len(turn.did)]


def test_a_directory_without_its_processor_says_so(tmp_path: Path) -> None:
    llava().save(tmp_path / "model")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(ConfigError, match="no processor of images and text could be loaded"):
        pretrained(path=str(tmp_path / "model"))


def test_shrunken_and_outlined(tmp_path: Path) -> None:
    component: Component[Any] = Component("tiny_vlm", tiny_vlm, settings={"layers": 3, "vision_layers": 3, "hidden": 48})
    small, real = shrunken(component), outline(component)
    assert isinstance(small, VisionLanguage)
    assert small.module.config.get_text_config().num_hidden_layers == 2
    assert real.module.device == torch.device("meta")
    assert real.render(conversations()[0]).tolist() == small.render(conversations()[0]).tolist()
    tiny_vlm(layers=3, vision_layers=3, hidden=32, heads=2).save(tmp_path / "model")
    read: Component[Any] = Component("pretrained", pretrained, settings={"path": str(tmp_path / "model")})
    cut = shrunken(read).module.config
    assert (cut.get_text_config().num_hidden_layers, cut.vision_config.num_hidden_layers) == (2, 2)


def test_lora_trains_an_adapter(tmp_path: Path) -> None:
    policy = tiny_vlm(layers=1, hidden=32, heads=2, ffn=64, lora={"r": 2, "target_modules": ["q_proj"]})
    policy.engine = generate
    episodes = played(policy, conversations(), Sampling(4))  # type: ignore[arg-type]
    batch = policy.collate(episodes)
    policy.forward(batch, {"logp"})["logp"].sum().backward()
    assert all("lora" in name for name, p in policy.module.named_parameters() if p.grad is not None)
    policy.save(tmp_path / "model")
    assert isinstance(pretrained(path=str(tmp_path / "model")), LanguageModel)


def test_words_are_tokens_of_their_own() -> None:
    tokenizer = byte_tokenizer([" red circle", " red", " ."])
    text = "a red circle . red"
    ids = tokenizer(text)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["a", " red circle", " .", " red"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
