"""What a pass makes, from the shapes of a decoder layer's dense tensors: the widths that `activations` counts with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from emoe.planner.facts import SCORES_BLOCK_BYTES, Activations, CacheLayer, ExpertLayer
from emoe.planner.tensors import DenseLayer, stated

_SINKS = ("sinks", "attention_sink_bias")  # attention that emoe.kernels.sinks computes


def activations_of(
    config: Mapping[str, Any],
    layers: Sequence[DenseLayer],
    cache: Sequence[CacheLayer],
    experts: Sequence[ExpertLayer],
    itemsize: int,
) -> Activations:
    """What a pass makes beside the experts. The factors bound what was measured on CPU runs of every family."""
    hidden = stated(config, "hidden_size")
    projections = max(_projections(layer) for layer in layers)
    # A norm makes three float32 copies of the stream; a block holds it twice, and half of its projections' outputs
    # once more (rotary positions, the activation).
    token = 3 * 4 * hidden + itemsize * (2 * hidden + projections + projections // 2)
    token = max(token, *(itemsize * max(_attention(config, layer, hidden), _mlp(layer, hidden)) for layer in layers))
    if any(layer.find("linear_attn.conv1d.weight") for layer in layers):
        # The chunked delta rule in float32: a dozen tensors of keys and values, some of 64 x 64 within each chunk.
        size = max(stated(config, "linear_key_head_dim"), stated(config, "linear_value_head_dim"))
        token += 4 * stated(config, "linear_num_value_heads") * (12 * size + 4 * 64)
    heads = stated(config, "num_attention_heads")
    sinks = any(name.endswith(_SINKS) for layer in layers for name in layer.shapes)
    latent = any(layer.kind == "latent" for layer in cache)
    # Sinks need no scores where keys and values are of one size.
    unequal = config.get("v_head_dim", config.get("head_dim")) != config.get("head_dim")
    pair = (10 if latent else 8 if sinks and unequal else 0) * heads
    masked = config.get("sliding_window") is not None
    return Activations(
        hidden,
        stated(config, "vocab_size"),
        _expert_inner(experts, hidden, itemsize),
        token,
        pair,
        masked,
        SCORES_BLOCK_BYTES if sinks and not latent else 0,
        *_native(config, layers, hidden, itemsize),
    )


FLOAT32_POSITIONS = {"ernie4_5_moe", "flex_olmo"}
"""Families that turn positions in float32."""


def _attention(config: Mapping[str, Any], layer: DenseLayer, hidden: int) -> int:
    """Numbers for each token in a layer's attention at its fullest moment as torch computes it; 0 where it has no
    projections to queries, keys and values.

    The stream is there twice. Where positions are turned, queries are there four times (their projection, times the
    cosine, turned round, times the sine), and in float32 eight times; where queries have a norm of their own, five
    times (their projection, and twice in float32). A gate stands beside them, and its family's norm makes one more.
    Latent attention has keys and values of unequal size, which torch's function multiplies in float32: queries and keys
    are there as projected, with their positions, and so.
    """
    latent, both = layer.find("kv_a_proj_with_mqa.weight"), layer.find("kv_b_proj.weight")
    wide = layer.find("q_b_proj.weight") or layer.find("q_proj.weight")
    if latent is not None and both is not None and wide is not None:
        return 3 * hidden + 4 * latent[0] + 7 * wide[0] + 2 * both[0]
    sizes = [layer.find(f"{name}_proj.weight") for name in "qkv"]
    if any(size is None for size in sizes):
        return 0
    q, k, v = (size[0] for size in sizes if size is not None)
    normed = any(("attn.q" in name and "norm" in name) or "attn.query_layernorm" in name for name in layer.shapes)
    gate = 2 * q if layer.find("self_attn.gate_proj.weight") else 0
    copies = 8 if config.get("model_type") in FLOAT32_POSITIONS else 5 if normed else 4
    return 2 * hidden + copies * q + gate + 2 * (k + v) + 8 * _head_dim(config, hidden)


def _mlp(layer: DenseLayer, hidden: int) -> int:
    """Numbers for each token in a layer's widest MLP: the stream four times, what goes into the activation twice and
    what comes out. A gate in the same tensor as what it gates is two of these."""
    return 4 * hidden + 3 * max((widest for owner, widest in _widest(layer).items() if "attn" not in owner), default=0)


MEASURED = (
    *("dots1", "exaone_moe", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
)
"""Families whose passes hold no more than `_native` counts: a test runs each of them, wide. ERNIE-4.5, FlexOlmo and
Hunyuan V3 turn positions or add experts in float32, up to 1.35 times as much: they and all others are counted as torch
computes."""


def _native(
    config: Mapping[str, Any], layers: Sequence[DenseLayer], hidden: int, itemsize: int
) -> tuple[int, int, int, bool]:
    """The last four of `Activations`: zeros of families that were not measured, and where some layer is other than
    projections to queries, keys and values.

    A block holds its tokens three times (the embeddings, what came in, its norm), four times in an MLP, five times in
    one beside experts. Positions are turned in four copies of the queries; a gated MLP has three of its inner rows.
    """
    if config.get("model_type") not in MEASURED:
        return 0, 0, 0, False
    most = cached = 0
    head = _head_dim(config, hidden)
    for layer in layers:
        sizes = [layer.find(f"{name}_proj.weight") for name in "qkv"]
        if any(size is None for size in sizes):
            return 0, 0, 0, False
        q, k, v = (size[0] for size in sizes if size is not None)
        most = max(most, 3 * hidden + 4 * q + k + v, 4 * hidden + 2 * q, hidden + _mlp(layer, hidden))
        cached = max(cached, 3 * hidden + q + 2 * (k + v))
    # Cosines and sines of positions are in the run dtype; a head's values are padded to 32 columns.
    return (
        itemsize * (most + 2 * head),
        itemsize * (cached + 2 * head),
        itemsize * (head + -(-head // 32) * 32),
        config.get("hidden_act") in ("silu", "swish"),
    )


def _head_dim(config: Mapping[str, Any], hidden: int) -> int:
    own = config.get("head_dim")
    return own if isinstance(own, int) else hidden // stated(config, "num_attention_heads")


def _widest(layer: DenseLayer) -> dict[str, int]:
    """Outputs of the widest projection of each module."""
    widths: dict[str, int] = defaultdict(int)
    for name, shape in layer.shapes.items():
        if len(shape) == 2 and name.endswith(".weight"):
            owner = name.removesuffix(".weight").rpartition(".")[0]
            widths[owner] = max(widths[owner], shape[0])
    return widths


def _projections(layer: DenseLayer) -> int:
    """Outputs per token of projections that are alive together: the wider of attention and MLP."""
    widths: dict[str, int] = defaultdict(int)
    for name, shape in layer.shapes.items():
        if len(shape) == 2 and name.endswith(".weight"):
            owner = name.removesuffix(".weight").rpartition(".")[0]
            widths[owner] += shape[0]
    return max(widths.values(), default=0)


def _expert_inner(experts: Sequence[ExpertLayer], hidden: int, itemsize: int) -> int:
    """Outputs of an expert's first product. Its matrices have (inner + width) * hidden elements, where inner
    is
    twice the width with a gate and the width without; the larger part is the gated one, else both are
    equal."""
    largest = max(max(layer.part_nbytes) for layer in experts)
    return largest // (hidden * itemsize)
