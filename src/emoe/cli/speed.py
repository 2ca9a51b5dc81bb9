"""How fast a plan would run here: from what `emoe roofline` measured, or how to measure it."""

from __future__ import annotations

from typing import Any

from emoe.cli.routes import TRACE_TOKENS, trace_of
from emoe.planner import Facts, Plan
from emoe.profiling.kept import known, layout_of
from emoe.profiling.roofline import ModelWork
from emoe.profiling.speed import expected

CONTEXT = 512
"""Tokens before the one whose time is given, and of the prompt, where the plan allows as many."""


NEW = 64
"""Tokens after the prompt whose misses are counted: what a prompt leaves in the slots is not what they want."""


def speed_of(made: Plan, facts: Facts, *, threads: int | None, trace: str | None) -> tuple[dict[str, Any] | None, str]:
    """The speed to expect (JSON; None where it is not known), and a line for people.

    Raises:
        UsageError: what is kept of the machine is damaged, or the trace is of another model.
    """
    if made.on_device:
        return None, f"speed: predicted for the CPU only, not for {made.device}"
    files = sorted(facts.path.glob("*.safetensors")) if facts.path.is_dir() else []
    machine = known(files) if files else None
    if machine is None or not machine.engine:
        return None, "speed: not known here; `emoe roofline MODEL` measures this machine (a minute, once)"
    count = max(machine.engine) if threads is None else threads
    if count not in machine.engine:
        have = ", ".join(map(str, sorted(machine.engine)))
        return None, f"speed: measured for {have} thread(s); `emoe roofline MODEL -t {count}` measures {count}"
    if made.fit == "none" and made.expert_memory is None:
        return None, "speed: none, it does not fit"
    routes, told = trace_of(trace, TRACE_TOKENS, facts.path)
    context = min(CONTEXT, made.prompt)
    layers, work = facts.expert_layers, ModelWork(facts)
    if routes is None:
        miss_rate, waiting = 1 - made.resident_share, None
        loads = [each * miss_rate for each in work.run_by_prompt(work.uniform_distinct(context))]
    elif made.resident_share == 1:
        miss_rate, waiting, loads = 0.0, 0.0, [0.0] * len(layers)
    else:
        from emoe.simulation.missing import after_prompt, like_model

        routes = like_model(routes, len(layers), max(layer.experts for layer in layers), facts.top_k)
        size = max(layer.expert_nbytes for layer in layers)
        missed = after_prompt(
            routes, made.resident_share, context, NEW, expert_bytes=size, ends_in_experts=work.ends_in_experts
        )
        miss_rate, waiting, loads = missed.miss_rate, missed.waiting, list(missed.prompt_loads)
    direct = machine.disk_direct_bytes_per_s is not None
    speed = expected(
        facts,
        machine,
        machine.engine[count],
        miss_rate=miss_rate,
        prompt_tokens=context,
        prompt_missed_bytes=sum(n * layer.expert_nbytes for n, layer in zip(loads, layers, strict=True)),
        context=context,
        waiting=waiting,
        link="direct" if direct else "cached",
        model=machine.models.get(layout_of(facts.path), {}).get(count),
    )
    values = speed.as_dict() | {"threads": count, "context": context, "miss_rate": miss_rate, "routes": told}
    text = (
        f"speed: about {speed.tokens_per_s:.3g} tokens/s, the first of a {context}-token prompt after "
        f"{speed.first_token_s:.2g} s ({count} thread{'s' * (count > 1)}, {miss_rate:.0%} of experts missing "
        f"and read from disk; routes: {told})"
    )
    return values, text
