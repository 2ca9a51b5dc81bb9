"""How fast a plan would run here: from what `emoe roofline` measured, or how to measure it."""

from __future__ import annotations

from typing import Any

from emoe.cli.routes import TRACE_TOKENS, trace_of
from emoe.planner import Facts, Plan
from emoe.profiling.machine import known
from emoe.profiling.speed import expected

CONTEXT = 512
"""Tokens before the one whose time is given, and of the prompt, where the plan allows as many."""


def speed_of(made: Plan, facts: Facts, *, threads: int | None, trace: str | None) -> tuple[dict[str, Any] | None, str]:
    """The speed to expect (JSON; None where it is not known), and a line for people.

    Raises:
        UsageError: what is kept of the machine is damaged, or the trace is of another model.
    """
    files = sorted(facts.path.glob("*.safetensors")) if facts.path.is_dir() else []
    machine = known(files) if files else None
    if machine is None or not machine.engine:
        return None, "speed: not known here; `emoe roofline MODEL` measures this machine (a minute, once)"
    count = max(machine.engine) if threads is None else threads
    if count not in machine.engine:
        have = ", ".join(map(str, sorted(machine.engine)))
        return None, f"speed: measured for {have} threads; `emoe roofline MODEL -t {count}` measures {count}"
    if made.fit == "none" and made.expert_memory is None:
        return None, "speed: none, it does not fit"
    routes, told = trace_of(trace, TRACE_TOKENS, facts.path)
    context = min(CONTEXT, made.prompt)
    miss_rate = 1 - made.resident_share
    if routes is None:
        from emoe.profiling.roofline import ModelWork

        distinct = ModelWork(facts).uniform_distinct(context)
    else:
        from emoe.simulation.missing import distinct as counted
        from emoe.simulation.missing import like_model, missing

        top_k, experts = facts.top_k, max(layer.experts for layer in facts.expert_layers)
        routes = like_model(routes, len(facts.expert_layers), experts, top_k)
        (rates,) = missing(routes, [made.resident_share], bound=False)
        distinct, miss_rate = counted(routes, context), rates.policy
    touched = sum(n * layer.expert_nbytes for n, layer in zip(distinct, facts.expert_layers, strict=True))
    link = "direct" if machine.disk_direct_bytes_per_s is not None else "cached"
    speed = expected(
        facts,
        machine,
        machine.engine[count],
        miss_rate=miss_rate,
        prompt_tokens=context,
        prompt_missed_bytes=touched * (1 - made.resident_share),
        context=context,
        link="direct" if link == "direct" else "cached",
    )
    values = speed.as_dict() | {"threads": count, "context": context, "miss_rate": miss_rate, "routes": told}
    text = (
        f"speed: about {speed.tokens_per_s:.3g} tokens/s, the first of a {context}-token prompt after "
        f"{speed.first_token_s:.2g} s ({count} threads, {miss_rate:.0%} of experts missing and read from disk; "
        f"routes: {told})"
    )
    return values, text
