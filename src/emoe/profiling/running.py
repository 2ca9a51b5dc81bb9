"""Greedy answers with the times they took, and teacher-forced likelihoods: what recording and sensitivity share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from emoe.model.bind import Binding, binding_of


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer. ids: generated, the end token included; cut: a limit ended it; times in seconds, without the
    waiting for experts: of the prompt, and of the tokens after the first."""

    ids: list[int]
    cut: bool
    prefill_s: float
    decode_s: float


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token came, and how long loads had been waited for by then."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self.marks: list[tuple[float, float]] = [self._now()]

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), sum(pool.load_wait_s for pool in self._binding.pools)

    def put(self, value: Any) -> None:
        self.marks.append(self._now())

    def end(self) -> None:
        """Nothing is left over."""

    def seconds(self, first: int, last: int) -> float:
        """Between two marks, waiting for experts not counted."""
        (a, waited_a), (b, waited_b) = self.marks[first], self.marks[last]
        return max(0.0, b - a - (waited_b - waited_a))


def device_of(model: PreTrainedModel) -> torch.device:
    """Where token ids belong."""
    found: torch.device = model.get_input_embeddings().weight.device
    return found


@torch.no_grad()
def answer(model: PreTrainedModel, ids: Sequence[int], new_tokens: int) -> Answer:
    """Answer greedily with at most `new_tokens` tokens."""
    binding = binding_of(model)
    given = torch.tensor([list(ids)], device=device_of(model))
    clock = _Clock(binding)
    options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new_tokens,
        streamer=clock,
        **options,
    )
    new = output[0, len(ids) :].tolist()
    ended = bool(new) and new[-1] in binding.runtime.end_tokens
    # Marks: the start, the prompt, then every token.
    return Answer(
        new, not ended and len(new) >= new_tokens, clock.seconds(0, 2), clock.seconds(2, len(clock.marks) - 1)
    )


@torch.no_grad()
def judge(model: PreTrainedModel, ids: Sequence[int], target: Sequence[int]) -> tuple[list[int], float]:
    """What the model would say after `ids` and each part of `target`: (likeliest token at each place of the target,
    negative log-likelihood of the whole target)."""
    given = torch.tensor([[*ids, *target]], device=device_of(model))
    logits = model(input_ids=given, use_cache=False).logits[0, len(ids) - 1 : -1].float()
    wanted = given[0, len(ids) :]
    loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return logits.argmax(dim=-1).tolist(), float(loss)
