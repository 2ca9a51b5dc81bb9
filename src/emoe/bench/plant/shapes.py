"""Published Mixture-of-Experts models as sizes and settings: what a planted checkpoint's config.json says.

Every number is the published one (the config.json of the repository named beside it), but for the vocabulary, which a
planted checkpoint cuts to what its tokens need, and the number of layers, which may be cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from emoe.errors import UsageError

Layout = Literal["olmoe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"]
"""How a family names its tensors, and which attention it has."""

VOCABULARY_STEP = 64
"""Vocabularies are cut to a multiple of this."""

BYTES = 2
"""Of one weight: all published shapes are bfloat16."""


@dataclass(frozen=True, slots=True)
class PublishedShape:
    """A model's published sizes. `inner` is the width of one expert, `settings` what else its config.json says.

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
    def expert_bytes(self) -> int:
        """Bytes of one expert, biases included."""
        biases = 2 * self.inner + self.hidden if self.layout == "gpt_oss" else 0
        return (3 * self.hidden * self.inner + biases) * BYTES

    @property
    def moe_layers(self) -> range:
        """Numbers of the decoder layers that have experts."""
        return range(self.dense_layers, self.layers)

    def config(self, vocabulary: int) -> dict[str, Any]:
        """config.json, with another vocabulary."""
        common: dict[str, Any] = {
            "vocab_size": vocabulary,
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
            "torch_dtype": "bfloat16",
        }
        return _OWN[self.layout](self) | common | self.settings


def _olmoe(shape: PublishedShape) -> dict[str, Any]:
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


def _qwen3_moe(shape: PublishedShape) -> dict[str, Any]:
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


def _mixtral(shape: PublishedShape) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": shape.inner,
        "num_local_experts": shape.experts,
        "sliding_window": None,
    }


def _gpt_oss(shape: PublishedShape) -> dict[str, Any]:
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


def _deepseek_v2(shape: PublishedShape) -> dict[str, Any]:
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

_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"}

_FULL = (
    PublishedShape(
        "olmoe-1b-7b", "allenai/OLMoE-1B-7B-0924", "olmoe", 2048, 16, 64, 1024, 8, 50304,
        heads=16, kv_heads=16, head_dim=128,
        settings={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    ),
    PublishedShape(
        "gpt-oss-20b", "openai/gpt-oss-20b", "gpt_oss", 2880, 24, 32, 2880, 4, 201088,
        heads=64, kv_heads=8, head_dim=64,
        settings={
            "max_position_embeddings": 131072,
            "initial_context_length": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": _YARN | {"factor": 32.0, "truncate": False},
            "sliding_window": 128,
        },
    ),
    PublishedShape(
        "qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3_moe", 2048, 48, 128, 768, 8, 151936,
        heads=32, kv_heads=4, head_dim=128,
        settings={
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        },
    ),
    PublishedShape(
        "mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", "mixtral", 4096, 32, 8, 14336, 2, 32000,
        heads=32, kv_heads=8, head_dim=128,
        settings={"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
    ),
    PublishedShape(
        "deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite", "deepseek_v2", 2048, 27, 64, 1408, 6, 102400,
        heads=16, kv_heads=16, head_dim=192, dense_layers=1, dense_inner=10944, shared=2,
        settings={
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 163840,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": _YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
)  # fmt: skip


def _tiny(shape: PublishedShape, **sizes: Any) -> PublishedShape:
    """The same layout, small enough for tests."""
    small = {
        "hidden": 64, "layers": 3, "experts": 8, "inner": 96, "top_k": 2, "heads": 4, "kv_heads": 2, "head_dim": 16
    }  # fmt: skip
    return replace(shape, name=f"tiny-{shape.layout.replace('_', '-')}", **(small | sizes))


_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}

_TINY = {
    "olmoe": {},
    "gpt_oss": {},
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v2": {"kv_heads": 4, "head_dim": 24, "dense_inner": 128},
}

PUBLISHED: dict[str, PublishedShape] = {
    shape.name: shape
    for shape in (
        *_FULL,
        *(
            _tiny(
                shape,
                settings=shape.settings | (_LATENT if shape.layout == "deepseek_v2" else {}),
                **_TINY[shape.layout],
            )
            for shape in _FULL
        ),
    )
}
"""Shapes by name; those called tiny-... have a published layout and are for tests."""


def published(name: str, layers: int | None = None) -> PublishedShape:
    """The shape called `name`, cut to its first `layers`.

    Raises:
        UsageError: no such shape, or it has not that many layers.
    """
    if name not in PUBLISHED:
        raise UsageError(f"no published shape is called {name!r}; use one of {', '.join(PUBLISHED)}")
    shape = PUBLISHED[name]
    if layers is None:
        return shape
    if not shape.dense_layers < layers <= shape.layers:
        raise UsageError(f"{name} has {shape.layers} layers, so layers must be {shape.dense_layers + 1} to "
                         f"{shape.layers}, not {layers}")  # fmt: skip
    return replace(shape, layers=layers)


def vocabulary_for(tokens: int) -> int:
    """The smallest vocabulary that is written for so many tokens."""
    return -(-tokens // VOCABULARY_STEP) * VOCABULARY_STEP
