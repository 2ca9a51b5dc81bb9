"""The memory of a server before anything is loaded: KV memory and experts out of one plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from emoe.config import Embeddings, ExpertMemory, format_bytes
from emoe.errors import BudgetError, UsageError
from emoe.planner import Facts, Plan
from emoe.planner.facts import dtype_bytes
from emoe.planner.limits import CPU
from emoe.planner.plan import DEFAULT_CONTEXT, make_plan

DEFAULT_KV_TOKENS = 16384
"""KV memory by default, in tokens, unless one request or all of them together want another amount."""


PADDING_PAGES = 2
"""Pages that the paged cache of transformers keeps for the padding of a step, in which no request's tokens lie."""


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """What a server takes. `memory`: the process, with KV memory as the cache of one long sequence.

    Attributes:
        memory: bytes by purpose.
        context: the longest prompt and answer together, tokens.
        kv_tokens: tokens that KV memory holds, whole pages.
        kv_token_bytes: of one token in all layers.
        max_running, max_batch_tokens: as the engine's settings.
        expert_memory: what to load the model with, None: every expert.
    """

    memory: Plan
    context: int
    kv_tokens: int
    kv_token_bytes: int
    max_running: int
    max_batch_tokens: int

    @property
    def kv_bytes(self) -> int:
        """KV memory."""
        return self.memory.cache_bytes

    @property
    def expert_memory(self) -> ExpertMemory | None:
        """What the model is to be loaded with."""
        if self.memory.expert_memory is not None:
            return ExpertMemory.parse(self.memory.expert_memory)
        return (
            None
            if self.memory.resident_experts == self.memory.experts
            else ExpertMemory("bytes", self.memory.budget_bytes)
        )

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            BudgetError: it names what is missing and what would help.
        """
        plan = self.memory
        if not plan.process_fits:
            raise BudgetError(
                f"{plan.model} needs {format_bytes(plan.process_bytes)} of the machine's memory to be served on "
                f"{plan.device}, {format_bytes(plan.host_bytes)} of it pinned for experts; {plan.process_source} are "
                f"{format_bytes(plan.process_limit_bytes or 0)}. Lower --host-memory."
            )
        if plan.fit != "none" or plan.memory_bytes is None:
            return
        need = plan.total_bytes if plan.expert_memory is not None else plan.smallest_bytes
        raise BudgetError(
            f"{plan.model} needs {format_bytes(need)} to be served: {format_bytes(plan.rest_bytes - self.kv_bytes)} "
            f"beside experts and KV memory, {format_bytes(self.kv_bytes)} of KV memory for {self.kv_tokens} tokens and "
            f"{format_bytes(need - plan.rest_bytes)} of experts; {plan.memory_source} are "
            f"{format_bytes(plan.memory_bytes)}. Lower --kv-memory, --max-model-len or --expert-memory, or allow more "
            "with --memory."
        )

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return self.memory.as_dict() | {
            "context": self.context,
            "kv_tokens": self.kv_tokens,
            "kv_bytes": self.kv_bytes,
            "kv_token_bytes": self.kv_token_bytes,
            "max_running": self.max_running,
            "max_batch_tokens": self.max_batch_tokens,
        }


def plan_serving(
    facts: Facts,
    *,
    model: str,
    memory_bytes: int | None,
    memory_source: str = "given",
    device: str = CPU,
    process_limit_bytes: int | None = None,
    process_source: str = "",
    host_memory: ExpertMemory | str | None = None,
    expert_memory: ExpertMemory | None = None,
    embeddings: Embeddings = "memory",
    context: int | None = None,
    kv_memory_bytes: int | None = None,
    max_running: int,
    max_batch_tokens: int,
    page_tokens: int,
) -> ServingPlan:
    """Plan a server. The experts get what is left of the memory, at most all, unless `expert_memory` says otherwise.

    KV memory lies where the model runs, as `memory_bytes` does (`make_plan`).

    Without `kv_memory_bytes` KV memory holds `max_running` full contexts, but no more than 16384 tokens or one context.

    Raises:
        UsageError: a number that cannot be meant, or KV memory for less than one page.
        BudgetError: `expert_memory` is below the floor.
    """
    if context is None:
        context = min(DEFAULT_CONTEXT, facts.max_context or DEFAULT_CONTEXT)
    elif facts.max_context is not None and context > facts.max_context:
        raise UsageError(f"{model} was made for {facts.max_context} tokens, and --max-model-len is {context}; lower it")
    token_bytes = sum(layer.token_nbytes for layer in facts.cache_layers)
    if kv_memory_bytes is None:
        tokens = min(max_running * context, max(context, DEFAULT_KV_TOKENS))
        pages = -(-tokens // page_tokens)
    else:
        pages = kv_memory_bytes // max(token_bytes * page_tokens, 1) - PADDING_PAGES
    if pages < 1:
        least = token_bytes * page_tokens * (1 + PADDING_PAGES)
        raise UsageError(
            f"KV memory of {format_bytes(kv_memory_bytes or 0)} is less than one page of {page_tokens} tokens and "
            f"{PADDING_PAGES} for padding, {format_bytes(least)}; raise --kv-memory"
        )
    kv_tokens = pages * page_tokens
    # Pages are taken from all layers alike, so windows save nothing; what the layers keep beside tokens, each request
    # has for itself.
    layers = tuple(
        replace(layer, window=None, state_nbytes=layer.state_nbytes * max_running) for layer in facts.cache_layers
    )
    longest = min(context, kv_tokens)
    beside = _logits_bytes(facts, max_running, max_batch_tokens) + _gathered_bytes(facts, longest)
    # A step packs several requests: where none is as long as a step, it has more tokens than the longest prompt.
    step = min(max_batch_tokens, kv_tokens)
    room = None if memory_bytes is None else memory_bytes - beside
    made = make_plan(
        replace(facts, cache_layers=layers, max_context=None),
        model=model,
        memory_bytes=room,
        memory_source=memory_source,
        device=device,
        process_limit_bytes=process_limit_bytes,
        process_source=process_source,
        host_memory=host_memory,
        expert_memory=expert_memory,
        embeddings=embeddings,
        context=kv_tokens + PADDING_PAGES * page_tokens,
        batch=1,
        prompt=max(longest, step),
        chunk=max_batch_tokens,
    )
    made = replace(made, activation_bytes=made.activation_bytes + beside, memory_bytes=memory_bytes)
    return ServingPlan(made, context, kv_tokens, token_bytes, max_running, max_batch_tokens)


def _logits_bytes(facts: Facts, max_running: int, max_batch_tokens: int) -> int:
    """A step has logits for each of its tokens, and chooses in float32, twice over, for each request."""
    vocabulary = facts.activations.vocabulary
    return vocabulary * (max_batch_tokens * dtype_bytes(facts.dtype) + max_running * 2 * 4)


def _gathered_bytes(facts: Facts, tokens: int) -> int:
    """The keys and values that a request attends to, out of their pages: one layer's at a time."""
    return tokens * max((layer.token_nbytes for layer in facts.cache_layers), default=0)
