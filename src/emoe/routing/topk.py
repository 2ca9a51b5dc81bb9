"""How many experts one token takes: read off the model, since no two families agree on the name."""

from __future__ import annotations

from typing import Any

from torch import nn

from emoe.checkpoint.settings import TOP_K
from emoe.errors import UnsupportedModelError

_NAMES = ("top_k", *TOP_K)


def top_k_of(block: nn.Module, config: Any, layer: int) -> int:
    """Return k for one MoE block.

    Args:
        block: the parent of the experts module; the router in it knows best.
        config: the text model's configuration, asked where the block says nothing.
        layer: position in lists that give one value per layer.

    Raises:
        UnsupportedModelError: neither says.
    """
    for holder in (*block.modules(), config):
        for name in _NAMES:
            value = getattr(holder, name, None)
            if isinstance(value, list | tuple) and layer < len(value):
                value = value[layer]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise UnsupportedModelError(
        f"{type(block).__name__} of {getattr(config, 'model_type', 'this model')} does not say how many experts a "
        f"token takes (looked for {', '.join(_NAMES)}), so no budget can be planned for it."
    )
