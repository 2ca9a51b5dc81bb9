"""The sentences that say what a plan comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emoe.config import format_bytes

if TYPE_CHECKING:
    from emoe.planner.plan import Plan


def verdict(plan: Plan) -> str:
    """One or two sentences: does it fit, how, and what to do next."""
    if plan.on_device:
        return f"{_verdict(plan)} {_verdict_of_process(plan)}"
    return _verdict(plan)


def _verdict_of_process(plan: Plan) -> str:
    """The same of the machine's memory beside a GPU."""
    needs = f"{format_bytes(plan.process_bytes)}, {format_bytes(plan.host_bytes)} of it pinned"
    if plan.process_limit_bytes is None:
        return f"The process needs {needs}."
    limit = f"{format_bytes(plan.process_limit_bytes)} {plan.process_source}"
    if plan.process_fits:
        return f"The process fits: {needs}, of {limit}."
    return f"The process does not fit in {limit}: it needs {needs}; lower --host-memory."


def _fits_where_it_runs(plan: Plan) -> bool:
    return plan.memory_bytes is None or plan.total_bytes <= plan.memory_bytes


def _verdict(plan: Plan) -> str:
    full, smallest = format_bytes(plan.full_bytes), format_bytes(plan.smallest_bytes)
    if plan.expert_memory is not None:
        return _verdict_as_asked(plan)
    if plan.memory_bytes is None:
        return f"Needs {full} with every expert resident, {smallest} at the least."
    memory = format_bytes(plan.memory_bytes)
    here = " on the device" if plan.on_device else ""
    everything = plan.resident_experts == plan.experts
    if _fits_where_it_runs(plan) and everything:
        return f"Everything fits in {memory}{here}: {format_bytes(plan.total_bytes)} with every expert resident."
    if _fits_where_it_runs(plan):
        outside = "are copied from host memory or read" if plan.on_device else "are read"
        per_layer = plan.resident_experts / plan.layers
        return (
            f"{plan.resident_share:.0%} of the experts fit in {memory}{here} ({per_layer:.1f} of "
            f"{plan.experts_per_layer} per layer); the others {outside} when a token needs them."
        )
    return (
        f"Does not fit in {memory}{here}: {format_bytes(plan.rest_bytes)} is needed beside the experts, and "
        f"{format_bytes(plan.floor_bytes)} for one token's experts of one layer. The smallest memory that "
        "works is "
        f"{smallest}; a shorter context, prompt or a smaller batch lowers it."
    )


def _verdict_as_asked(plan: Plan) -> str:
    """The verdict when the experts' memory was given."""
    needs = (
        f"{format_bytes(plan.total_bytes)} with {plan.expert_memory} for experts: {plan.resident_experts} of "
        f"{plan.experts} resident ({plan.resident_share:.0%})"
    )
    if plan.memory_bytes is None:
        return f"Needs {needs}."
    memory = format_bytes(plan.memory_bytes)
    here = " on the device" if plan.on_device else ""
    if not _fits_where_it_runs(plan):
        return f"Does not fit in {memory}{here}: needs {needs}."
    return f"Fits in {memory}{here}: needs {needs}."
