"""Where the tensors and settings of a hub checkpoint belong in a GGUF file that llama.cpp runs.

Facts taken from llama.cpp's loader and from the GGUF specification: names are `blk.LAYER.PART.weight`, the experts of
a layer are one tensor [experts, outputs, inputs] for each of gate, up and down, and what decides routes (routers) or is
one-dimensional (norms, biases, sinks) is float32. Everything is read from the checkpoint's files row by row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from emoe.checkpoint.headers import TensorEntry
from emoe.errors import CheckpointError, UnsupportedModelError

Role = Literal["exact", "dense", "expert"]
"""exact: always float32; dense: in the checkpoint's dtype; expert: in the dtype that the file is made in."""

BLOCK_BYTES = 2**25
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""By the names that safetensors and GGUF share."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file; `dtype` is the checkpoint's (a safetensors name).

    `blocks()` yields its rows in order, in pieces of a few tens of MiB.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    blocks: Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Layout:
    """A family. `settings` are metadata under the architecture's name, from a transformers configuration."""

    architecture: str
    settings: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Mapping[str, TensorEntry], Any], Iterator[GgufTensor]]
    refusal: Callable[[Any], str | None]


def layout_of(config: Any) -> Layout:
    """The layout for a transformers configuration.

    Raises:
        UnsupportedModelError: no layout here for its family, or a setting that llama.cpp does not know.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise UnsupportedModelError(f"no GGUF can be written of {config.model_type}; known are {', '.join(LAYOUTS)}")
    refusal = layout.refusal(config)
    if refusal is not None:
        raise UnsupportedModelError(f"llama.cpp's {layout.architecture} does not know {refusal}; no GGUF is written")
    return layout


# -- reading ------------------------------------------------------------------------------------------------


def read_rows(entry: TensorEntry, start: int, end: int) -> torch.Tensor:
    """Rows [start, end) of the first dimension, in the dtype they are stored in.

    Raises:
        CheckpointError: another dtype than bf16, f16 or f32, or a truncated file.
    """
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(f"{entry.name} is {entry.dtype}; only {', '.join(DTYPES)} can be written to a GGUF")
    row = entry.nbytes // entry.shape[0]
    data = bytearray((end - start) * row)
    with Path(entry.file).open("rb", buffering=0) as file:
        os.lseek(file.fileno(), entry.offset + start * row, os.SEEK_SET)
        if file.readinto(data) != len(data):
            raise CheckpointError(f"{entry.file} ends inside tensor {entry.name!r}. Download the checkpoint again.")
    return torch.frombuffer(data, dtype=dtype).view(end - start, *entry.shape[1:])


def _whole(entry: TensorEntry) -> Iterator[torch.Tensor]:
    rows = max(1, BLOCK_BYTES // max(1, entry.nbytes // entry.shape[0]))
    for start in range(0, entry.shape[0], rows):
        yield read_rows(entry, start, min(start + rows, entry.shape[0]))


def _each(entries: list[TensorEntry]) -> Iterator[torch.Tensor]:
    for entry in entries:
        yield read_rows(entry, 0, entry.shape[0])


def _half(entry: TensorEntry, first: int) -> Iterator[torch.Tensor]:
    """Rows `first`, `first` + 2, ... of each expert's transposed matrix: gpt-oss mixes gate and up column by column."""
    for expert in range(entry.shape[0]):
        yield read_rows(entry, expert, expert + 1)[0].T[first::2]


def _transposed(entry: TensorEntry) -> Iterator[torch.Tensor]:
    for expert in range(entry.shape[0]):
        yield read_rows(entry, expert, expert + 1)[0].T


def _columns(entry: TensorEntry, first: int) -> Iterator[torch.Tensor]:
    yield read_rows(entry, 0, entry.shape[0])[:, first::2]


def _rotated(entry: TensorEntry, heads: int) -> Iterator[torch.Tensor]:
    """Rows of each head in the order of llama.cpp's "llama" rotation, which turns neighbours, not halves."""
    rows = read_rows(entry, 0, entry.shape[0])
    yield rows.view(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)


