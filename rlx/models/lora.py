"""The settings of a LoRA adapter that a recipe may give: those of peft's LoraConfig that mean something here."""

from __future__ import annotations

from typing import TypedDict


class Lora(TypedDict, total=False):
    """Low-rank adapters W + (lora_alpha / r) B A (Hu et al. 2021, arXiv 2106.09685); what is not given is peft's default."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str] | str
    exclude_modules: list[str] | str
    modules_to_save: list[str]
    layers_to_transform: list[int] | int
    bias: str
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
