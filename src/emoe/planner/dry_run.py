"""Facts through transformers itself: the model is built and run on the meta device, where tensors have no
bytes.

Right for every family, since the caches are measured on the model's own code, but it costs transformers'
import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from textwrap import shorten
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from emoe.checkpoint.codecs.formats import NATIVE, ExpertCodec, coded_parts
from emoe.checkpoint.headers import read_headers
from emoe.checkpoint.index import ExpertIndex, build_index, skeleton
from emoe.checkpoint.settings import TOP_K
from emoe.errors import UnsupportedModelError
from emoe.kernels.sinks import changes_mask, sunk
from emoe.planner.facts import (
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
from emoe.planner.live_bytes import LiveBytes
from emoe.planner.paged import why_not_paged

# Long enough for whole blocks of linear attention, short enough for layers that loop over tokens in Python.
_LENGTHS = (128, 256)  # the second twice the first
# Where scores are written out: at short lengths something else is the fullest moment.
_LONGER = (512, 1024)


def facts_by_dry_run(path: Path, dtype: str | None = None, reason: str = "", codec: ExpertCodec | None = None) -> Facts:
    """Facts about the checkpoint in `path`, run in `dtype` (None: its own), experts as `codec` has them (None: in that
    dtype).

    `reason` says why the headers did not settle it. Raises what `build_index` raises for models it refuses, and
    UnsupportedModelError for a size that the codec cannot take.
    """
    config, model = skeleton(path, dtype=dtype or "auto")
    index = build_index(path, model)
    text = config.get_text_config(decoder=True)
    try:
        cache, activations = _measure(model, text, index)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers cannot run the model of {path / 'config.json'}: {shorten(str(error), 300)}. Check the sizes "
            "there against where the weights are from."
        ) from error
    stored = sum(entry.nbytes for entry in read_headers(path).values())
    run_dtype = str(model.dtype).removeprefix("torch.")
    return Facts(
        path=path,
        model_type=config.model_type,
        dtype=run_dtype,
        top_k=_top_k(text),
        max_context=max_context(getattr(text, "max_position_embeddings", None)),
        checkpoint_bytes=stored,
        dense_bytes=index.dense_nbytes,
        expert_layers=tuple(
            ExpertLayer(
                layer.layer,
                layer.num_experts,
                by_size(part.nbytes for part in coded_parts(codec, layer.parts, layer.transposed)),
            )
            for layer in index.layers
        ),
        cache_layers=cache,
        activations=activations,
        source="dry run",
        assumed=(f"measured on a dry run, because {reason}",) if reason else (),
        expert_dtype=NATIVE if codec is None else codec.name,
        native_expert_bytes=index.total_expert_nbytes,
        lookup_bytes=0 if index.lookup is None else index.lookup.nbytes,
        layers=int(getattr(text, "num_hidden_layers", 0)),
        not_paged=why_not_paged(text.to_dict(), cache, dtype_bytes(run_dtype)),
    )


def _top_k(config: Any) -> int:
    """Experts per token, by the names the families give it."""
    for name in TOP_K:
        value = getattr(config, name, None)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, int):
            return value
    raise UnsupportedModelError(
        f"the configuration of {config.model_type!r} does not say how many experts a token takes; "
        "emoe cannot tell the smallest budget"
    )


def _measure(model: nn.Module, config: Any, index: ExpertIndex) -> tuple[tuple[CacheLayer, ...], Activations]:
    """What each layer's cache holds and what a pass makes on the way, from two runs without experts."""
    for layer in index.layers:
        # Experts change no shape, and most ways of running them ask for values, which meta tensors have not.
        model.get_submodule(layer.module).forward = lambda hidden, *_, **__: torch.empty_like(hidden)
    attention = _Attention()
    sinks = sunk(model)
    light = bool(sinks) and not any(changes_mask(module) for module in sinks)
    with ExitStack() as stack:
        if not model._supports_sdpa:
            model.set_attn_implementation("eager")  # type: ignore[operator]
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attention))
        if light:  # with sdpa's masks (emoe.model.attention)
            stack.enter_context(mock.patch.dict(AttentionMaskInterface._global_mapping, {"eager": sdpa_mask}))
        for module in {type(each).__module__ for each in sinks if light}:
            stack.enter_context(mock.patch.object(sys.modules[module], "eager_attention_forward", attention.with_sinks))
        cache, token, pair = _per_token(model, _LENGTHS)
        if pair:
            _, later, more = _per_token(model, _LONGER)
            token, pair = max(token, later), max(pair, more)
    inner = max(max(part.shape) for layer in index.layers for part in layer.parts)
    return cache, Activations(
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        expert_inner=inner,
        token_nbytes=token,
        pair_nbytes=pair + attention.pair_nbytes,
        masked=getattr(config, "sliding_window", None) is not None,
        block_nbytes=SCORES_BLOCK_BYTES if light else 0,
    )


def _per_token(model: nn.Module, lengths: tuple[int, int]) -> tuple[tuple[CacheLayer, ...], int, int]:
    """What each layer keeps, and what runs of both lengths make: token * length + pair * length^2 beside the cache."""
    (short, peak_short), (long, peak_long) = (_run(model, length) for length in lengths)
    cache = tuple(_cache_layers(_layers(short), _layers(long), lengths))
    a, b = lengths
    made_a, made_b = (p - sum(c.nbytes(n) for c in cache) for p, n in ((peak_short, a), (peak_long, b)))
    pair = max(0, (made_b * a - made_a * b) // (a * b * (b - a)))
    return cache, made_b // b - pair * b, pair


class _Attention:
    """Stands in for torch's attention, whose fused kernel writes no scores out; notes where it cannot be used."""

    def __init__(self) -> None:
        self.pair_nbytes = 0

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        """An output of the right shape."""
        if value.shape[-1] != query.shape[-1]:  # the plain way then: scores in 16 bits and twice in float32
            self.pair_nbytes = max(self.pair_nbytes, 10 * query.shape[1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def with_sinks(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """Stands in for transformers' eager attention where it has sinks (emoe.kernels.sinks)."""
        return self(query, key, value).transpose(1, 2).contiguous(), None


def _cache_layers(short: list[Any], long: list[Any], lengths: tuple[int, int]) -> Iterator[CacheLayer]:
    """What each layer holds, from caches after both lengths."""
    for number, (a, b) in enumerate(zip(short, long, strict=True)):
        window = getattr(a, "sliding_window", None)
        if window is None:
            grown = _nbytes(b) - _nbytes(a)
            token, state = grown // (lengths[1] - lengths[0]), _nbytes(a) - grown
        else:  # both lengths may be beyond the window: keys and values are all that grows
            held = min(lengths[0], window - 1)
            token = (a.keys.nbytes + a.values.nbytes) // held
            state = _nbytes(a) - token * held
        kind: CacheKind = "state" if token == 0 else "full" if window is None else "sliding"
        if token or state:
            yield CacheLayer(number, kind, token, None if window is None else window - 1, state)


def _run(model: nn.Module, length: int) -> tuple[Any, int]:
    """The cache after a prompt of `length` tokens, and the most bytes held at once."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return cache, live.peak


def _layers(cache: Any) -> list[Any]:
    """The cache's layers, and whatever tensors it keeps beside them as one more."""
    beside = {name: value for name, value in vars(cache).items() if name != "layers"}
    return [*cache.layers, beside]


def _nbytes(holder: Any) -> int:
    """Bytes of the floating-point tensors in an object's attributes."""
    values = holder if isinstance(holder, dict) else vars(holder)
    return sum(tensor.nbytes for tensor in _tensors(list(values.values())) if tensor.is_floating_point())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
