"""transformers' sdpa attention, with few query rows on a CPU computed by `emoe.kernels.attention`.

Registered under a name of its own, with sdpa's masks: models of others in the same process keep theirs.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from emoe.kernels.attention import few_rows, suits
from emoe.kernels.choice import Kernel, native_calls

FEW_ROWS_SDPA = "emoe_sdpa"
"""The name under which transformers finds `attention`."""

_THEIRS = ("position_bias", "cache", "softcap")
"""Arguments that only transformers' function reads."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the arguments of transformers' attention functions.

    Args:
        module: the attention layer.
        query: [batch, heads, rows, size].
        key, value: [batch, key heads, keys, size].
        attention_mask: as sdpa takes it; windows are in it.
        dropout, scaling, kwargs: as transformers passes them.

    Returns:
        [batch, rows, heads, size], None.
    """
    # Without a mask several rows may be causal, aligned as sdpa does it; one row sees everything.
    calls = native_calls()
    if (
        calls is not None
        and (attention_mask is not None or query.shape[2] == 1)
        and dropout == 0
        and suits(query, key, value, attention_mask)
        and all(kwargs.get(name) is None for name in _THEIRS)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))
    ):
        return few_rows(calls, query, key, value, attention_mask, scaling), None
    output: torch.Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )[0]
    return output, None


def attend_few_rows(model: PreTrainedModel, kernel: Kernel | None, asked: bool = False) -> bool:
    """Let a model whose attention is sdpa's use `attention`; returns whether it does.

    It does not where an implementation was `asked` for, without the C kernels (EMOE_KERNELS=torch), in another type
    than bfloat16, or where the model or a part of it attends in another way. Nor where the model's own code asks for
    "sdpa" by name: it would decide otherwise.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if (
        asked
        or kernel is None
        or kernel.name != "native"
        or model.dtype is not torch.bfloat16
        or any(part.config._attn_implementation != "sdpa" or _asks_for_sdpa(type(part)) for part in parts)
    ):
        return False
    model.set_attn_implementation(FEW_ROWS_SDPA)
    return True


def _asks_for_sdpa(kind: type[PreTrainedModel]) -> bool:
    """Whether the code of a model compares its implementation's name (gemma4: which rows it may leave out)."""
    try:
        return '"sdpa"' in inspect.getsource(sys.modules[kind.__module__])
    except OSError:
        return True


AttentionInterface.register(FEW_ROWS_SDPA, attention)
AttentionMaskInterface.register(FEW_ROWS_SDPA, sdpa_mask)
