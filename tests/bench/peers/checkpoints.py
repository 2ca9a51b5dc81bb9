"""Checkpoints of less than a MiB for each family that GGUF files are written of, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY, HIDDEN, INNER, LAYERS, EXPERTS = 96, 64, 32, 2, 4
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": EXPERTS, "num_key_value_heads": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_experts": EXPERTS,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "moe_intermediate_size": INNER,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": EXPERTS, "num_key_value_heads": 2, "sliding_window": None},
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {"num_local_experts": EXPERTS, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16},
    ),
}


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save a tiny model of `family` with no two equal parameters to `folder`, and return it."""
    config_class, model_class, own = FAMILIES[family]
    config = config_class(**(_SIZES | own | changes), dtype=dtype)
    model = model_class(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5))
    model.to(dtype).eval().save_pretrained(folder)
    return model
