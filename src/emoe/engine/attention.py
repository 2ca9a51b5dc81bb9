"""Attention of a packed step, request by request.

transformers packs a step's requests into one sequence and attends with one mask of [tokens, keys of all requests]: cost
and memory grow with the square of the batch. Here the pages are written and read by transformers' cache, and each
request then attends alone, with exactly the arguments that `generate()` would have used for it: same kernel, same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from emoe.errors import UnsupportedModelError
from emoe.model.attention import FEW_ROWS_SDPA, SINKS, attention, sinks_attention

IMPLEMENTATION = "emoe_paged"
"""The name under which transformers finds `packed_attention`."""

ATTENDS: dict[str, Callable[..., tuple[torch.Tensor, None]]] = {
    "sdpa": sdpa_attention_forward,
    FEW_ROWS_SDPA: attention,
    SINKS: sinks_attention,
}
"""The attention function of one request, by the implementation that the model was loaded with: `generate()`'s own."""

_THEIRS = ("s_aux", "softcap")
"""Arguments that say what is computed, and that are not of single tokens: handed on where a layer gives them."""

_PACKED = ("attention_mask", "position_bias", "sinks", "indices", "block_indices")
"""Arguments that would be of the packed step's tokens and keys, which no request has alone: refused."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's keys and values lie in the cache.

    Attributes:
        keys, values: [rows, key heads, size] each.
        group: the number of the layer's group, which have indices of their own.
        window: tokens that a token of the layer sees, itself included; None: all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    group: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Share:
    """One request's part of a step in the layers of a group.

    Attributes:
        write: rows of the cache that its tokens go to.
        held: rows of the cache that it reads, those of the tokens before the step that a layer still sees.
        mask: as `_mask` makes it.
    """

    write: torch.Tensor
    held: torch.Tensor
    mask: torch.Tensor | None


@dataclass(slots=True)
class Packed:
    """What `packed_attention` has to know of the step under way; lies on the cache as `emoe`.

    Attributes:
        place: where a layer's keys and values lie.
        attend: the attention function of one request, one of `ATTENDS`.
        queries, past: how many tokens each request has in this step, and before it, in the order of the packed
            sequence.
    """

    place: Callable[[int], Place]
    attend: Callable[..., tuple[torch.Tensor, None]] = sdpa_attention_forward
    queries: list[int] = field(default_factory=list)
    past: list[int] = field(default_factory=list)
    _shares: dict[int, list[Share]] = field(default_factory=dict)

    def begin(self, queries: list[int], past: list[int]) -> None:
        """Another step."""
        self.queries, self.past = queries, past
        self._shares.clear()

    def shares(self, place: Place, write: torch.Tensor, read: torch.Tensor) -> list[Share]:
        """The requests' parts in the layers of a place's group, which see the same window: made once in a step.

        Args:
            place: of one of these layers.
            write, read: the group's rows of all requests, those that are written and those that are read.
        """
        if place.group not in self._shares:
            held = [past if place.window is None else min(past, place.window - 1) for past in self.past]
            counts = [before + own for before, own in zip(held, self.queries, strict=True)]
            rows = torch.split(read, counts) if read.numel() else [read] * len(counts)
            self._shares[place.group] = [
                Share(to, own[:before], _mask(queries, before + queries, place.window, write.device))
                for to, own, before, queries in zip(
                    torch.split(write, self.queries), rows, held, self.queries, strict=True
                )
            ]
        return self._shares[place.group]


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed step; the arguments are those of transformers' attention functions.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, size].
        key, value: [1, key heads, tokens, size].
        attention_mask: none: every request attends causally to its own past, or to the window of it that the layer has.
        dropout, scaling, kwargs: as transformers passes them; `cache` is the paged cache.

    Returns:
        [1, tokens, heads, size], None.

    Raises:
        UnsupportedModelError: a layer gives something of the packed step's tokens and keys.
    """
    given = {"attention_mask": attention_mask, **kwargs}
    refused = [name for name in _PACKED if given.get(name) is not None]
    if refused:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(refused)}, which is not known for requests of one step"
        )
    packed: Packed = kwargs["cache"].emoe
    place = packed.place(int(module.layer_idx))  # type: ignore[arg-type]
    shares = packed.shares(place, kwargs["write_index"][place.group], kwargs["read_index"][place.group])
    theirs = {name: kwargs[name] for name in _THEIRS if kwargs.get(name) is not None}
    outputs = []
    # A window's pages are a ring: what a step writes there may lie where it still has to read. Hence one request after
    # the other, first read, then written. What is attended to then also lies in the processor's cache.
    for own_q, own_k, own_v, share in zip(
        torch.split(query, packed.queries, dim=2),
        torch.split(key, packed.queries, dim=2),
        torch.split(value, packed.queries, dim=2),
        shares,
        strict=True,
    ):
        new_k, new_v = own_k[0].transpose(0, 1), own_v[0].transpose(0, 1)
        k, v = own_k, own_v
        if len(share.held):
            k, v = _joined(place.keys, share.held, new_k), _joined(place.values, share.held, new_v)
        place.keys.index_copy_(0, share.write, new_k)
        place.values.index_copy_(0, share.write, new_v)
        outputs.append(packed.attend(module, own_q, k, v, share.mask, dropout, scaling, is_causal=True, **theirs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _joined(paged: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What lies in these rows, and after it `new` [tokens, key heads, size]: [1, key heads, rows + tokens, size]."""
    before, tokens = len(rows), len(new)
    out = paged.new_empty(before + tokens, *paged.shape[1:])
    torch.index_select(paged, 0, rows, out=out[:before])
    out[before:] = new
    return out.transpose(0, 1)[None]


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """bool [1, 1, queries, keys], of the last `queries` of so many tokens.

    None where `generate()` has none: for one token and for a whole prompt, while a layer's window is longer.
    """
    before = keys - queries
    narrow = window is not None and keys >= window
    if not (narrow or (queries > 1 and before)):
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(before)
    if window is not None and narrow:
        mask.triu_(before - window + 1)
    return mask[None, None]


def slides(model: PreTrainedModel) -> bool:
    """Whether some layer attends to a window only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None


def places_of(cache: Any) -> Callable[[int], Place]:
    """Where the paged cache keeps a layer's keys and values."""

    def place(layer: int) -> Place:
        allocator = cache.layer_to_allocator[layer]
        keys, values = allocator._kv_token_views[layer]
        return Place(keys, values, int(allocator.index), getattr(allocator, "sliding_window", None))

    def by_group(layer: int) -> Place:  # transformers 5.17
        group, number = cache.layer_index_to_group_indices[layer]
        window = cache.sliding_windows[layer]  # 1: none
        return Place(cache.key_cache[number], cache.value_cache[number], int(group), None if window == 1 else window)

    return place if hasattr(cache, "layer_to_allocator") else by_group


AttentionInterface.register(IMPLEMENTATION, packed_attention)
