"""Published Mixture-of-Experts models that checkpoints can be planted of.

Every number is the published one (the config.json of the repository named beside it), but for the vocabulary, which a
planted checkpoint cuts to what its tokens need, and the number of layers, which may be cut.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from emoe.bench.shapes import Shape
from emoe.errors import UsageError

VOCABULARY_STEP = 64
"""Vocabularies are cut to a multiple of this."""

_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"}

_FULL = (
    Shape(
        "olmoe-1b-7b", "allenai/OLMoE-1B-7B-0924", "olmoe", 2048, 16, 64, 1024, 8, 50304,
        heads=16, kv_heads=16, head_dim=128,
        settings={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    ),
    Shape(
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
    Shape(
        "qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "qwen3_moe", 2048, 48, 128, 768, 8, 151936,
        heads=32, kv_heads=4, head_dim=128,
        settings={
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
        },
    ),
    Shape(
        "mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", "mixtral", 4096, 32, 8, 14336, 2, 32000,
        heads=32, kv_heads=8, head_dim=128,
        settings={"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0},
    ),
    Shape(
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


def _tiny(shape: Shape, **sizes: Any) -> Shape:
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

PUBLISHED: dict[str, Shape] = {
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


def published(name: str, layers: int | None = None) -> Shape:
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