class _Names:
    """The checkpoint's tensors by name, each taken once. Raises CheckpointError for one that is not there."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = entries
        self.taken: set[str] = set()

    def __call__(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}")
        self.taken.add(name)
        return self._entries[name]

    def same(self, name: str, source: str, role: Role = "dense") -> GgufTensor:
        entry = self(source)
        return GgufTensor(name, entry.shape, entry.dtype, role, partial(_whole, entry))

    def has(self, name: str) -> bool:
        return name in self._entries

    def finish(self) -> None:
        """Raises CheckpointError if a tensor was left over: the file would not be the same model."""
        left = sorted(self._entries.keys() - self.taken)
        if left:
            raise CheckpointError(f"{len(left)} tensors have no place in a GGUF, the first is {left[0]!r}")


# -- families -----------------------------------------------------------------------------------------------


def _common(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_used_count": config.num_experts_per_tok,
    }
    if rope["rope_type"] == "yarn":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        }
    return values


def _refusal(config: Any, wanted: Mapping[str, object]) -> str | None:
    """The first setting that is not what llama.cpp takes for granted; rotations other than plain and YaRN."""
    for name, value in wanted.items():
        found = getattr(config, name, value)
        if found != value:
            return f"{name} = {found!r} (only {value!r})"
    kind = config.rope_parameters["rope_type"]
    return None if kind in ("default", "yarn") else f"rope_type = {kind!r}"


def _outside(names: _Names) -> Iterator[GgufTensor]:
    yield names.same("token_embd.weight", "model.embed_tokens.weight")
    yield names.same("output_norm.weight", "model.norm.weight", "exact")
    head = "lm_head.weight" if names.has("lm_head.weight") else "model.embed_tokens.weight"
    yield names.same("output.weight", head)


def _attention(names: _Names, layer: int, norms: bool, heads: tuple[int, int] | None = None) -> Iterator[GgufTensor]:
    """`heads`: (of queries, of keys) where llama.cpp rotates neighbours, so that rows must change places."""
    source, target = f"model.layers.{layer}", f"blk.{layer}"
    yield names.same(f"{target}.attn_norm.weight", f"{source}.input_layernorm.weight", "exact")
    for short, long in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
        made = names.same(f"{target}.attn_{short}.weight", f"{source}.self_attn.{long}.weight")
        if heads is not None and short in ("q", "k"):
            entry = names(f"{source}.self_attn.{long}.weight")
            made = replace(made, blocks=partial(_rotated, entry, heads[short == "k"]))
        yield made
        bias = f"{source}.self_attn.{long}.bias"
        if names.has(bias):
            yield names.same(f"{target}.attn_{short}.bias", bias, "exact")
    for short in ("q", "k") if norms else ():
        yield names.same(f"{target}.attn_{short}_norm.weight", f"{source}.self_attn.{short}_norm.weight", "exact")


def _separate(
    config: Any,
    entries: Mapping[str, TensorEntry],
    block: str,
    matrices: tuple[str, str, str],
    norms: bool = True,
    rotated: bool = False,
) -> Iterator[GgufTensor]:
    """Families whose checkpoints hold one matrix per expert: `matrices` are its gate, up and down."""
    names = _Names(entries)
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    heads = (config.num_attention_heads, config.num_key_value_heads) if rotated else None
    yield from _outside(names)
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}", f"blk.{layer}"
        yield from _attention(names, layer, norms, heads)
        yield names.same(f"{target}.ffn_norm.weight", f"{source}.post_attention_layernorm.weight", "exact")
        yield names.same(f"{target}.ffn_gate_inp.weight", f"{source}.{block}.gate.weight", "exact")
        for part, matrix in zip(("gate", "up", "down"), matrices, strict=True):
            found = [names(f"{source}.{block}.experts.{expert}.{matrix}.weight") for expert in range(experts)]
            shape = (experts, *found[0].shape)
            dtype = found[0].dtype
            yield GgufTensor(f"{target}.ffn_{part}_exps.weight", shape, dtype, "expert", partial(_each, found))
    names.finish()


def _olmoe(entries: Mapping[str, TensorEntry], config: Any) -> Iterator[GgufTensor]:
    return _separate(config, entries, "mlp", ("gate_proj", "up_proj", "down_proj"))


def _mixtral(entries: Mapping[str, TensorEntry], config: Any) -> Iterator[GgufTensor]:
    return _separate(config, entries, "block_sparse_moe", ("w1", "w3", "w2"), norms=False, rotated=True)


def _gpt_oss(entries: Mapping[str, TensorEntry], config: Any) -> Iterator[GgufTensor]:
    names = _Names(entries)
    yield from _outside(names)
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}", f"blk.{layer}"
        yield from _attention(names, layer, norms=False)
        yield names.same(f"{target}.attn_sinks.weight", f"{source}.self_attn.sinks", "exact")
        yield names.same(f"{target}.post_attention_norm.weight", f"{source}.post_attention_layernorm.weight", "exact")
        yield names.same(f"{target}.ffn_gate_inp.weight", f"{source}.mlp.router.weight", "exact")
        yield names.same(f"{target}.ffn_gate_inp.bias", f"{source}.mlp.router.bias", "exact")
        both, bias = names(f"{source}.mlp.experts.gate_up_proj"), names(f"{source}.mlp.experts.gate_up_proj_bias")
        experts, hidden, columns = both.shape
        for first, part in enumerate(("gate", "up")):
            name, shape = f"{target}.ffn_{part}_exps", (experts, columns // 2)
            weight = partial(_half, both, first)
            yield GgufTensor(f"{name}.weight", (*shape, hidden), both.dtype, "expert", weight)
            yield GgufTensor(f"{name}.bias", shape, bias.dtype, "exact", partial(_columns, bias, first))
        down = names(f"{source}.mlp.experts.down_proj")
        weight, turned = partial(_transposed, down), (experts, down.shape[2], down.shape[1])
        yield GgufTensor(f"{target}.ffn_down_exps.weight", turned, down.dtype, "expert", weight)
        yield names.same(f"{target}.ffn_down_exps.bias", f"{source}.mlp.experts.down_proj_bias", "exact")
    names.finish()


LAYOUTS: dict[str, Layout] = {
    "olmoe": Layout(
        "olmoe",
        lambda config: _common(config) | {"expert_count": config.num_experts},
        _olmoe,
        lambda config: _refusal(
            config,
            {
                "clip_qkv": None,
                "norm_topk_prob": False,
                "hidden_act": "silu",
                "attention_bias": False,
                "num_key_value_heads": config.num_attention_heads,
            },
        ),
    ),
    "qwen3_moe": Layout(
        "qwen3moe",
        lambda config: (
            _common(config)
            | {"expert_count": config.num_experts, "expert_feed_forward_length": config.moe_intermediate_size}
        ),
        _olmoe,
        lambda config: _refusal(
            config,
            {
                "norm_topk_prob": True,
                "hidden_act": "silu",
                "attention_bias": False,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "sliding_window": None,
            },
        ),
    ),
    "mixtral": Layout(
        "llama",
        lambda config: _common(config) | {"expert_count": config.num_local_experts},
        _mixtral,
        lambda config: _refusal(config, {"hidden_act": "silu", "sliding_window": None}),
    ),
    "gpt_oss": Layout(
        "gpt-oss",
        lambda config: (
            _common(config)
            | {
                "expert_count": config.num_local_experts,
                "expert_feed_forward_length": config.intermediate_size,
                "attention.sliding_window": config.sliding_window,
            }
        ),
        _gpt_oss,
        lambda config: _refusal(config, {"swiglu_limit": 7.0, "hidden_act": "silu"}),
    ),
}
"""Layouts by transformers' model_type. Adding a family is one entry here."""
