"""How far fewer experts reach in the memory that the fully resident model needs (section 5.5 of the paper).

Arithmetic on the planner's facts: the longest prompt, and the largest batch, whose plan is no larger than that of the
model with every expert resident at a base length or batch. `emoe.bench.reach_run` runs what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.planner.facts import Facts
from emoe.planner.plan import make_plan

MOST = 10**7
"""Tokens or sequences beyond which nobody looks."""

Bound = Literal["memory", "positions"]


@dataclass(frozen=True, slots=True)
class Reach:
    """`found` tokens or sequences instead of `base`, in `memory_bytes`; prompts in passes of `chunk` (None: in one).

    freed_bytes: by experts that are not resident, and shorter passes; each_bytes: what one more takes, on average
    between base and found.
    """

    what: Literal["prompt", "batch"]
    base: int
    found: int
    chunk: int | None
    memory_bytes: int
    freed_bytes: int
    each_bytes: float
    bound_by: Bound

    @property
    def times(self) -> float:
        """How many times the base."""
        return self.found / self.base

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"times": self.times}


def longest_prompt(facts: Facts, memory: ExpertMemory, prompt: int, new: int, chunk: int | None = None) -> Reach:
    """The longest prompt with experts in `memory`, read in passes of `chunk` (None: in one), where everything resident
    reads one of `prompt` in one pass. `new` tokens follow in both.

    Raises:
        UsageError: a number that cannot be meant.
        BudgetError: `memory` is below the floor.
    """
    base = _bytes(facts, None, prompt, new, 1, None)
    most = MOST if facts.max_context is None else facts.max_context - new
    if most < prompt:
        raise UsageError(
            f"{prompt + new} tokens are more than the model's {facts.max_context} positions; ask for fewer"
        )
    found = _most(lambda tokens: _bytes(facts, memory, tokens, new, 1, chunk), base, most)
    before = _bytes(facts, memory, prompt, new, 1, chunk)
    return Reach(
        what="prompt",
        base=prompt,
        found=found,
        chunk=chunk,
        memory_bytes=base,
        freed_bytes=base - before,
        each_bytes=(_bytes(facts, memory, found, new, 1, chunk) - before) / max(1, found - prompt),
        bound_by="positions" if found == most else "memory",
    )


def largest_batch(
    facts: Facts, memory: ExpertMemory, prompt: int, new: int, batch: int, chunk: int | None = None
) -> Reach:
    """The most sequences of `prompt` and `new` tokens with experts in `memory`, their prompts read in passes of `chunk`
    tokens of each (None: in one), where everything resident takes `batch` of them and reads their prompts in one.

    Raises:
        UsageError: a number that cannot be meant.
        BudgetError: `memory` is below the floor.
    """
    base = _bytes(facts, None, prompt, new, batch, None)
    found = _most(lambda count: _bytes(facts, memory, prompt, new, count, chunk), base, MOST)
    taken, before = (_bytes(facts, memory, prompt, new, count, chunk) for count in (found, batch))
    return Reach(
        what="batch",
        base=batch,
        found=found,
        chunk=chunk,
        memory_bytes=base,
        freed_bytes=base - before,
        each_bytes=(taken - before) / max(1, found - batch),
        bound_by="memory",
    )


def _bytes(facts: Facts, memory: ExpertMemory | None, prompt: int, new: int, batch: int, chunk: int | None) -> int:
    """The plan's total; `memory` None: every expert resident."""
    return make_plan(
        facts,
        model="",
        expert_memory=memory or ExpertMemory("share", 1.0),
        context=prompt + new,
        prompt=prompt,
        batch=batch,
        chunk=chunk,
    ).total_bytes


def _most(bytes_of: Callable[[int], int], limit: int, most: int) -> int:
    """The largest number up to `most` whose bytes are within `limit`; they grow with it. At least 1."""
    least = 1
    while least < most:
        middle = (least + most + 1) // 2
        if bytes_of(middle) <= limit:
            least = middle
        else:
            most = middle - 1
    return least
