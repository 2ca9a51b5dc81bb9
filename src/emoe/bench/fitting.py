"""The expert memory that a memory limit leaves, beside engines that live on the page cache under the same limit."""

from __future__ import annotations

from pathlib import Path

from emoe.checkpoint.codecs.formats import NATIVE
from emoe.config import Embeddings, ExpertMemory, format_bytes
from emoe.errors import BudgetError
from emoe.planner import plan

PLAN_MARGIN = 1.03
"""How much more than planned a process may take: the planner's own error, and the page cache it cannot do without."""


def fitting_budget(
    model: str | Path | None,
    limit_bytes: int,
    *,
    context: int,
    prompt: int,
    batch: int = 1,
    chunk: int | None = None,
    expert_dtype: str = NATIVE,
    embeddings: Embeddings = "memory",
) -> ExpertMemory:
    """What the plan leaves for experts in `limit_bytes`, less what it may be off, in whole MiB; "100%" where all fit.

    The lengths are those of `emoe.planner.plan`.

    Raises:
        BudgetError: it leaves less than the floor.
    """
    made = plan(
        model,
        memory=int(limit_bytes / PLAN_MARGIN),
        context=context,
        prompt=prompt,
        batch=batch,
        chunk=chunk,
        expert_dtype=expert_dtype,
        embeddings=embeddings,
    )
    if made.fit == "none":
        raise BudgetError(
            f"a memory limit of {format_bytes(limit_bytes)} is less than {made.model} needs; give at least "
            f"{format_bytes(int(made.smallest_bytes * PLAN_MARGIN))}"
        )
    return ExpertMemory("share", 1.0) if made.fit == "all" else ExpertMemory("bytes", made.budget_bytes >> 20 << 20)
