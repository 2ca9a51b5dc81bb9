"""transformers' key-value cache on a CPU, with room to grow: a token's keys are written behind the others.

transformers concatenates: for every token the whole cache is copied, layer by layer, which at 500 tokens takes longer
than attention itself (docs/log.md).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

STEP = 64
"""Room grows by so many tokens; one copy every 64 tokens takes no time worth counting, and 63 tokens little memory."""


def rounded(tokens: int) -> int:
    """Tokens that a full layer of a cache of `tokens` has room for."""
    return -(-tokens // STEP) * STEP


class _Room:
    """Memory for a layer's keys or values, of which the first `filled` tokens have been handed out."""

    def __init__(self, old: torch.Tensor, new: torch.Tensor) -> None:
        held = old.shape[-2] if old.dim() == new.dim() else 0  # before the first token there is an empty vector
        with torch.inference_mode(False):  # made in inference mode, it could not be written to outside it
            self.memory = new.new_empty(*new.shape[:-2], rounded(held + new.shape[-2]), new.shape[-1])
        if held:
            self.memory[..., :held, :] = old
        self.filled = held

    def fits(self, old: torch.Tensor, new: torch.Tensor) -> bool:
        """Whether `new` can be written behind `old`: what was handed out is never written to again.

        `old` is a view of this room, unless the cache was cropped, reordered or copied meanwhile. Copied in inference
        mode, its memory cannot be written to outside it.
        """
        return (
            (torch.is_inference_mode_enabled() or not self.memory.is_inference())
            and self.filled == old.shape[-2]
            and self.filled + new.shape[-2] <= self.memory.shape[-2]
            and old.data_ptr() == self.memory.data_ptr()
            and old.stride() == self.memory.stride()
        )

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Return all there is, with `new` behind it."""
        end = self.filled + new.shape[-2]
        self.memory[..., self.filled : end, :] = new
        self.filled = end
        return self.memory[..., :end, :]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a cache that grows in place. Keys and values handed out before never change."""

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, **kwargs: Any) -> None:
        """Start empty."""
        super().__init__(**kwargs)
        self._rooms: tuple[_Room, _Room] | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """Return one that holds what `layer` holds."""
        grown = cls()
        grown.__dict__.update(vars(layer))
        return grown

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [batch, heads, tokens, size]; return all of them."""
        if not (self._extends(self.keys, key_states) and self._extends(self.values, value_states)):
            self._rooms = None
            out: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return out
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = cast(torch.Tensor, self.keys), cast(torch.Tensor, self.values)
        rooms = self._rooms
        if rooms is None or not (rooms[0].fits(keys, key_states) and rooms[1].fits(values, value_states)):
            self._rooms = None
            rooms = self._rooms = (_Room(keys, key_states), _Room(values, value_states))
        self.keys, self.values = rooms[0].append(key_states), rooms[1].append(value_states)
        return self.keys, self.values

    @staticmethod
    def _extends(old: torch.Tensor | None, new: torch.Tensor) -> bool:
        """Whether this is the plain case; in any other transformers concatenates, or says what is wrong."""
        same = (
            old is None
            or old.dim() == 1
            or (old.shape[:-2] == new.shape[:-2] and old.shape[-1] == new.shape[-1] and old.dtype == new.dtype)
        )
        return same and new.device.type == "cpu" and not new.requires_grad and not torch.compiler.is_compiling()

    def reset(self) -> None:
        """Forget everything."""
        self._rooms = None
        super().reset()


def let_grow(model: PreTrainedModel) -> RemovableHandle:
    """Let the caches that `model` is called with grow in place; returns what takes that back for calls to come."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache) and not getattr(cache, "offloading", False):
            for number, layer in enumerate(cache.layers):
                if type(layer) is DynamicLayer:
                    cache.layers[number] = GrowingLayer.of(layer)

    handle: RemovableHandle = model.register_forward_pre_hook(before, with_kwargs=True)
    return handle
