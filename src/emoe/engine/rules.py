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

from emoe.engine.refusals import refuse_generation


class Rules:
    """The rules of one model: a repetition penalty, n-grams that may not repeat, tokens that are never chosen."""

    def __init__(self, config: GenerationConfig, device: torch.device) -> None:
        """Read them off the configuration.

        Raises:
            UsageError: it asks for something that would change the text and that the engine does not do.
        """
        refuse_generation(lambda name: getattr(config, name, None))
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
