"""Feeding given tokens to a model, teacher-forced: a prompt in one pass, then the next ids one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def forced(model: Any, ids: torch.Tensor, prompt: int) -> Iterator[torch.Tensor]:
    """Run `model` over `ids` [batch, tokens] and yield the logits [batch, vocabulary] after each pass.

    The first pass reads ids[:, :prompt], every further one the next column, whatever the logits say. With prompt equal
    to the number of tokens there is one pass. Works for emoe's models and plain transformers' alike.
    """
    cache = None
    with torch.inference_mode():
        for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
            out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            yield out.logits[:, -1]
