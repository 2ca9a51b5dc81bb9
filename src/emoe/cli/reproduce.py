"""`emoe reproduce`: every figure and table of the paper, each with its data, a plot and a verdict."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from emoe.bench.options import ended_in_order, seed
from emoe.cli.early import refuse_early
from emoe.cli.options import add_command, add_json, positive, size
from emoe.cli.output import clock, print_json, table
from emoe.config import ExpertMemory
from emoe.errors import UsageError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "reproduce", run, "Measure again what the paper measured, and say which of its claims hold here."
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="fig1 ... table3, sec57, or all; without any, list them")
    add("--model", metavar="MODEL", help="a checkpoint's folder or a hub id (default: the embedded emoe-nano)")
    add("--out", type=Path, metavar="DIR", help="where everything goes (default: MODEL-reproduction)")
    add("--quick", action="store_true", help="a coarse pass: few prompts, short answers, few points")
    add("--prompts", type=Path, metavar="FILE", help='JSON lines: {"task", "prompt" or "messages", "reference"}')
    add(
        "--learn",
        type=Path,
        metavar="FILE",
        help="prompts to learn from, as --prompts (default: every other one of each task)",
    )
    add(
        "--trace",
        action="append",
        default=[],
        metavar="NAME=TRACE",
        help="routes of another model for the experiments that need only routes; may be repeated",
    )
    add("--arrivals", type=Path, metavar="FILE", help="request arrivals for fig12 (CSV; default: Poisson alone)")
    add(
        "--share",
        default="60%",
        metavar="PERCENT",
        help="experts that the speed experiments keep (default: 60%%, the paper's)",
    )
    add("--memory", type=size, metavar="SIZE", help="what the process may use (default: what is free)")
    add("-n", "--max-new-tokens", type=positive, default=48, metavar="N", help="tokens of an answer (default: 48)")
    add(
        "--prompt-tokens",
        type=positive,
        default=384,
        metavar="N",
        help="of a prompt at most; longer ones lose their middle (default: 384)",
    )
    add("--rejudge", action="store_true", help="judge and draw again what DIR holds, and measure nothing")
    add("--fresh", action="store_true", help="begin anew instead of going on with what DIR holds")
    add("--seed", type=seed, default=0, metavar="N", help="of everything random (default: 0)")
    add("-t", "--threads", type=positive, default=1, metavar="N", help="CPU threads (default: 1)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the named experiments. Exit code 1 when one failed."""
    from emoe.bench.reproduce.experiment import NAMES, chosen, experiment

    if not args.names:
        _list([experiment(name) for name in NAMES], args)
        return 0
    experiments = chosen(args.names)
    if args.rejudge and args.fresh:
        raise UsageError("--rejudge reads what --fresh removes: give one of the two.")
    share = ExpertMemory.parse(args.share)
    if share.kind != "share":
        raise UsageError(f"--share is a part of the experts, such as 60%, not {args.share!r}.")
    refuse_early(args.model, None)
    from emoe.cli.session import bars_on_terminals_only
    from emoe.profiling.plot import pyplot

    pyplot()  # says what to install before the work, not after it
    bars_on_terminals_only()
    from emoe.bench.reproduce.asked import Settings
    from emoe.bench.reproduce.keeping import forget
    from emoe.bench.reproduce.page import PAGE
    from emoe.bench.reproduce.running import run_all
    from emoe.bench.reproduce.workbench import Workbench
    from emoe.cli.profile import StepLine

    out = args.out or Path(f"{Path(args.model or 'emoe-nano').name}-reproduction")
    if args.fresh:
        forget(out)
    progress = StepLine()
    settings = Settings(
        out=out,
        model=args.model,
        quick=args.quick,
        seed=args.seed,
        prompts=args.prompts,
        learn=args.learn,
        traces=tuple(_named(text) for text in args.trace),
        arrivals=args.arrivals,
        threads=args.threads,
        share=str(share),
        memory=args.memory,
        new_tokens=args.max_new_tokens,
        prompt_tokens=args.prompt_tokens,
    )
    start = time.monotonic()
    with ended_in_order() as check:

        def step(of: str, done: int, total: int) -> None:
            check()
            progress.step(of, done, total)

        try:
            outcomes = run_all(Workbench(settings, step, progress.say), experiments, args.rejudge)
        except KeyboardInterrupt:
            progress.say(f"stopped; what is done is kept: the same command goes on in {out}")
            raise
    if args.json:
        print_json([_values(each) for each in outcomes])
    else:
        print(_text(outcomes))
        spent = [(each.experiment.name, each.seconds) for each in outcomes if each.seconds >= 1]
        longest = sorted(spent, key=lambda each: -each[1])[:5]
        parts = f" ({', '.join(f'{name} {clock(seconds)}' for name, seconds in longest)})" if len(spent) > 1 else ""
        print(f"\n  {out / PAGE}; {len(outcomes)} experiments in {clock(time.monotonic() - start)}{parts}")
    return 1 if any(each.failure for each in outcomes) else 0


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise UsageError(f"--trace {text!r} has no name: write NAME=TRACE, such as gpt-oss-20b=routes.npz.")
    return name, Path(path)


def _list(experiments: list[Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json([{"name": each.name, "title": each.title, "question": each.question} for each in experiments])
        return
    rows = [("name", "minutes quick, full", "question")]
    rows += [(each.name, "{:g}, {:g}".format(*each.minutes), each.question) for each in experiments]
    print(table(rows))
    print("\n  emoe reproduce NAME ... | all [--quick]   (minutes: emoe-nano, two cores)")


def _text(outcomes: list[Any]) -> str:
    rows = [("", "claim", "paper", "here", "verdict")]
    for each in outcomes:
        if each.kept is None:
            rows.append((each.experiment.name, each.failure, "", "", "failed"))
            continue
        for number, claim in enumerate(each.kept.claims):
            rows.append(
                (each.experiment.name if number == 0 else "", claim.text, claim.paper, claim.here, claim.verdict)
            )
    return table(rows)


def _values(outcome: Any) -> dict[str, Any]:
    kept = outcome.kept
    return {
        "name": outcome.experiment.name,
        "seconds": round(outcome.seconds, 2),
        "failure": outcome.failure or None,
        "claims": []
        if kept is None
        else [{name: getattr(claim, name) for name in claim.__slots__} for claim in kept.claims],
    }
