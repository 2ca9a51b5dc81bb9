"""Tiny random checkpoints of every Mixture-of-Experts family the tests run on.

`make_checkpoint` writes what the hub would hold: one tensor per expert and projection where the family's
checkpoints look like that, transformers' reverse conversion doing the splitting. With `fused=True` it writes
transformers' own layout instead, one three-dimensional tensor per layer.

Sizes are chosen so that mistakes show: hidden 32, expert width 24 (so 2 x width differs from hidden, and a
transposed or half-swapped projection changes shape or values), 8 experts, 3 layers, dense layers first where
the family has them, expert groups where the router has groups. Rows are multiples of 16 bytes in every dtype,
which `torch._grouped_mm` wants.

Left out, with the reason:
- cohere2_moe, mistral4, mellum, flint, kolibri1, axk1, bailing_hybrid, kimi_linear, glm_moe_dsa, deepseek_v32
  and further users of the qwen2_moe, mixtral or granitemoe conversion mappings: the listed families cover the
  layouts.
- llama4, dbrx, jetmoe, doge: their experts do not use transformers' experts interface, so emoe refuses them.
- *_vl_moe, *_omni_moe, muse_spark, deepseek_ocr2: image or speech models, which AutoModelForCausalLM does not
  build.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import model_type_to_module_name

# Given to every family whose configuration has a field of that name.
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

_MLA: dict[str, Any] = {  # multi-head latent attention of the DeepSeek line
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

_GROUPS: dict[str, Any] = {
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}

_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: the settings its tiny configuration has beyond the common ones."""

    name: str
    settings: Mapping[str, Any]
    model_type: str = ""
    # The hub's layout is already one tensor per layer: `fused=True` changes names at most.
    hub_is_fused: bool = False

    def config(self, **overrides: Any) -> PretrainedConfig:
        """A tiny configuration; `overrides` win over the family's settings."""
        model_type = self.model_type or self.name
        config_class = type(AutoConfig.for_model(model_type))
        known = {field.name for field in dataclasses.fields(config_class)}
        values = {key: value for key, value in _COMMON.items() if key in known}
        return AutoConfig.for_model(model_type, **{**values, **self.settings, **overrides})


def _families(*families: Family) -> dict[str, Family]:
    return {family.name: family for family in families if _has_experts_interface(family.model_type or family.name)}


def _has_experts_interface(model_type: str) -> bool:
    """Whether the installed transformers runs the experts of these models through its interface.

    Not all of its releases since 5.17 do (aria_text came later, inkling2_text is newer).
    """
    module = model_type_to_module_name(model_type)
    source = Path(transformers.__file__).parent / "models" / module / f"modeling_{module}.py"
    return source.is_file() and "use_experts_implementation" in source.read_text()


