"""What the engine knows of requests before they run: task, answer length, and what they will cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from emoe.engine.batching import Slice
from emoe.engine.interface import Submission, TaskSource
from emoe.engine.tickets import Ticket
from emoe.model.bind import Binding
from emoe.scheduling.costs import CostModel
from emoe.tasks.keywords import OTHER
from emoe.tasks.profile import Profile

Array = npt.NDArray[Any]

TOKEN_S, PREFILL_TOKEN_S, EXPERT_LOAD_S = 0.02, 0.002, 0.005
"""Where there is no profile, until the first steps have been measured."""
ANSWER_TOKENS = 128.0
"""Where no profile says how long answers are, and none has been seen."""


class Knowledge:
    """Tasks, lengths and costs, from the profile and from what has been seen."""

    def __init__(self, binding: Binding, tokenizer: PreTrainedTokenizerBase | None, profile: Profile | None) -> None:
        """Without a profile (or a tokenizer) only labels say what a request's task is."""
        self._binding = binding
        self._tokenizer = tokenizer
        self._profile = profile
        self._fits = all(pool.table.all_fit for pool in binding.pools)
        self._resident: Array | None = None
        self._answers: dict[str | None, tuple[int, int]] = {}
        self._decode_wait_s = 0.0
        runtime = binding.runtime
        self._ranks = {layer: rank for rank, layer in enumerate(sorted(runtime.layers))}
        self._experts = max(layer.experts for layer in runtime.layers.values())
        timings = None if profile is None else profile.timings
        self.costs = CostModel(
            None if profile is None else profile.shape,
            self._shares,
            self._residents,
            token_s=(timings and timings.token_s) or TOKEN_S,
            prefill_token_s=(timings and timings.prefill_token_s) or PREFILL_TOKEN_S,
            expert_load_s=(timings and timings.expert_load_s) or EXPERT_LOAD_S,
        )

    def task_of(self, submission: Submission) -> tuple[str | None, TaskSource]:
        """The label, else what the prompt's keywords say."""
        if submission.task is not None:
            return submission.task, "label"
        if self._profile is None or self._tokenizer is None:
            return None, "none"
        # Keywords are looked for near both ends: not in the template's marks.
        text = self._tokenizer.decode(submission.prompt_ids, skip_special_tokens=True)
        task = self._profile.task_of(str(text))
        return (None, "none") if task == OTHER else (task, "keywords")

    def expected_tokens(self, submission: Submission, task: str | None) -> float:
        """The answer's expected length, at most `max_tokens`."""
        if submission.sampling.ignore_end:
            return float(submission.max_tokens)
        lengths = None if self._profile is None else self._profile.lengths_of(task)
        mean = self._seen_tokens(task) if lengths is None else lengths.mean
        return max(1.0, min(float(submission.max_tokens), mean))

    def note_answer(self, ticket: Ticket) -> None:
        """An answer has ended by itself: without a profile, that is how long answers of its task are."""
        tokens, answers = self._answers.get(ticket.request.task, (0, 0))
        self._answers[ticket.request.task] = (tokens + len(ticket.answer), answers + 1)

    def note_loading(
        self, tickets: Sequence[Ticket], parts: Sequence[Slice], decodes: Sequence[bool], wait_s: float
    ) -> None:
        """What reading a prompt made wait for experts, beyond what a step without prompts does: dE of Equation 3."""
        reading = [(t, part) for t, part, decode in zip(tickets, parts, decodes, strict=True) if not decode]
        if not reading:
            self._decode_wait_s += 0.05 * (wait_s - self._decode_wait_s)
        for ticket, part in reading:
            ticket.load_s += max(0.0, wait_s - self._decode_wait_s) / len(reading)
            if part.answers and not ticket.answer:
                self.costs.observe_admission(ticket.load_s)

    def _seen_tokens(self, task: str | None) -> float:
        tokens, answers = self._answers.get(task, (0, 0))
        return (ANSWER_TOKENS + tokens) / (1 + answers)

    def reads_first_prompt_alone(self) -> bool:
        """Whether the next prompt is the first of a mode that reroutes: its routes say what becomes resident."""
        runtime = self._binding.runtime
        return runtime.mode != "exact" and runtime.prompts == 0 and not self._fits

    def forget_residents(self) -> None:
        """What is resident may have changed."""
        self._resident = None

    def _shares(self, task: str | None) -> Array | None:
        return None if self._profile is None else self._profile.popularity_of(task)

    def _residents(self) -> Array | None:
        """bool [layers, experts], as of the last `forget_residents`; None where everything is."""
        if self._fits:
            return None
        if self._resident is None:
            self._resident = np.zeros((len(self._ranks), self._experts), dtype=bool)
            for pool in self._binding.pools:
                for layer in pool.table.experts:
                    self._resident[self._ranks[layer], pool.table.resident(layer)] = True
        return self._resident
