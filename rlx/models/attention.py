"""Attention of rlx's own, registered with transformers: what a forward hands it besides masks says how rows are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from rlx.models.cascade import attend

if TYPE_CHECKING:
    from rlx.models.cache import SharedCache
    from rlx.models.layout import Layout

NAME = "rlx"

# What an architecture may ask of its attention that `attention` does not compute.
EXTRAS = ("sliding_window", "softcap", "s_aux", "position_bias")


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    shared: SharedCache | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query (N,H,L,D), key and value (N,K,L,D) -> (N,L,H,D).

    With `layout` it is that of packed sequences (N = 1, no mask), with `shared` that of rows which are decoded; without either,
    transformers' own `sdpa`. Raises NotImplementedError for what an architecture asks for that this does not compute.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    odd = [name for name in EXTRAS if settings.get(name) is not None]
    if odd and (layout is not None or shared is not None):
        raise NotImplementedError(f"attention {NAME!r} does not compute {', '.join(odd)}")
    if layout is not None:
        return layout.attend(query[0], key[0], value[0], scaling)[None], None
    if shared is not None and attention_mask is not None:
        return attend(query, key, value, attention_mask, scaling, shared, module.layer_idx), None
    settings |= {"dropout": dropout, "scaling": scaling}
    return cast("tuple[Tensor, None]", sdpa_attention_forward(module, query, key, value, attention_mask, **settings))


def shareable(module: Any) -> bool:
    """Whether a causal model's attention can be `attention`: text alone, each layer attends to all before, nothing on top.

    A model whose attention the user chose (eager, flash) keeps it.
    """
    config = module.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and getattr(module, "_supports_attention_backend", False)
        and config._attn_implementation in ("sdpa", NAME)
        and not config.is_encoder_decoder
        and getattr(config, "vision_config", None) is None
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attn_logit_softcapping", None)
        and not getattr(config, "final_logit_softcapping", None)  # small logits would not show it
    )


def adopt(module: Any) -> None:
    """Have a module of transformers compute its attention by `attention`, with the masks that `sdpa` takes.

    The choice stands in the config that all layers share; it is not written to disk.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    module.config._attn_implementation = NAME
