"""Whether what an experiment loads fits the memory that the run may use, by the planner and before anything is loaded.

The run may use `--memory`, or what the machine has free. Where not every expert fits, the full model's answers are
recorded by exact mode with as many as do: they are the same, bit for bit. Only what is about having every expert
resident needs that.
"""

from __future__ import annotations

from emoe.bench.reproduce.asked import PAPER_SHARE
from emoe.bench.reproduce.workbench import Workbench
from emoe.config import format_bytes
from emoe.errors import BudgetError
from emoe.planner import Plan


def needed(bench: Workbench, experts: str | int | None) -> Plan:
    """The process with these experts resident (None: all of them), and whether it fits."""
    return bench.planned("100%" if experts is None else experts)


def refusal(bench: Workbench, experts: str | int | None) -> str | None:
    """Why the model cannot run with these experts resident; None where it can, or where its floor is too high.

    That one is left to loading, which says it better. Where a run is judged again nothing is loaded: all fits.
    """
    if bench.frozen:
        return None
    try:
        made = needed(bench, experts)
    except BudgetError:
        return None
    if made.fit != "none":
        return None
    what = "every expert" if experts is None else f"{experts} of the experts" if isinstance(experts, str) else "these"
    return (
        f"{bench.name} with {what} resident takes {format_bytes(made.total_bytes)}, and this run may use "
        f"{format_bytes(made.memory_bytes or 0)} ({made.memory_source}): give more --memory where there is more"
        f"{'' if experts is None else ', or a smaller --share'}."
    )


def all_resident(bench: Workbench) -> None:
    """For an experiment that compares with every expert resident.

    Raises:
        BudgetError: they do not fit.
    """
    _refuse(refusal(bench, None))


def share_resident(bench: Workbench) -> None:
    """For one that keeps `bench.share` of them.

    Raises:
        BudgetError: they do not fit.
    """
    _refuse(refusal(bench, bench.share))


def sixty_resident(bench: Workbench) -> None:
    """For one that is about the paper's 60 %.

    Raises:
        BudgetError: they do not fit.
    """
    _refuse(refusal(bench, PAPER_SHARE))


def _refuse(why: str | None) -> None:
    if why is not None:
        raise BudgetError(why)


def hours(bench: Workbench, minutes: float) -> float:
    """About how long it takes on this model what takes so many minutes on emoe-nano.

    By the bytes of weights that a token is computed with, here and there, as if all fitted. A guess within a factor of
    a few, to tell minutes from days.
    """
    from emoe import nano
    from emoe.planner import facts_of

    def of(model: object) -> float:
        facts = facts_of(None if model is None else str(model))[1]
        each = facts.expert_bytes / max(1, facts.experts)
        return OVERHEAD_BYTES + facts.dense_bytes + each * facts.top_k * len(facts.expert_layers)

    here = of(bench.folder)
    return minutes / 60 * here / of(nano.path())


OVERHEAD_BYTES = 30e6
"""What the time of emoe-nano's token is beside computing with its weights, in bytes at the rate of a real model's."""
