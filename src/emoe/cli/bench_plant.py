"""`emoe bench plant`: a checkpoint of a published size whose routers repeat a recorded trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emoe.bench.options import seed, share
from emoe.cli.options import add_command, positive
from emoe.cli.output import ProgressLine, note, print_json
from emoe.config import format_bytes

SUMMARY = "Write a checkpoint of a published shape whose own routers repeat a recorded trace. Its text means nothing."


def add_parser(benchmarks: Any) -> None:
    """Add the command."""
    parser = add_command(benchmarks, "plant", run, SUMMARY)
    add = parser.add_argument
    add("--shape", metavar="NAME", help="a published shape, e.g. gpt-oss-20b; any other word lists them")
    add("--trace", type=Path, metavar="TRACE", help="a trace file, or a folder with a trace.npz")
    add("--tokens", type=positive, metavar="N", help="tokens of the trace, at most the hidden size")
    add("--layers", type=positive, metavar="L", help="the first L layers only (default: all)")
    add(
        "--next-gate",
        type=share,
        metavar="SHARE",
        help="plant signs in the norms, so that the next layer's router, asked a layer early, finds this share of a "
        "token's experts, e.g. 79%% (default: all of them, which no trained model's does)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of the weights (default: 0)")
    add("--out", type=Path, required=True, metavar="DIR", help="where to write it")
    add(
        "--check",
        action="store_true",
        help="run it and compare its routes with the trace; without --shape, what is in DIR already",
    )
    add(
        "--history",
        action="store_true",
        help="without --shape: write routes of TRACE's other prompts beside what was planted from it in DIR, to learn "
        "from (writing a checkpoint does so too)",
    )
    add("--json", action="store_true", help="print one JSON object: the card, and what the check found")


def run(args: argparse.Namespace) -> int:
    """Write, check, print. Exit code 1 when a route differs from the trace, or the next gate guesses otherwise."""
    from emoe.bench.plant.card import LABEL, read_card
    from emoe.errors import UsageError

    if args.shape is not None:
        if args.trace is None or args.tokens is None:
            raise UsageError("--shape needs --trace and --tokens: what its routers are to repeat")
        _write(args)
    elif args.next_gate is not None:
        raise UsageError("--next-gate plants, so it needs --shape, --trace and --tokens; no checkpoint is changed")
    elif args.history:
        if args.trace is None:
            raise UsageError("--history needs --trace: the trace that the checkpoint was planted from")
        from emoe.bench.plant.history import HISTORY, add_history

        made = add_history(args.out, args.trace)
        note(f"{args.out / HISTORY}: {len(made)} tokens of {made.num_prompts} prompts that are never fed")
    elif not args.check:
        raise UsageError(
            "nothing to do: give --shape, --trace and --tokens to write, or --check to check --out, or --trace and "
            "--history to add a history"
        )
    card = read_card(args.out)
    found = []
    # What is tiny is always checked.
    if args.check or card.shape.startswith("tiny-"):
        from emoe.bench.plant.check import check
        from emoe.cli.session import bars_on_terminals_only

        bars_on_terminals_only()
        found = check(args.out, note)
    wrong = sum(part.wrong for part in found)
    if args.json:
        kept = ("part", "routes", "wrong", "weights_off", "next_gate", "planted", "failed")
        parts = [{name: getattr(part, name) for name in kept} for part in found]
        print_json({**card.as_dict(), "folder": str(args.out), "checked": parts, "wrong": wrong})
    else:
        print(args.out)
    note(LABEL)
    return 1 if any(part.failed for part in found) else 0


def _write(args: argparse.Namespace) -> None:
    from emoe.bench.plant.shapes import published
    from emoe.bench.plant.write import plant, summary

    shape = published(args.shape, args.layers)
    note(f"planting {shape.name}, {format_bytes(shape.expert_bytes)} of experts, in {args.out}")
    card = plant(shape, args.trace, args.tokens, args.out, args.seed, ProgressLine("writing"), args.next_gate)
    for line in summary(card, shape):
        note(line)
