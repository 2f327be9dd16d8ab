"""From a model's settings to its weights and tokenizer: the built-in tiny decoder, or any directory or hub id."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from rlx.models.language import LanguageModel
from rlx.models.lora import Lora
from rlx.models.nets import is_net, read_net
from rlx.models.packed import packable
from rlx.models.recompute import recompute
from rlx.models.seq2seq import Seq2Seq
from rlx.models.tokenizer import byte_tokenizer
from rlx.models.vision import VisionLanguage
from rlx.types import Component, ConfigError, Model

Dtype = Literal["fp32", "bf16"]

# The sizes of a model that only has to run, as in conf/scale/smoke.yaml.
SMALL = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64}


def tiny(
    *,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 4,
    ffn: int = 512,
    words: list[str] | None = None,
    context: int = 1024,
    init: float = 0.02,
    dtype: Dtype = "fp32",
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> LanguageModel:
    """A small decoder of the Qwen2 architecture with random weights (drawn from `seed`).

    The tokenizer is that of bytes, with `words` as tokens of their own. `init` is the standard deviation of the first weights:
    0.02 is that of large models, with which a small one attends to everything alike for long; hidden ** -0.5 is not.
    """
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer = byte_tokenizer(words or [])
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        initializer_range=init,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForCausalLM.from_config(config)
    return finish(
        module, tokenizer, dtype=dtype, lora=lora, device=device, seed=seed, source="tiny", recomputes=activation_checkpointing
    )


def tiny_t5(
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    ffn: int = 128,
    dtype: Dtype = "fp32",
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> LanguageModel:
    """A small encoder-decoder of the T5 architecture: `layers` on each side, random weights, no dropout, byte tokenizer."""
    from transformers import AutoModelForSeq2SeqLM, T5Config

    tokenizer = byte_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden,
        d_kv=hidden // heads,
        d_ff=ffn,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = AutoModelForSeq2SeqLM.from_config(config)
    return finish(
        module,
        tokenizer,
        dtype=dtype,
        lora=lora,
        device=device,
        seed=seed,
        source="tiny_t5",
        recomputes=activation_checkpointing,
    )


tiny_t5.mixes = False  # type: ignore[attr-defined]  # see check_mixes in rlx/plan.py


def pretrained(
    *,
    path: str,
    dtype: Dtype = "fp32",
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa",
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> LanguageModel:
    """Any language model of transformers: a `save_pretrained` directory or a hub id, safetensors only.

    Its own configuration says whether it is an encoder-decoder, a vision-language or a causal model.

    `dtype: bf16` computes in bfloat16 and keeps the trained weights and the optimiser in float32, because an AdamW step
    at a learning rate of 1e-6 is lost in a bfloat16 weight.

    `activation_checkpointing` (any model takes it) keeps each layer's input alone for the backward pass, which computes the
    layer once more: less memory for a third more time.
    """
    from safetensors import SafetensorError

    where = place(path)
    config, processor = read_config(path, trust_remote_code=trust_remote_code)
    try:
        module, found = architecture(config).from_pretrained(
            where,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model {path!r}: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(f"model {path!r}: its files lack {len(missing)} weights of the model, such as {missing[0]}")
    return finish(
        module, processor, dtype=dtype, lora=lora, device=device, seed=seed, source=path, recomputes=activation_checkpointing
    )


def read(
    path: str,
    settings: Mapping[str, Any],
    seed: int,
    *,
    lora: Lora | None = None,
    add_tokens: Sequence[str] = (),
    heads: Mapping[str, str] | None = None,
) -> Any:
    """A model of a directory or hub id, with those of the recipe's `settings` that any pretrained model takes.

    `add_tokens` get rows of the mean of the others in both embeddings. `heads` start from the directory's own. A directory
    of a small network is read as one.
    """
    if is_net(Path(path).expanduser()):
        return read_net(Path(path).expanduser(), str(settings.get("device", "cpu"))).with_heads(dict(heads or {}), seed)
    shared = set(inspect.signature(pretrained).parameters) - {"path", "seed"}
    given = {k: v for k, v in settings.items() if k in shared}
    policy = pretrained(path=path, seed=seed, **{**given, **({"lora": lora} if lora is not None else {})})
    if add_tokens and policy.tokenizer.add_tokens(list(add_tokens), special_tokens=True):
        policy.module.resize_token_embeddings(len(policy.tokenizer), mean_resizing=True)
    folder = Path(path).expanduser()
    return policy.with_heads(dict(heads or {}), seed, folder if folder.is_dir() else None)


def shrunken(component: Component[Model]) -> Any:
    """The tokenizer and architecture of a model with two layers and random weights.

    A model of rlx's own becomes narrow, too. Of a pretrained one, all other sizes stay; its weights are neither read nor
    fetched.
    """
    if component.name == "pretrained":
        return unread(**component.settings, layers=2)
    build = maker(component)
    small = {size: value for size, value in SMALL.items() if size in inspect.signature(build).parameters}
    return build(**{**component.settings, **small})


def outline(component: Component[Model]) -> Any:
    """A model in its real size without its weights: tensors on torch's meta device have a shape and no memory."""
    settings = {**component.settings, "device": "meta"}
    with torch.device("meta"):
        return unread(**settings) if component.name == "pretrained" else maker(component)(**settings)


