"""Whether the paged cache of continuous batching can hold what a model's layers keep between tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emoe.planner.facts import CacheLayer

_KINDS = ("full_attention", "sliding_attention")
"""The kinds of layers for which transformers' paged cache has pages."""


def why_not_paged(config: Mapping[str, Any], layers: Sequence[CacheLayer], itemsize: int) -> str:
    """Why pages cannot hold what these layers keep; nothing where they can, as far as the configuration says.

    Pages hold keys and values of one size, as many heads of one width for every layer as the configuration states. What
    it leaves to transformers' defaults is not judged: the engine finds that out when it starts.

    Args:
        config: the (text) configuration, as config.json or `to_dict()` has it.
        layers: what each decoder layer keeps.
        itemsize: bytes of one number of it.
    """
    kinds = config.get("layer_types")
    other = sorted({str(kind) for kind in kinds if kind not in _KINDS}) if isinstance(kinds, Sequence) else []
    if other:
        return f"its layers are of the kind {', '.join(other)}"
    for layer in layers:
        if layer.state_nbytes:
            return f"layer {layer.layer} keeps a state of {layer.state_nbytes} bytes for each sequence"
        if layer.kind == "latent":
            return f"layer {layer.layer} keeps its keys and values compressed (multi-head latent attention)"
    sizes = {layer.token_nbytes for layer in layers}
    if len(sizes) > 1:
        return f"its layers keep keys and values of different sizes, {_listed(sizes)} bytes a token"
    heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    width = config.get("head_dim")
    if sizes and isinstance(heads, int) and isinstance(width, int) and sizes != {2 * heads * width * itemsize}:
        return (
            f"a layer keeps {_listed(sizes)} bytes a token, and {heads} heads of {width} keys and as many values are "
            f"{2 * heads * width * itemsize}"
        )
    return ""


def _listed(sizes: set[int]) -> str:
    return " and ".join(str(size) for size in sorted(sizes))
