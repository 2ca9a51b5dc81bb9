"""config.json and the files of settings beside it, read without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call their number of experts."""

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k")
"""What they call the experts of a token."""

_COUNTED = (*("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),)
"""What cannot be 0."""

_MEASURED = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"),
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_conv_kernel_dim"),
    *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    *("head_dim", "n_group", "topk_group", *EXPERT_COUNTS, *TOP_K),
)
"""What some models do without, but cannot have less than nothing of: a dense one of a family that also has models with
experts states 0 experts, and one with latent attention may state a head_dim of 0."""

_REMEDY = "Take config.json from where the weights are from, or correct it."


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json, or another file of settings, as a dict. Raises CheckpointError when it is missing or not JSON."""
    file = path / name
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: not a Hugging Face checkpoint directory") from None
    except (ValueError, RecursionError) as error:  # also no UTF-8, integers of thousands of digits, endless lists
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not an object; fetch the checkpoint again")
    return config


def check_sizes(config: Mapping[str, Any], file: Path) -> None:
    """Raise where sizes that `config` (of `file`) states cannot be any model's; what it leaves out is not judged.

    Raises:
        CheckpointError: naming the field, its value and what it has to be.
    """
    inner = config.get("text_config")
    for part in (config, inner) if isinstance(inner, Mapping) else (config,):
        for problem in _problems(part):
            raise CheckpointError(f"{file}: {problem}. {_REMEDY}")


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    for least, names in ((1, _COUNTED), (0, _MEASURED)):
        for name in names:
            stated = config.get(name)
            for value in stated if isinstance(stated, list) else [] if stated is None else [stated]:
                if not isinstance(value, int) or isinstance(value, bool):
                    yield f"{name} is {stated!r}, not a whole number"
                elif value < least:
                    yield f"{name} is {stated}, and must be at least {least}"

    def size(name: str) -> int:
        """What it states; 0 also where it states none."""
        stated = config.get(name)
        return stated if isinstance(stated, int) else 0

    chosen = next((name for name in TOP_K if isinstance(config.get(name), int)), "")
    counted = next((name for name in EXPERT_COUNTS if isinstance(config.get(name), int)), "")
    top, experts = size(chosen), size(counted)
    if min(top, experts) >= 1 and top > experts:
        yield f"{chosen} is {top}, more than the {experts} experts of {counted}"
    if experts > 1 and chosen and top == 0:
        yield f"{chosen} is 0, and {counted} {experts}: a token has at least one of the experts"
    heads, shared = size("num_attention_heads"), size("num_key_value_heads")
    latent = config.get("kv_lora_rank") is not None  # its heads have keys of their own, whatever this says
    if min(heads, shared) >= 1 and heads % shared and not latent:
        yield f"num_key_value_heads is {shared}, which does not divide the num_attention_heads, {heads}"
    groups, kept = size("n_group"), size("topk_group")
    if min(groups, experts) >= 1 and experts % groups:
        yield f"n_group is {groups}, which does not divide the {experts} experts of {counted}"
    if min(groups, kept) >= 1 and kept > groups:
        yield f"topk_group is {kept}, more than the {groups} of n_group"
    if min(groups, kept, top, experts) >= 1 and top > (reached := kept * experts // groups):
        yield f"{chosen} is {top}, and topk_group {kept} of n_group {groups} leaves {reached} experts"


def origins(config: Mapping[str, Any], number: int) -> str:
    """Where a size that a model expects of its tensors comes from: the fields of that value, widths of which it is
    twice the value (gates and what they gate in one tensor) and heads of as many dimensions. Empty where there are
    none."""
    named = {name: config[name] for name in (*_COUNTED, *_MEASURED) if isinstance(config.get(name), int)}
    equal = [f"{name} {value}" for name, value in named.items() if value == number]
    twice = [f"twice {name} {value}" for name, value in named.items() if "inter" in name and 2 * value == number]
    heads = [(name, value) for name, value in named.items() if name.endswith("_heads")]
    wide = [(name, value) for name, value in named.items() if name.endswith("head_dim")]
    made = [f"{a} {x} times {b} {y}" for (a, x), (b, y) in product(heads, wide) if x * y == number]
    return " or ".join([*equal, *twice, *made])
