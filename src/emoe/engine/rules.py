"""What a model's generation configuration does to logits before a token is chosen, as `generate()` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from emoe.errors import UsageError

_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "sequence_bias": (None,),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "begin_suppress_tokens": (None,),
    "watermarking_config": (None,),
    "stop_strings": (None,),
}
"""Settings that would change the text and that the engine does not know, with the values at which they do not."""


class Rules:
    """The rules of one model: a repetition penalty, n-grams that may not repeat, tokens that are never chosen."""

    def __init__(self, config: GenerationConfig, device: torch.device) -> None:
        """Read them off the configuration.

        Raises:
            UsageError: it asks for something that would change the text and that the engine does not do.
        """
        for name, neutral in _REFUSED.items():
            value = getattr(config, name, None)
            if value not in neutral:
                raise UsageError(
                    f"the model's generation configuration sets {name}={value!r}, which continuous batching does not "
                    f"do, so the text would differ from generate()'s. Set model.generation_config.{name} = None, or "
                    "take it out of generation_config.json, to serve the model without."
                )
        rules: list[Any] = []
        if getattr(config, "repetition_penalty", None) not in (None, 1, 1.0):
            rules.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if getattr(config, "no_repeat_ngram_size", None):
            rules.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        if getattr(config, "suppress_tokens", None):
            rules.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
        self._rules = LogitsProcessorList(rules)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._rules)

    def apply(self, logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the scores to choose from.

        Args:
            logits: float32 [rows, vocabulary]; left as they are.
            tokens: of each row, the prompt and what was answered.
        """
        rows = [
            self._rules(torch.tensor([list(before)], device=logits.device), logits[row : row + 1].clone())
            for row, before in enumerate(tokens)
        ]
        return torch.cat(rows)
