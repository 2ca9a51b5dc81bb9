"""`emoe bench reach`: the longest prompt and the largest batch in the memory of the fully resident model, planned, and
run where that is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emoe.bench.options import ended_in_order, modes, say, words
from emoe.bench.plant.card import LABEL, is_planted
from emoe.cli.options import add_command, positive
from emoe.cli.output import note, print_json, table
from emoe.config import format_bytes
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.bench.reach import Reach
    from emoe.bench.reach_run import Run

SUMMARY = (
    "Plan the longest prompt and the largest batch that fit, with fewer experts, where all of them fitted; with --run, "
    "also run them."
)
RUNS = ("prompt", "batch")
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
    add("--chunk", type=positive, metavar="N", help="read the prompts of the largest batch in passes of N tokens")
    add("--run", dest="runs", default="", metavar="LIST", help="prompt, batch: replay them too (a planted checkpoint)")
    add("--modes", default="exact", metavar="LIST", help="of the runs with fewer experts: exact, resident (lossy)")
    add("--most-times", type=positive, default=40, metavar="X", help="run at most X times the base (default: 40)")
    add("--rounds", type=positive, default=1, metavar="N", help="of each run, in turns (default: 1)")
    add("-t", "--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add("--reader", choices=("auto", "cached", "direct", "advised"), default="auto", help="how runs read experts")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Plan, and run what is asked for or say what would. Exit code 1 when a run failed."""
    from emoe.bench.reach import largest_batch, longest_prompt
    from emoe.bench.settings import parse_budget
    from emoe.planner import facts_of

    memory = parse_budget(args.budget)
    name, facts = facts_of(args.model)
    asked = words(args.runs)
    unknown = [word for word in asked if word not in RUNS]
    if unknown:
        raise UsageError(f"{unknown[0]!r} cannot be run; use {', '.join(RUNS)}")
    if asked and not is_planted(facts.path):
        raise UsageError(f"{name} is no planted checkpoint, which runs need: see `emoe bench plant`")
    prompts = [longest_prompt(facts, memory, args.prompt, args.new, chunk) for chunk in CHUNKS]
    batch = largest_batch(facts, memory, args.prompt, args.new, args.batch, args.chunk)
    reaches = [*prompts, batch]
    if not args.json:
        print(planned_table(reaches, str(memory)))
    runs = _run(args, reaches) if asked else []
    if args.json:
        values: dict[str, Any] = {"reach": [found.as_dict() for found in reaches]}
        print_json({"model": name, "expert_memory": str(memory), **values, "runs": [each.as_dict() for each in runs]})
    elif runs:
        print(f"\n{runs_text(runs)}")
    else:
        sizes = {"prompt": 512, "batch": 4, "new": 32, "chunk": None}
        given = [f"--{name} {getattr(args, name)}" for name, usual in sizes.items() if getattr(args, name) != usual]
        words_of = [
            "measured by: emoe bench reach",
            args.model,
            f"--budget {args.budget}",
            *given,
            "--run prompt,batch",
        ]
        note(" ".join(words_of))
    return 1 if any(each.error is not None for each in runs) else 0


def _run(args: argparse.Namespace, reaches: Sequence[Reach]) -> list[Run]:
    """The runs that are asked for, measured."""
    from emoe.bench.reach_run import measure, runs_of, to_run
    from emoe.bench.settings import DecodeSettings, parse_budget

    usual = DecodeSettings(
        model=args.model,
        modes=("exact",),
        baselines=(),
        new_tokens=args.new + 1,
        warmups=0,
        threads=args.threads,
        reader=args.reader,
    )
    made = []
    for what in words(args.runs):
        found = to_run(reaches, what, args.most_times)
        made.append(runs_of(found, parse_budget(args.budget), modes(args.modes), args.prompt))
    with ended_in_order():
        for runs in made:
            measure(runs, usual, args.rounds, say)
    return [each for runs in made for each in runs]


def planned_table(reaches: Sequence[Reach], memory: str) -> str:
    """What was planned, for people."""
    rows = [("", "all experts", memory, "times", "memory", "freed", "one more takes", "bound by")]
    for found in reaches:
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
    return table(rows, right=(1, 2, 3, 4, 5, 6))


def runs_text(runs: Sequence[Run]) -> str:
    """What was run, for people: peaks beside plans, times, and what a larger batch gains."""
    from emoe.bench.reach_run import gains, middle

    head = ("experts", "prompt", "batch", "passes of", "plan", "peak", "off", "first token s", "tok/s", "with prompts")
    rows: list[tuple[str, ...]] = [head]
    for each in runs:
        times = [middle(each.first_token_s), middle(each.decode_tokens_per_s), middle(each.answered_per_s)]
        rows.append(
            (
                f"{each.expert_memory} {each.mode}",
                str(each.prompt),
                str(each.batch),
                "" if each.chunk is None else str(each.chunk),
                format_bytes(each.plan_bytes),
                "-" if each.off is None else format_bytes(max(each.peak_bytes)),
                "-" if each.off is None else f"{each.off:+.1%}",
                *(
                    "-" if value is None else f"{value:.3g}{unit}"
                    for value, unit in zip(times, (" s", "", ""), strict=True)
                ),
            )
        )
    lines = [table(rows, right=range(1, len(head)))]
    lines += [f"{each.expert_memory} {each.mode}: {each.error}" for each in runs if each.error is not None]
    for each, decoding, answering in gains(runs):
        lines.append(
            f"{each.batch} sequences with {each.expert_memory} {each.mode}: {decoding:.2f} times the tokens/s of "
            f"decoding, {answering:.2f} times with the prompts"
        )
    lines.append(f"bytes above the imports; rounds in turns; {LABEL}")
    return "\n".join(lines)
