"""transformers' sdpa attention, with what the C kernels know computed by `emoe.kernels.attention`; and attention
with sinks, for which transformers has eager attention only, by `emoe.kernels.attention` and `emoe.kernels.sinks`.

Registered under names of their own, with sdpa's masks: models of others in the same process keep theirs.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from emoe.errors import UsageError
from emoe.kernels.attention import few_rows, many_rows, suits, suits_many
from emoe.kernels.choice import VARIABLE, Kernel, native_calls
from emoe.kernels.native.calls import Calls
from emoe.kernels.sinks import changes_mask, same_as_eager, sunk, with_sinks

FEW_ROWS_SDPA = "emoe_sdpa"
"""The name under which transformers finds `attention`."""

SINKS = "emoe_sinks"
"""The name under which transformers finds `sinks_attention`."""

INSTEAD_OF = {FEW_ROWS_SDPA: "sdpa", SINKS: "eager"}
"""What a model attends with where emoe's is not known."""

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
    calls = native_calls()
    if (
        calls is not None
        and dropout == 0
        and all(kwargs.get(name) is None for name in _THEIRS)
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))
    ):
        causal = _causal(module, query, attention_mask, kwargs.get("is_causal"))
        found = _natively(calls, query, key, value, attention_mask, scaling, None, causal)
        if found is not None:
            return found, None
    output: torch.Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )[0]
    return output, None


def _causal(module: nn.Module, query: torch.Tensor, mask: torch.Tensor | None, stated: bool | None) -> bool:
    """Whether row i sees keys up to i, as sdpa aligns it: several rows without a mask; one row sees everything."""
    stated = getattr(module, "is_causal", True) if stated is None else stated
    return bool(stated) and query.shape[2] > 1 and mask is None


def _natively(
    calls: Calls,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor | None:
    """By the C kernels, where they know such shapes."""
    if not causal and suits(query, key, value, mask):
        return few_rows(calls, query, key, value, mask, scaling, sinks)
    if suits_many(calls, query, key, value, mask, causal):
        return many_rows(calls, query, key, value, mask, scaling, sinks, causal=causal)
    return None


def sinks_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same for attention with sinks, `s_aux` [heads]; inference only.

    Raises:
        UsageError: an argument that only transformers' eager attention knows.
    """
    unknown = [name for name in _THEIRS if kwargs.get(name) is not None] + ["dropout"] * (dropout != 0)
    if unknown:
        raise UsageError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which {SINKS} does not know: load the model "
            "with attn_implementation='eager'."
        )
    calls = native_calls() if os.environ.get(VARIABLE) != "torch" else None
    causal = _causal(module, query, attention_mask, is_causal)
    if calls is not None:
        found = _natively(calls, query, key, value, attention_mask, scaling, s_aux, causal)
        if found is not None:
            return found, None
    return with_sinks(query, key, value, attention_mask, scaling, s_aux, causal), None


def choose_attention(model: PreTrainedModel, kernel: Kernel | None, asked: bool = False) -> str:
    """Let a model attend as emoe does where that is faster or takes less memory; returns what was chosen and why.

    Nothing changes where an implementation was `asked` for. A model whose attention is sdpa's gets `attention` in
    bfloat16 with the C kernels. One whose attention has sinks, for which transformers has eager attention only, gets
    `sinks_attention`, if a trial shows that it computes the same.
    """
    if asked:
        return "as attn_implementation says"
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    theirs = {part.config._attn_implementation for part in parts}
    if theirs == {"sdpa"}:
        reason = _not_few_rows(parts, model.dtype, kernel)
        if not reason:
            model.set_attn_implementation(FEW_ROWS_SDPA)
        return reason or "few rows by the C kernels, and many where `many_rows` says native; else by torch"
    if theirs == {"eager"}:
        reason = _not_sinks(model)
        if not reason:
            model.set_attn_implementation(SINKS)
        return reason or "sinks added to fused attention or in blocks, on a CPU by the C kernels where they can"
    return "its parts attend in ways of their own"


def _not_few_rows(parts: list[PreTrainedModel], dtype: torch.dtype, kernel: Kernel | None) -> str:
    """Why transformers' sdpa stays; nothing if it does not."""
    if kernel is None or kernel.name != "native":
        return "no C kernels" if kernel is None else kernel.reason
    if dtype is not torch.bfloat16:
        return "torch's own is as fast in other types than bfloat16"
    if any(_asks_for_sdpa(type(part)) for part in parts):
        # It would decide otherwise.
        return "the model's own code asks for sdpa by name"
    return ""


def _not_sinks(model: PreTrainedModel) -> str:
    """Why transformers' eager attention stays; nothing if it does not."""
    attentions = sunk(model)
    if not attentions:
        return "transformers has nothing else for this model"
    for module in attentions:
        if changes_mask(module):
            return f"{type(module).__name__} changes the mask"
        if not same_as_eager(module):
            return f"a trial of {type(module).__name__} gave other numbers"
    return ""


def _asks_for_sdpa(kind: type[PreTrainedModel]) -> bool:
    """Whether the code of a model compares its implementation's name (gemma4: which rows it may leave out)."""
    try:
        return '"sdpa"' in inspect.getsource(sys.modules[kind.__module__])
    except OSError:
        return True


AttentionInterface.register(FEW_ROWS_SDPA, attention)
AttentionMaskInterface.register(FEW_ROWS_SDPA, sdpa_mask)
AttentionInterface.register(SINKS, sinks_attention)
AttentionMaskInterface.register(SINKS, sdpa_mask)
