"""`emoe plan`: what a model needs and what fits, before anything is loaded."""

from __future__ import annotations

import argparse
import time
from typing import Any

from emoe.cli.options import (
    add_command,
    add_device,
    add_embeddings,
    add_expert_dtype,
    add_host_memory,
    add_json,
    add_model,
    add_process_memory,
    expert_memory,
    positive,
    size,
)
from emoe.cli.output import lossy_experts, print_json, table
from emoe.cli.speed import speed_of
from emoe.config import AUTO, format_bytes
from emoe.errors import BudgetError
from emoe.planner import Plan, facts_of, plan_facts, verdict


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "plan", run, "Say what a model needs and what fits, from headers and config alone.")
    add_model(parser)
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="what may be used where the model runs, e.g. 16GiB: of the process's memory, or of the device's "
        "(default: what is free there)",
    )
    add_device(parser)
    add_process_memory(parser)
    parser.add_argument(
        "--expert-memory",
        type=expert_memory,
        metavar="SIZE",
        help="give the experts this much instead of what is left",
    )
    add_expert_dtype(parser, cache=False)
    add_embeddings(parser)
    add_host_memory(parser)
    parser.add_argument(
        "-c",
        "--context",
        type=positive,
        metavar="N",
        help="tokens a sequence may grow to (default: 8192, or the model's most)",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument(
        "--prompt-tokens",
        type=positive,
        metavar="N",
        help="the longest prompt, read in one pass (default: the context)",
    )
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="of the predicted speed (default: all cores)"
    )
    parser.add_argument("--trace", metavar="TRACE", help="routes that the predicted speed's misses are counted on")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan. Exit code 5 when the model does not fit."""
    start = time.perf_counter()
    name, facts = facts_of(
        args.model,
        dtype=None if args.dtype == "auto" else args.dtype,
        expert_dtype=args.expert_dtype,
        revision=args.revision,
    )
    made = plan_facts(
        name,
        facts,
        memory=args.memory,
        device=args.device,
        process_memory=args.process_memory,
        expert_memory=args.expert_memory,
        embeddings=args.embeddings,
        host_memory=args.host_memory,
        context=args.context,
        batch=args.batch,
        prompt=args.prompt_tokens,
    )
    speed, told = speed_of(made, facts, threads=args.threads, trace=args.trace)
    seconds = time.perf_counter() - start
    if args.json:
        print_json(made.as_dict() | {"speed": speed, "seconds": round(seconds, 3)})
    else:
        print(plan_text(made))
        print(told)
    return BudgetError.exit_code if made.fit == "none" else 0


def plan_text(made: Plan) -> str:
    """The plan for people."""
    size = format_bytes
    many = f"{made.layers} layers x {made.experts_per_layer}, {size(made.expert_nbytes)} each"
    rows = [
        ("dense weights", size(made.dense_bytes), dense_text(made)),
        ("key-value cache", size(made.cache_bytes), f"{made.batch} x {made.context} tokens{_kinds(made)}"),
        (
            "activations",
            size(made.activation_bytes),
            f"at most, {made.batch} x {made.prompt} prompt tokens in one pass",
        ),
    ]
    process = [
        ("read buffers", size(made.buffer_bytes), "experts on their way into memory"),
        ("Python and torch", size(made.import_bytes), "before anything is loaded"),
        ("in use", size(made.runtime_bytes), "thread pools, compiled kernels"),
    ]
    resident = ("experts, resident", size(made.resident_bytes), _resident(made))
    shown = made.fit != "none" or made.on_device
    if made.on_device:
        rows += [("CUDA", size(made.device_runtime_bytes), "its context and kernels, assumed"), resident]
        rows += [(f"{made.device}, in all", size(made.total_bytes), _of_memory(made)), *process, _on_host(made)]
        rows.append(("the process, in all", size(made.process_bytes), _of_process(made)))
    else:
        rows += [*process, resident]
        rows += [("in all", size(made.total_bytes), _of_memory(made))] if shown else []
    lines = [
        f"{made.model} ({made.model_type}, {made.dtype}): {size(made.checkpoint_bytes)} at rest",
        f"  all {made.experts} experts: {size(made.expert_bytes)}  ({many}, {made.top_k} per token){stored_as(made)}",
        f"  smallest that works: {size(made.smallest_bytes)} "
        f"(experts: {size(made.floor_bytes)}, one token's of one layer)",
        "",
        table(rows, right=(1,)),
        "",
        verdict(made),
    ]
    if made.fit == "some" and made.expert_memory is None:
        form = f" --expert-dtype {made.expert_dtype}" if made.lossy else ""
        form += " --embeddings disk" if made.embeddings == "disk" else ""
        form += f" --device {made.device} --host-memory {_host_argument(made)}" if made.on_device else ""
        lines.append(f"  emoe generate {made.model} --expert-memory {_argument(made.budget_bytes)}{form} -p ...")
    if made.lossy:
        lines.append(f"LOSSY: {lossy_experts(made.expert_dtype)}")
    lines.extend(f"note: {text}" for text in made.assumed)
    return "\n".join(lines)


def dense_text(made: Plan) -> str:
    """What is said beside the bytes of the dense weights."""
    if made.embeddings == "disk":
        return f"in memory, without {format_bytes(made.lookup_bytes)} of input embedding, read from disk row by row"
    return "read for every token, always in memory"


def _on_host(made: Plan) -> tuple[str, str, str]:
    share = made.host_experts / made.experts
    what = f"{made.host_experts} of {made.experts} ({share:.0%}), pinned, of the machine's memory"
    return ("experts, on the host", format_bytes(made.host_bytes), what)


def _of_process(made: Plan) -> str:
    if made.process_limit_bytes is None:
        return ""
    return f"of {format_bytes(made.process_limit_bytes)} {made.process_source}"


def _host_argument(made: Plan) -> str:
    """Host memory to copy into a command: in bytes, where it was left open."""
    return made.host_memory if made.host_memory not in (None, AUTO) else _argument(made.host_bytes)


def stored_as(made: Plan) -> str:
    """What experts of another form than the model's own would be natively; nothing for native ones."""
    if not made.lossy:
        return ""
    share = made.expert_bytes / made.native_expert_bytes
    native = format_bytes(made.native_expert_bytes)
    return f", as {made.expert_dtype}: {share:.0%} of the {native} in {made.dtype}; every share below is of these"


def _argument(nbytes: int) -> str:
    """A size to copy into a command, at most `nbytes`: whole MiB where that loses little."""
    return f"{nbytes >> 20}MiB" if nbytes >= 100 << 20 else str(nbytes)


def _kinds(made: Plan) -> str:
    if set(made.cache_layers) == {"full"}:
        return ""
    return f", {' + '.join(f'{count} {kind}' for kind, count in made.cache_layers.items())} layers"


def _resident(made: Plan) -> str:
    if made.fit == "none" and made.expert_memory is None:
        return "the smallest that works"
    each = made.resident_experts / made.layers
    return f"{made.resident_experts} of {made.experts} ({made.resident_share:.0%}), {each:.1f} per layer"


def _of_memory(made: Plan) -> str:
    if made.memory_bytes is None:
        return ""
    return f"of {format_bytes(made.memory_bytes)} {made.memory_source}"
