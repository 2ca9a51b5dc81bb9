"""Facts from tensor headers and config.json alone: a tenth of a second, because torch is not imported.

Importing transformers' model classes takes longer than a plan may (3.5 s on two slow cores), so the common
shapes are recognised by their tensors: an expert is `...experts.<number>...`, or a row of a tensor whose
first dimension is the number of experts; what attention remembers follows from the shapes of its key and
value projections. Whatever is not recognised beyond doubt raises `Unsure`, and the dry run through
transformers answers instead. Tests hold both to the same numbers for every family.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emoe.checkpoint.codecs.formats import NATIVE, ExpertCodec, coded_parts
from emoe.checkpoint.headers import TensorEntry
from emoe.checkpoint.parts import PartSpec
from emoe.errors import CheckpointError
from emoe.planner.facts import (
    DTYPE_BYTES,
    SCORES_BLOCK_BYTES,
    Activations,
    CacheKind,
    CacheLayer,
    ExpertLayer,
    Facts,
    by_size,
    dtype_bytes,
    max_context,
)
from emoe.planner.paged import why_not_paged

_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NUMBERED = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")
_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)$")
_SINKS = ("sinks", "attention_sink_bias")  # attention that emoe.kernels.sinks computes
_OTHER_INPUTS = ("vision_config", "audio_config", "encoder_config")


class Unsure(Exception):
    """The headers alone do not settle it; the text says what."""


@dataclass
class _Layer:
    """Dense tensors of one decoder layer: name after `layers.N.` -> shape."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def find(self, suffix: str) -> tuple[int, ...] | None:
        """Shape of the one tensor whose name ends in `.suffix`."""
        found = [shape for name, shape in self.shapes.items() if f".{name}".endswith(f".{suffix}")]
        return found[0] if len(found) == 1 else None


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json, or another file of settings, as a dict. Raises CheckpointError when it is missing or not JSON."""
    file = path / name
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: not a Hugging Face checkpoint directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not an object; fetch the checkpoint again")
    return config


def facts_from_headers(
    path: Path,
    config: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    dtype: str | None = None,
    codec: ExpertCodec | None = None,
) -> Facts:
    """Facts about the checkpoint `entries` with its `config`, run in `dtype` (None: its own).

    Experts are as `codec` has them; None: in that dtype.

    Raises:
        Unsure: something is not recognised beyond doubt.
        UnsupportedModelError: a size that the codec cannot take.
    """
    for key in (*_OTHER_INPUTS, "quantization_config", "text_config"):
        if config.get(key):
            raise Unsure(f"config.json has {key}")
    layers_in_model = _number(config, "num_hidden_layers")
    unused = {name for name in entries if _is_unused(name, layers_in_model)}
    used = {name: entry for name, entry in entries.items() if name not in unused}
    run_dtype = dtype or _own_dtype(config, used)
    itemsize = dtype_bytes(run_dtype)

    experts, expert_names = _experts(config, used)
    native = _expert_layers(experts, run_dtype)
    hidden = _number(config, "hidden_size")
    dense = {name: entry for name, entry in used.items() if name not in expert_names}
    tied = _tied_copy(config, dense)
    decoder: dict[int, _Layer] = defaultdict(_Layer)
    for name, entry in dense.items():
        if match := _LAYER.search(name):
            decoder[int(match[1])].shapes[match[2]] = entry.shape
    if len(decoder) != layers_in_model:
        raise Unsure(f"tensors of {len(decoder)} decoder layers, num_hidden_layers {layers_in_model}")
    cache = tuple(_cache_layer(config, number, decoder[number], itemsize) for number in sorted(decoder))
    return Facts(
        path=path,
        model_type=str(config.get("model_type")),
        dtype=run_dtype,
        top_k=_number(config, *_TOP_K),
        max_context=max_context(config.get("max_position_embeddings")),
        checkpoint_bytes=sum(entry.nbytes for entry in entries.values()),
        # Some families keep their routers in float32: at most a thousandth more, which only the dry run
        # knows.
        dense_bytes=sum(_elements(entry) * itemsize for name, entry in dense.items() if name != tied),
        expert_layers=native if codec is None else _expert_layers(experts, run_dtype, codec, hidden),
        cache_layers=cache,
        activations=_activations(config, list(decoder.values()), cache, native, itemsize),
        source="headers",
        assumed=_assumptions(unused, tied),
        lookup_bytes=_lookup_bytes(config, [entry for name, entry in dense.items() if name != tied], itemsize),
        expert_dtype=NATIVE if codec is None else codec.name,
        native_expert_bytes=sum(layer.experts * layer.expert_nbytes for layer in native),
        not_paged=why_not_paged(config, cache, itemsize),
    )


def _number(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise Unsure(f"config.json states none of {', '.join(keys)} as a number")


def _is_unused(name: str, layers_in_model: int) -> bool:
    """Whether transformers leaves the tensor out: layers for multi-token prediction, saved rotary tables."""
    match = _LAYER.search(name)
    beyond = match is not None and int(match[1]) >= layers_in_model
    return beyond or name.startswith(("mtp.", "model.mtp.")) or name.endswith("rotary_emb.inv_freq")


def _own_dtype(config: Mapping[str, Any], used: Mapping[str, TensorEntry]) -> str:
    """What transformers takes for dtype="auto": the configuration's, else the first float tensor's."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        named = next((_STORED[entry.dtype] for entry in used.values() if entry.dtype in _STORED), None)
    if named not in DTYPE_BYTES:
        raise Unsure(f"dtype {named!r}")
    return str(named)


