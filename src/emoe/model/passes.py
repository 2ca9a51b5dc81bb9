"""What a forward pass of the model is: its tokens, and the sequences that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from emoe.errors import UsageError

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's part of a pass: rows `start` to `stop` of its tokens.

    Attributes:
        sequence: which sequence: the row of a batch, or the number that whoever announced the pass gave it.
        start, stop: its rows among all tokens of the pass.
        phase: whether it reads a prompt or answers.
        new: it is the first part of a new prompt.
        task, position, prompt_tokens: where the pass was announced, its label, how many of its tokens came before, and
            how many its whole prompt has.
    """

    sequence: int
    start: int
    stop: int
    phase: Phase
    new: bool
    task: str | None = None
    position: int = 0
    prompt_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Its tokens in this pass, padding included."""
        return self.stop - self.start


@dataclass(slots=True)
class Pass:
    """One forward pass of the model over [batch, tokens]; `mask` marks the tokens that are not padding.

    `segments` are the sequences in it: the rows of a batch, or what was `announced`: sequences that come and go, packed
    into one row, of which `ended` name those that have left since the pass before. A pass that `failed` is run again.
    `kept`: logits are asked for of the last so many tokens of each sequence; None: of all, or nobody knows.
    """

    phase: Phase = "prefill"
    batch: int = 1
    tokens: int = 1
    new_prompt: bool = True
    mask: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    segments: tuple[Segment, ...] = ()
    announced: bool = False
    ended: frozenset[int] = frozenset()
    failed: bool = False
    kept: int | None = None

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """What a call of a model's `forward` with these arguments is.

        Raises:
            UsageError: it was given no tokens.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = ids if ids is not None else kwargs.get("inputs_embeds")
        if tokens is None or tokens.dim() < 2:
            raise UsageError("the model was called without input_ids or inputs_embeds of shape [batch, tokens].")
        past = kwargs.get("past_key_values")
        seen = int(past.get_seq_length()) if past is not None and hasattr(past, "get_seq_length") else 0
        batch, length = int(tokens.shape[0]), int(tokens.shape[1])
        mask = kwargs.get("attention_mask")
        usable = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= length
        return cls(
            phase="decode" if seen and length == 1 else "prefill",
            batch=batch,
            tokens=length,
            new_prompt=seen == 0,
            mask=mask[:, -length:].reshape(-1).bool() if mask is not None and usable else None,
            input_ids=ids,
        )

    def behind(self) -> Any:
        """int64 [tokens]: how many tokens of its own sequence come after each in this pass."""
        stops = np.repeat([part.stop for part in self.segments], [part.tokens for part in self.segments])
        found: Any = stops - np.arange(len(stops)) - 1
        return found

    def answering(self) -> Any:
        """int64 [rows]: the tokens whose logits are asked for; None where these are all of them."""
        if self.kept is None or all(part.tokens <= self.kept for part in self.segments):
            return None
        return np.concatenate(
            [np.arange(max(part.start, part.stop - self.kept), part.stop) for part in self.segments], dtype=np.int64
        )

    def __post_init__(self) -> None:
        if not self.segments:
            n = self.tokens
            self.segments = tuple(
                Segment(row, row * n, row * n + n, self.phase, self.new_prompt) for row in range(self.batch)
            )