def maker(component: Component[Model]) -> Any:
    """The function that makes a model of rlx's own, without the settings that are bound to it."""
    return getattr(component.call, "func", component.call)


def unread(
    *,
    path: str,
    layers: int | None = None,
    dtype: Dtype = "fp32",
    attention: str = "sdpa",
    lora: Lora | None = None,
    activation_checkpointing: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> LanguageModel:
    """`pretrained` with weights drawn from `seed` instead of read, and with its first `layers` layers alone."""

    config, processor = read_config(path, trust_remote_code=trust_remote_code)
    try:
        for part in (config.get_text_config(), getattr(config, "vision_config", None)):
            depth = "depth" if hasattr(part, "depth") else "num_hidden_layers"
            if layers is not None and part is not None and getattr(part, depth) > layers:
                setattr(part, depth, layers)
                if getattr(part, "layer_types", None):
                    part.layer_types = part.layer_types[:layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = architecture(config).from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {path!r}: {first_line(error)}") from error
    return finish(
        module, processor, dtype=dtype, lora=lora, device=device, seed=seed, source=path, recomputes=activation_checkpointing
    )


def architecture(config: Any) -> Any:
    """The class of transformers that makes a model that writes text, for this configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if sees(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def sees(config: Any) -> bool:
    """Whether a model reads images."""
    return getattr(config, "vision_config", None) is not None


def place(path: str) -> str:
    """A directory, or a hub id. Raises ConfigError where a directory is meant and holds no model."""
    looks_local = path.startswith((".", "/", "~")) or Path(path).expanduser().exists()
    where = str(Path(path).expanduser()) if looks_local else path
    if looks_local and not (Path(where) / "config.json").is_file():
        what = "is no directory" if not Path(where).is_dir() else "has no config.json"
        raise ConfigError(f"model {path!r}: {what}; expected a directory that save_pretrained wrote, or a hub id")
    return where


def read_config(path: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model's configuration, and what reads its input: the tokenizer, or where it sees the processor that holds one.

    Raises ConfigError.
    """
    from transformers import AutoConfig, AutoProcessor

    where = place(path)
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model {path!r}: {first_line(error)}") from error
    if not sees(config):
        return config, read_tokenizer(path, trust_remote_code=trust_remote_code)
    try:
        return config, AutoProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model {path!r}: no processor of images and text could be loaded ({first_line(error)})") from error


def read_tokenizer(path: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer beside a model. Raises ConfigError."""
    from transformers import AutoTokenizer

    where = place(path)
    advice = "save one beside the model with tokenizer.save_pretrained(DIR)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(f"model {path!r}: no tokenizer could be loaded ({first_line(error)}); {advice}") from error
    if not tokenizer.encode("1", add_special_tokens=False):  # without its files, transformers makes an empty one
        raise ConfigError(f"model {path!r}: no tokenizer could be loaded (it has no vocabulary); {advice}")
    return tokenizer


def finish(
    module: Any,
    processor: Any,
    *,
    dtype: Dtype,
    lora: Lora | None,
    device: str,
    seed: int,
    source: str,
    recomputes: bool = False,
) -> LanguageModel:
    """Adapter (drawn from `seed`), device and padding token, the same for every way of making a model.

    The module stays in eval mode: without dropout, the policy that is trained is the one that samples. `processor` is the
    tokenizer, or what holds it.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model {source!r}: its tokenizer has no end-of-sequence token, so no answer would ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        if lora.get("lora_dropout"):
            raise ConfigError("model.lora.lora_dropout: rlx trains without dropout; leave it out")
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                kind = "SEQ_2_SEQ_LM" if module.config.is_encoder_decoder else "CAUSAL_LM"
                module = get_peft_model(module, LoraConfig(task_type=kind, **lora))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.lora: {first_line(error)}") from error
    if recomputes:
        recompute(module, source)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    made = VisionLanguage if sees(module.config) else Seq2Seq if module.config.is_encoder_decoder else LanguageModel
    policy = made(module.to(where).eval(), processor, where, bf16=dtype == "bf16", source=source)
    policy.recomputes = recomputes
    policy.packs = where.type != "meta" and made is LanguageModel and packable(policy)
    module.generation_config.eos_token_id = policy.end_ids  # a saved checkpoint ends its answers where they ended here
    return policy


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
