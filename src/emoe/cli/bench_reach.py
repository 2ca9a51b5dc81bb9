"""`emoe bench reach`: the longest prompt and the largest batch in the memory of the fully resident model."""

from __future__ import annotations

import argparse
from typing import Any

from emoe.cli.options import add_command, positive
from emoe.cli.output import note, print_json, table
from emoe.config import format_bytes

SUMMARY = "Plan the longest prompt and the largest batch that fit, with fewer experts, where all of them fitted."
CHUNKS = (None, 2048, 512, 128)
"""Passes that the longest prompt is read in: short ones hold fewer activations, and load experts more often."""


def add_parser(benchmarks: Any) -> None:
    """Add the command."""
    parser = add_command(benchmarks, "reach", run, SUMMARY)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint's folder or a hub id")
    add("--budget", default="60", metavar="SIZE", help="expert memory, 60 is percent (default: %(default)s)")
    add("--prompt", type=positive, default=512, metavar="N", help="tokens with every expert resident (default: 512)")
    add("--batch", type=positive, default=4, metavar="N", help="sequences with every expert resident (default: 4)")
    add("--new", type=positive, default=32, metavar="N", help="tokens after each prompt (default: 32)")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Plan, and say what would measure it."""
    from emoe.bench.reach import largest_batch, longest_prompt
    from emoe.bench.settings import parse_budget
    from emoe.planner import facts_of

    memory = parse_budget(args.budget)
    name, facts = facts_of(args.model)
    prompts = [longest_prompt(facts, memory, args.prompt, args.new, chunk) for chunk in CHUNKS]
    batch = largest_batch(facts, memory, args.prompt, args.new, args.batch)
    if args.json:
        print_json(
            {"model": name, "expert_memory": str(memory), "reach": [found.as_dict() for found in (*prompts, batch)]}
        )
        return 0
    rows = [("", "all experts", str(memory), "times", "memory", "freed", "one more takes", "bound by")]
    for found in (*prompts, batch):
        passes = "" if found.chunk is None else f", passes of {found.chunk}"
        rows.append(
            (
                f"{'longest prompt' if found.what == 'prompt' else 'largest batch'}{passes}",
                str(found.base),
                str(found.found),
                f"{found.times:.1f}",
                format_bytes(found.memory_bytes),
                format_bytes(found.freed_bytes),
                format_bytes(int(found.each_bytes)),
                found.bound_by,
            )
        )
    print(table(rows, right=(1, 2, 3, 4, 5, 6)))
    prompt = max(prompts, key=lambda found: found.found)  # of equal ones that with the longest passes
    chunk = "" if prompt.chunk is None else f" --chunk {prompt.chunk}"
    usual = f"emoe bench replay {args.model} --modes exact --decode {args.new} --budgets"
    note(f"measured by: {usual} {args.budget} --prefill {prompt.found}{chunk}")
    note(f"         and {usual} {args.budget} --prefill {args.prompt} --batch {batch.found}")
    note(f"      beside {usual} 100 --prefill {args.prompt} --batch {args.batch}")
    return 0