def _elements(entry: TensorEntry) -> int:
    if entry.dtype not in _STORED:
        raise Unsure(f"{entry.name} is stored as {entry.dtype}")
    count = 1
    for size in entry.shape:
        count *= size
    return count


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of an expert: a matrix or a bias of the product into hidden ("down") or of the one out of it."""

    elements: int
    down: bool
    bias: bool

    def spec(self, dtype: str, hidden: int | None) -> PartSpec:
        """Its name in experts modules, its shape (rows are outputs where `hidden` is given), its dtype."""
        name = "down_proj" if self.down else "gate_up_proj"
        if self.bias or hidden is None:
            return PartSpec(f"{name}_bias" if self.bias else name, (self.elements,), dtype)
        if self.elements % hidden:
            raise Unsure(f"an expert's {name} of {self.elements} numbers has no side of hidden_size {hidden}")
        other = self.elements // hidden
        return PartSpec(name, (hidden, other) if self.down else (other, hidden), dtype)


_Experts = tuple[int, int, tuple[_Part, ...]]
"""A layer, its number of experts, and the parts of each."""


def _experts(config: Mapping[str, Any], used: Mapping[str, TensorEntry]) -> tuple[list[_Experts], set[str]]:
    """The layers of experts, and the names of all tensors that are experts."""
    numbered: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for name, entry in used.items():
        if (match := _NUMBERED.match(name)) and not name.endswith("_scale_inv"):
            numbered[match[1]][int(match[2])][match[3]] = _elements(entry)
    if numbered:
        layers = [_numbered_layer(module, experts) for module, experts in numbered.items()]
        names = {name for name in used if _NUMBERED.match(name)}
    else:
        layers, names = _fused_layers(_number(config, *_EXPERTS), used)
    if not layers:
        raise Unsure("no tensor looks like an expert")
    layer, times = Counter(layer for layer, _, _ in layers).most_common(1)[0]
    if times > 1:
        raise Unsure(f"layer {layer} has several groups of experts")
    return sorted(layers, key=lambda layer: layer[0]), names


def _expert_layers(
    experts: Sequence[_Experts], dtype: str, codec: ExpertCodec | None = None, hidden: int | None = None
) -> tuple[ExpertLayer, ...]:
    """The layers in bytes; a codec asks for `hidden`, to tell outputs from inputs."""
    made = []
    for layer, count, parts in experts:
        if hidden is not None and sum(part.down and not part.bias for part in parts) != 1:
            raise Unsure(f"it is not plain which of layer {layer}'s expert tensors leads into hidden_size")
        specs = coded_parts(codec, (part.spec(dtype, hidden) for part in parts), transposed=False)
        made.append(ExpertLayer(layer, count, by_size(spec.nbytes for spec in specs)))
    return tuple(made)


def _numbered_layer(module: str, experts: Mapping[int, Mapping[str, int]]) -> _Experts:
    """One tensor per expert and projection: all experts must have the same."""
    first = experts.get(0, {})
    if set(experts) != set(range(len(experts))) or any(parts != first for parts in experts.values()):
        raise Unsure(f"the experts of {module} are not numbered 0 to {len(experts) - 1} with equal tensors")
    # gate and up become one part; so do their biases: the parts then are those of the model's own parameters.
    parts: Counter[tuple[bool, bool]] = Counter()
    for name, elements in first.items():
        parts[_is_down(name), name.endswith("bias")] += elements
    return _layer_number(module), len(experts), tuple(_Part(n, down, bias) for (down, bias), n in parts.items())


def _is_down(name: str) -> bool:
    return any(word in name for word in ("down", "w2", "output_linear", "fc2"))


def _fused_layers(count: int, used: Mapping[str, TensorEntry]) -> tuple[list[_Experts], set[str]]:
    """Tensors that hold all experts: three dimensions, or a bias beside such, the first their number."""
    modules: dict[str, dict[str, _Part]] = defaultdict(dict)
    matrices = [name for name, entry in used.items() if len(entry.shape) == 3 and entry.shape[0] == count]
    owners = {name.removesuffix(".weight").rpartition(".")[0] for name in matrices}
    for name, entry in used.items():
        plain = name.removesuffix(".weight")
        owner = plain.rpartition(".")[0]
        is_bias = len(entry.shape) == 2 and entry.shape[0] == count and "bias" in name
        if owner in owners and (name in matrices or is_bias):
            down = _is_down(plain.removeprefix(owner))
            modules[owner][name] = _Part(_elements(entry) // count, down, is_bias)
    layers = [(_layer_number(owner), count, tuple(parts.values())) for owner, parts in modules.items()]
    return layers, {name for parts in modules.values() for name in parts}


def _layer_number(module: str) -> int:
    match = _LAYER.search(f"{module}.")
    if match is None:
        raise Unsure(f"{module} names no decoder layer")
    return int(match[1])


def _tied_copy(config: Mapping[str, Any], dense: Mapping[str, TensorEntry]) -> str | None:
    """The output projection, when the file holds it although it is tied to the embedding."""
    if "lm_head.weight" not in dense:
        return None
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        raise Unsure("config.json does not say whether word embeddings are tied")
    return "lm_head.weight" if tied else None


def _lookup_bytes(config: Mapping[str, Any], dense: Sequence[TensorEntry], itemsize: int) -> int:
    """The embedding, where a projection of the same shape stands beside it: each token reads one of its rows."""
    table = _number(config, "vocab_size"), _number(config, "hidden_size")
    size = table[0] * table[1] * itemsize
    return size if sum(entry.shape == table for entry in dense) > 1 else 0


def _assumptions(unused: set[str], tied: str | None) -> tuple[str, ...]:
    notes = []
    if unused:
        notes.append(f"{len(unused)} tensors that transformers does not load (e.g. {min(unused)}) are left out")
    if tied:
        notes.append(f"{tied} is tied to the embedding and counted once")
    return tuple(notes)


def _cache_layer(config: Mapping[str, Any], number: int, layer: _Layer, itemsize: int) -> CacheLayer:
    """What layer `number` remembers, from the projections that fill its cache."""
    if any("indexer" in name for name in layer.shapes):
        raise Unsure(f"layer {number} has an indexer beside its attention")
    latent = layer.find("kv_a_proj_with_mqa.weight")
    if latent is not None:
        return CacheLayer(number, "latent", latent[0] * itemsize, _window(config, number))
    key, value = layer.find("k_proj.weight"), layer.find("v_proj.weight")
    if key is not None and value is not None:
        window = _window(config, number)
        kind: CacheKind = "full" if window is None else "sliding"
        return CacheLayer(number, kind, (key[0] + value[0]) * itemsize, window)
    short = layer.find("conv.conv.weight")
    if short is not None:
        return CacheLayer(number, "state", 0, state_nbytes=short[0] * short[-1] * itemsize)
    mixed = layer.find("linear_attn.conv1d.weight")
    if mixed is not None:
        heads = _number(config, "linear_num_value_heads")
        state = heads * _number(config, "linear_key_head_dim") * _number(config, "linear_value_head_dim")
        # The recurrent state stays in float32 whatever the model runs in.
        return CacheLayer(number, "state", 0, state_nbytes=mixed[0] * mixed[-1] * itemsize + state * 4)
    raise Unsure(f"layer {number} has no attention whose cache is known here")


def _window(config: Mapping[str, Any], number: int) -> int | None:
    """Tokens that a sliding layer holds between steps: one less than its window. None for full attention."""
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    if isinstance(kinds, list) and number < len(kinds):
        if kinds[number] == "full_attention":
            return None
        if kinds[number] == "sliding_attention" and isinstance(window, int):
            return window - 1
        raise Unsure(f"layer {number} is a {kinds[number]!r} layer")
    if window is not None and config.get("use_sliding_window") is not False:
        raise Unsure("config.json has a sliding_window but does not say for which layers")
    if config.get("attention_chunk_size") is not None:
        raise Unsure("config.json has an attention_chunk_size")
    return None


def _activations(
    config: Mapping[str, Any],
    layers: Sequence[_Layer],
    cache: Sequence[CacheLayer],
    experts: Sequence[ExpertLayer],
    itemsize: int,
) -> Activations:
    """What a pass makes beside the experts. The factors bound what was measured on CPU runs of every family."""
    hidden = _number(config, "hidden_size")
    projections = max(_projections(layer) for layer in layers)
    # A norm makes three float32 copies of the stream; a block holds it twice, and half of its projections' outputs
    # once more (rotary positions, the activation).
    token = 3 * 4 * hidden + itemsize * (2 * hidden + projections + projections // 2)
    if any(layer.find("linear_attn.conv1d.weight") for layer in layers):
        # The chunked delta rule in float32: a dozen tensors of keys and values, some of 64 x 64 within each chunk.
        size = max(_number(config, "linear_key_head_dim"), _number(config, "linear_value_head_dim"))
        token += 4 * _number(config, "linear_num_value_heads") * (12 * size + 4 * 64)
    heads = _number(config, "num_attention_heads")
    sinks = any(name.endswith(_SINKS) for layer in layers for name in layer.shapes)
    latent = any(layer.kind == "latent" for layer in cache)
    # Sinks need no scores where keys and values are of one size.
    unequal = config.get("v_head_dim", config.get("head_dim")) != config.get("head_dim")
    pair = (10 if latent else 8 if sinks and unequal else 0) * heads
    masked = config.get("sliding_window") is not None
    return Activations(
        hidden,
        _number(config, "vocab_size"),
        _expert_inner(experts, hidden, itemsize),
        token,
        pair,
        masked,
        SCORES_BLOCK_BYTES if sinks and not latent else 0,
        *_native(config, layers, hidden, itemsize),
    )


MEASURED = (
    *("dots1", "exaone_moe", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe"),
    *("minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
)
"""Families whose passes hold no more than `_native` counts: a test runs each of them, wide. ERNIE-4.5, FlexOlmo and
Hunyuan V3 turn positions or add experts in float32, up to 1.35 times as much: they and all others are counted as torch
computes."""


def _native(
    config: Mapping[str, Any], layers: Sequence[_Layer], hidden: int, itemsize: int
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
        inner = max((widest for owner, widest in _widest(layer).items() if "attn" not in owner), default=0)
        most = max(most, 3 * hidden + 4 * q + k + v, 4 * hidden + 2 * q, 5 * hidden + 3 * inner)
        cached = max(cached, 3 * hidden + q + 2 * (k + v))
    # Cosines and sines of positions are in the run dtype; a head's values are padded to 32 columns.
    return (
        itemsize * (most + 2 * head),
        itemsize * (cached + 2 * head),
        itemsize * (head + -(-head // 32) * 32),
        config.get("hidden_act") in ("silu", "swish"),
    )


def _head_dim(config: Mapping[str, Any], hidden: int) -> int:
    stated = config.get("head_dim")
    return stated if isinstance(stated, int) else hidden // _number(config, "num_attention_heads")


def _widest(layer: _Layer) -> dict[str, int]:
    """Outputs of the widest projection of each module."""
    widths: dict[str, int] = defaultdict(int)
    for name, shape in layer.shapes.items():
        if len(shape) == 2 and name.endswith(".weight"):
            owner = name.removesuffix(".weight").rpartition(".")[0]
            widths[owner] = max(widths[owner], shape[0])
    return widths


def _projections(layer: _Layer) -> int:
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
