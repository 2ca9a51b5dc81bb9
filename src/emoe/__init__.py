"""emoe runs Mixture-of-Experts language models in a fraction of their memory.

    model, tokenizer = emoe.load("path-or-hub-id", expert_memory="8GiB")
    emoe.stats(model)

Attributes load lazily, so that importing the package (and `emoe --help`) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emoe.model import close, load, quantise, stats

__version__ = "0.1.0"
__all__ = ["__version__", "close", "load", "quantise", "stats"]

_LAZY = {"close": "emoe.model", "load": "emoe.model", "quantise": "emoe.model", "stats": "emoe.model"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'emoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
