"""Facts from tensor headers and config.json alone: a tenth of a second, because torch is not imported.

Importing transformers' model classes takes longer than a plan may (3.5 s on two slow cores), so the common
shapes are recognised by their tensors: an expert is `...experts.<number>...`, or a row of a tensor whose
first dimension is the number of experts; what attention remembers follows from the shapes of its key and
value projections. Whatever is not recognised beyond doubt raises `Unsure`, and the dry run through
transformers answers instead. Tests hold both to the same numbers for every family.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emoe.checkpoint.codecs.formats import NATIVE, ExpertCodec
from emoe.checkpoint.headers import TensorEntry
from emoe.checkpoint.settings import EXPERT_COUNTS, TOP_K, check_sizes
from emoe.planner.expert_tensors import Experts, expert_layers, find_experts
from emoe.planner.facts import DTYPE_BYTES, CacheKind, CacheLayer, Facts, dtype_bytes, max_context
from emoe.planner.paged import why_not_paged
from emoe.planner.tensors import LAYER, STORED, DenseLayer, Unsure, element_count, stated
from emoe.planner.widths import activations_of

_OTHER_INPUTS = ("vision_config", "audio_config", "encoder_config")


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
        CheckpointError: config.json states sizes that no model can have.
        UnsupportedModelError: a size that the codec cannot take.
    """
    check_sizes(config, path / "config.json")
    for key in (*_OTHER_INPUTS, "quantization_config", "text_config"):
        if config.get(key):
            raise Unsure(f"config.json has {key}")
    layers_in_model = stated(config, "num_hidden_layers")
    unused = {name for name in entries if _is_unused(name, layers_in_model)}
    used = {name: entry for name, entry in entries.items() if name not in unused}
    run_dtype = dtype or _own_dtype(config, used)
    itemsize = dtype_bytes(run_dtype)

    experts, expert_names = find_experts(config, used)
    native = expert_layers(experts, run_dtype)
    hidden = stated(config, "hidden_size")
    dense = {name: entry for name, entry in used.items() if name not in expert_names}
    tied = _tied_copy(config, dense)
    decoder: dict[int, DenseLayer] = defaultdict(DenseLayer)
    for name, entry in dense.items():
        if match := LAYER.search(name):
            decoder[int(match[1])].shapes[match[2]] = entry.shape
    if len(decoder) != layers_in_model:
        raise Unsure(f"tensors of {len(decoder)} decoder layers, num_hidden_layers {layers_in_model}")
    _compare(config, dense, decoder, experts)
    cache = tuple(_cache_layer(config, number, decoder[number], itemsize) for number in sorted(decoder))
    return Facts(
        path=path,
        model_type=str(config.get("model_type")),
        dtype=run_dtype,
        top_k=stated(config, *TOP_K),
        max_context=max_context(config.get("max_position_embeddings")),
        checkpoint_bytes=sum(entry.nbytes for entry in entries.values()),
        # Some families keep their routers in float32: at most a thousandth more, which only the dry run
        # knows.
        dense_bytes=sum(element_count(entry) * itemsize for name, entry in dense.items() if name != tied),
        expert_layers=native if codec is None else expert_layers(experts, run_dtype, codec, hidden),
        cache_layers=cache,
        activations=activations_of(config, list(decoder.values()), cache, native, itemsize),
        source="headers",
        assumed=_assumptions(unused, tied),
        lookup_bytes=_lookup_bytes(config, [entry for name, entry in dense.items() if name != tied], itemsize),
        expert_dtype=NATIVE if codec is None else codec.name,
        native_expert_bytes=sum(layer.experts * layer.expert_nbytes for layer in native),
        layers=layers_in_model,
        not_paged=why_not_paged(config, cache, itemsize),
    )


def _compare(
    config: Mapping[str, Any],
    dense: Mapping[str, TensorEntry],
    decoder: Mapping[int, DenseLayer],
    experts: Sequence[Experts],
) -> None:
    """Raise Unsure where tensors have other sizes than config.json states: who builds the model finds out which."""
    table = stated(config, "vocab_size"), stated(config, "hidden_size")
    for name, entry in dense.items():
        if name.endswith("embed_tokens.weight") and entry.shape != table:
            raise Unsure(f"{name} is {list(entry.shape)}, and config.json has vocab_size and hidden_size {list(table)}")
    count = next((config[name] for name in EXPERT_COUNTS if isinstance(config.get(name), int)), None)
    widths = {
        value * table[1] for name, value in config.items() if "intermediate_size" in name and isinstance(value, int)
    }
    for layer, found, parts in experts:
        if count not in (None, found):
            raise Unsure(f"layer {layer} has {found} experts, and config.json says {count}")
        if not widths & {part.elements for part in parts if part.down and not part.bias}:
            raise Unsure(f"no intermediate_size of config.json is the width of layer {layer}'s experts")
    head = config.get("head_dim")
    if not isinstance(head, int) or "kv_lora_rank" in config:
        return
    for field, name, most in (("num_attention_heads", "q_proj", 2), ("num_key_value_heads", "k_proj", 1)):
        heads = config.get(field)
        made = {shape[0] for layer in decoder.values() if (shape := layer.find(f"{name}.weight")) is not None}
        # A gate may be in the queries' tensor.
        if isinstance(heads, int) and made and not made & {heads * head * times for times in range(1, most + 1)}:
            raise Unsure(f"{name} makes {made}, and config.json has {field} {heads} of head_dim {head}")


def _is_unused(name: str, layers_in_model: int) -> bool:
    """Whether transformers leaves the tensor out: layers for multi-token prediction, saved rotary tables."""
    match = LAYER.search(name)
    beyond = match is not None and int(match[1]) >= layers_in_model
    return beyond or name.startswith(("mtp.", "model.mtp.")) or name.endswith("rotary_emb.inv_freq")


def _own_dtype(config: Mapping[str, Any], used: Mapping[str, TensorEntry]) -> str:
    """What transformers takes for dtype="auto": the configuration's, else the first float tensor's."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        named = next((STORED[entry.dtype] for entry in used.values() if entry.dtype in STORED), None)
    if named not in DTYPE_BYTES:
        raise Unsure(f"dtype {named!r}")
    return str(named)


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
    table = stated(config, "vocab_size"), stated(config, "hidden_size")
    size = table[0] * table[1] * itemsize
    return size if sum(entry.shape == table for entry in dense) > 1 else 0


def _assumptions(unused: set[str], tied: str | None) -> tuple[str, ...]:
    notes = []
    if unused:
        notes.append(f"{len(unused)} tensors that transformers does not load (e.g. {min(unused)}) are left out")
    if tied:
        notes.append(f"{tied} is tied to the embedding and counted once")
    return tuple(notes)


def _cache_layer(config: Mapping[str, Any], number: int, layer: DenseLayer, itemsize: int) -> CacheLayer:
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
        heads = stated(config, "linear_num_value_heads")
        state = heads * stated(config, "linear_key_head_dim") * stated(config, "linear_value_head_dim")
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