FAMILIES: dict[str, Family] = _families(
    Family("mixtral", {"intermediate_size": 24}),
    Family("qwen2_moe", {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
    Family("qwen3_moe", {"num_experts_per_tok": 3, "norm_topk_prob": True}),
    Family("qwen3_next", {"shared_expert_intermediate_size": 40, **_LINEAR_ATTENTION}),
    Family(
        "qwen3_5_moe",
        {"shared_expert_intermediate_size": 40, **_LINEAR_ATTENTION},
        model_type="qwen3_5_moe_text",
    ),
    Family("olmoe", {"intermediate_size": 24, "num_key_value_heads": 4, "num_experts_per_tok": 3}),
    Family("flex_olmo", {"intermediate_size": 24, "num_key_value_heads": 4}),
    Family("deepseek_v2", {**_MLA, **_GROUPS, "head_dim": 8, "topk_method": "group_limited_greedy"}),
    Family("deepseek_v3", {**_MLA, **_GROUPS, "head_dim": 8}),
    Family("glm4_moe", {**_GROUPS, "use_qk_norm": True}),
    Family("glm4_moe_lite", {**_MLA, "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    Family("gpt_oss", {"intermediate_size": 24, "sliding_window": 16}, hub_is_fused=True),
    Family("phimoe", {"intermediate_size": 24}),
    Family("granitemoe", {"intermediate_size": 24}, hub_is_fused=True),
    Family("granitemoeshared", {"intermediate_size": 24, "shared_intermediate_size": 40}, hub_is_fused=True),
    Family("ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1}),
    Family("hunyuan_v1_moe", {"intermediate_size": 24, "moe_topk": 2}),
    Family("minimax_m2", {"intermediate_size": 24}),
    Family(
        "minimax",
        {"intermediate_size": 24, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    Family("lfm2_moe", {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}),
    Family("dots1", {"n_shared_experts": 1, "first_k_dense_replace": 1}),
    Family(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "moe_shared_expert_intermediate_size": 40,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
    Family(
        "jamba",
        {
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    Family("afmoe", {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 16}),
    Family("exaone_moe", {"num_shared_experts": 1, "first_k_dense_replace": 1, "sliding_window": 16}),
    Family("hy_v3", {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    Family("solar_open", {}),
    Family(
        "mimo_v2_flash",
        {
            "v_head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    Family("laguna", {"sliding_window": 16, "shared_expert_intermediate_size": 40}),
    Family("aria_text", {"intermediate_size": 24, "moe_num_experts": 8, "moe_topk": 2}, hub_is_fused=True),
    Family(
        "gemma4_text",
        {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
            "global_head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        hub_is_fused=True,
    ),
    Family(
        "inkling2_text",  # gate and up interleaved in the checkpoint, concatenated in the model
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        },
        hub_is_fused=True,
    ),
)


NOT_ASKED = {"jamba"} if Version(transformers.__version__) < Version("5.23") else set()
"""Families whose router the next gate cannot ask: with transformers 5.17 that of Jamba is no module of its own."""


def make_config(name: str, **overrides: Any) -> PretrainedConfig:
    """The tiny configuration of the family called `name`."""
    if name not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} does not run {name} through its experts interface")
    return FAMILIES[name].config(**overrides)


def make_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random float32 model of the family, the same for the same seed and settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(name, **overrides), dtype=torch.float32)
        _randomise(model)
    return model.eval()


def _randomise(model: PreTrainedModel) -> None:
    """Replace the initial values that would hide mistakes: zero biases, unit norms, uniform routing.

    Routers get logits of standard deviation about 2, so that different tokens choose different experts and
    the chosen weights differ; a selection bias is large enough to change the choice.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            leaf = name.rpartition(".")[2]
            if "e_score_correction_bias" in name or leaf == "expert_bias":
                tensor.normal_(std=0.2)
            elif leaf.endswith("bias") and "dt" not in leaf:
                tensor.normal_(std=0.1)
            elif "norm" in name and leaf == "weight" and tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
            elif _is_router(name) and tensor.ndim == 2:
                tensor.normal_(std=2.0 / math.sqrt(tensor.shape[-1]))


def _is_router(name: str) -> bool:
    """Whether the parameter is a router's projection: `...gate.weight`, `...router.weight` and their like."""
    path = name.split(".")[:-1]
    return any(part in {"gate", "router"} for part in path) and "shared" not in name


def make_checkpoint(
    name: str,
    directory: Path | str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    max_shard_size: str | int | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint of the family as safetensors and return its directory.

    `fused` writes transformers' own layout instead of the hub's. `max_shard_size` (transformers' spelling,
    for example "40KB") makes several files with an index. Further keywords change the configuration.
    """
    model = make_model(name, seed, **overrides)
    keep = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not any(part in tensor_name.split(".") for part in keep):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    extra: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, save_original_format=not fused, **extra)
    return Path(directory)


_WORDS = "add sum count of the a tell me story about two cats and dogs one four please now"


def write_tokenizer(folder: Path) -> None:
    """Give a checkpoint a tokenizer of whole words without a chat template."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *_WORDS.split()]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
