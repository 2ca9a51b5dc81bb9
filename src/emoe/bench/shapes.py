"""The shape of a Mixture-of-Experts model: sizes and settings, what its config.json says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["olmoe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"]
"""How a family names its tensors, and which attention it has."""

BYTES = 2
"""Of one weight: all shapes are bfloat16."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes. `model` is the repository that published it, "" for one that nobody did; `inner` is the width of
    one expert, `settings` what else its config.json says.

    `dense_layers` first layers have a plain MLP of `dense_inner` in place of experts; `shared` experts run for every
    token beside the routed ones. Attention is `heads` x `head_dim` with `kv_heads`; deepseek_v2 takes its own sizes
    from `settings`.
    """

    name: str
    model: str
    layout: Layout
    hidden: int
    layers: int
    experts: int
    inner: int
    top_k: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    settings: dict[str, Any] = field(default_factory=dict)
    dense_layers: int = 0
    dense_inner: int = 0
    shared: int = 0

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert, biases included."""
        biases = 2 * self.inner + self.hidden if self.layout == "gpt_oss" else 0
        return (3 * self.hidden * self.inner + biases) * BYTES

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts that are routed to."""
        return len(self.moe_layers) * self.experts * self.expert_nbytes

    @property
    def moe_layers(self) -> range:
        """Numbers of the decoder layers that have experts."""
        return range(self.dense_layers, self.layers)

    def config(self) -> dict[str, Any]:
        """config.json."""
        common: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts_per_tok": self.top_k,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "dtype": "bfloat16",
        }
        return _OWN[self.layout](self) | common | self.settings


def _olmoe(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "intermediate_size": shape.inner,
        "num_experts": shape.experts,
        "norm_topk_prob": False,
        "attention_bias": False,
        "clip_qkv": None,
        "rope_scaling": None,
    }


def _qwen3_moe(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": shape.inner,
        "num_experts": shape.experts,
        "head_dim": shape.head_dim,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def _mixtral(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": shape.inner,
        "num_local_experts": shape.experts,
        "head_dim": shape.head_dim,
        "sliding_window": None,
    }


def _gpt_oss(shape: Shape) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": shape.inner,
        "num_local_experts": shape.experts,
        "experts_per_token": shape.top_k,
        "head_dim": shape.head_dim,
        "attention_bias": True,
        "layer_types": [kinds[layer % 2] for layer in range(shape.layers)],
        "swiglu_limit": 7.0,
    }


def _deepseek_v2(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "intermediate_size": shape.dense_inner,
        "moe_intermediate_size": shape.inner,
        "n_routed_experts": shape.experts,
        "n_shared_experts": shape.shared,
        "first_k_dense_replace": shape.dense_layers,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
        "q_lora_rank": None,
    }


_OWN = {
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
}
