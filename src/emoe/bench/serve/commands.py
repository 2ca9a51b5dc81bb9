"""The options of `emoe bench serve`, and what it does with them. Nothing heavy is imported until it runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from emoe.bench.options import say, seed
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.bench.serve.settings import LoadSettings

SERVE = "Load on a server with OpenAI's HTTP interface: latency, throughput and goodput, by task."
INTERRUPTED = 130
_REDRAW_S, _REPORT_S = 0.25, 10.0


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Options of `emoe bench serve`."""
    parser.add_argument("url", metavar="URL", help="the server, as http://127.0.0.1:8000")
    load = parser.add_argument_group("load", "when requests come, open loop: nobody waits for an answer to send")
    add = load.add_argument
    add("--arrivals", type=Path, metavar="FILE", help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens (Azure's)")
    add("--time-scale", type=float, metavar="X", help="factor for the time between its rows; 0.1: ten times as fast")
    add("--length-scale", type=float, metavar="X", help="factor for its lengths")
    add("--start", type=int, metavar="N", help="rows to leave out at its beginning")
    add("--limit", type=int, metavar="N", help="rows to take of it (default: all)")
    add("--rate", type=float, metavar="R", help="without a file: Poisson arrivals, requests per second (default: 1)")
    add("--requests", type=int, metavar="N", help="how many of those (default: 100)")
    add("--concurrency", type=int, metavar="N", help="requests in flight at most (default: no limit)")
    add("--seed", type=seed, default=0, metavar="N", help="of arrivals, tasks and wrong labels (default: 0)")

    what = parser.add_argument_group("requests")
    add = what.add_argument
    add("--prompts", type=Path, metavar="FILE", help='JSONL of {"task", "prompt"} (default: emoe-nano\'s 64 prompts)')
    add("--task-mix", metavar="MIX", help="weights of tasks, as qa=2,converse=1 (default: uniform)")
    add(
        "--own-prompt-lengths",
        action="store_true",
        help="leave prompts as they are (default: repeat or cut them to the lengths in --arrivals)",
    )
    add(
        "--max-tokens",
        type=int,
        default=128,
        metavar="N",
        help="longest answer where neither the arrival nor the prompt says one (default: 128)",
    )
    add("--context", type=int, metavar="N", help="fitted prompt and answer at most (default: 90%% of the server's)")
    add("--ignore-eos", action="store_true", help="answers of exactly their longest length (vLLM, llama.cpp, emoe)")
    add("--endpoint", choices=("chat", "completions"), default="chat", help="default: chat")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for a whole answer (default: 600)")

    slo = parser.add_argument_group("targets", "what goodput counts; an emoe server is told them and the tasks")
    add = slo.add_argument
    add(
        "--slo",
        action="append",
        default=[],
        metavar="TASK=TTFT/TPOT",
        help="milliseconds to the first token / for each later one, - for none; without TASK= for all; repeatable "
        "(default: measured)",
    )
    add(
        "--slo-scale",
        type=float,
        metavar="X",
        help="measured targets are X times what the unloaded server needs (default: 5); given ones are multiplied by X",
    )
    add("--calibration", type=int, default=3, metavar="N", help="requests of each task to measure; 0: no targets")
    add("--no-labels", action="store_true", help="do not tell an emoe server the tasks")
    add("--wrong-labels", type=float, default=0.0, metavar="SHARE", help="tell so many requests as another task")

    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object (docs/benchmarks.md) instead of tables")
    out.add_argument("--output", type=Path, metavar="FILE", help="write that JSON object to FILE, too")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw latencies and goodput by task (.png, .svg, .pdf)")
    parser.set_defaults(run=run_serve)


def load_settings(args: argparse.Namespace) -> LoadSettings:
    """The settings that `args` ask for. Raises UsageError."""
    from emoe.bench.serve.settings import LoadSettings
    from emoe.bench.serve.targets import parse_targets

    of_file = ("time_scale", "length_scale", "start", "limit")
    of_poisson = ("rate", "requests")
    others = of_file if args.arrivals is None else of_poisson
    for name in others:
        if getattr(args, name) is not None:
            needs = "needs --arrivals" if args.arrivals is None else "is for Poisson arrivals, without --arrivals"
            raise UsageError(f"--{name.replace('_', '-')} {needs}")
    given = {name: getattr(args, name) for name in (*of_file, *of_poisson) if getattr(args, name) is not None}
    return LoadSettings(
        url=args.url,
        arrivals=args.arrivals,
        **given,
        seed=args.seed,
        task_mix=args.task_mix,
        prompts=args.prompts,
        fit_prompts=not args.own_prompt_lengths,
        max_tokens=args.max_tokens,
        context=args.context,
        targets=parse_targets(args.slo),
        slo_scale=args.slo_scale,
        calibration=args.calibration,
        labels=not args.no_labels,
        wrong_labels=args.wrong_labels,
        ignore_eos=args.ignore_eos,
        endpoint=args.endpoint,
        model=args.model,
        api_key=args.api_key,
        temperature=args.temperature,
        timeout_s=args.timeout,
        concurrency=args.concurrency,
    )


def run_serve(args: argparse.Namespace) -> int:
    """Send the load and print. Exit code 1 when not one answer was whole, 130 when it was interrupted."""
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError('`emoe bench serve` needs httpx: pip install "emoe[bench]".') from error
    import asyncio

    from emoe.bench.serve.report import report_text
    from emoe.bench.serve.run import run

    settings = load_settings(args)
    if args.plot is not None:
        from emoe.profiling.plot import check_plot

        check_plot(args.plot)
    if args.output is not None and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise UsageError(f"--output {args.output}: give a file in a folder that exists")
    progress = _Progress()
    try:
        report = asyncio.run(run(settings, say, progress))
    finally:
        progress.end()
    text = json.dumps(report.as_dict())
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else report_text(report))
    if args.plot is not None:
        from emoe.bench.serve.plot import draw

        draw(report, args.plot)
    if report.interrupted:
        return INTERRUPTED
    return 0 if report.summary().successful else 1


class _Progress:
    """Sent, answered and failed, on stderr: a line that is redrawn on a terminal, else one now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic()
        self._open = False

    def __call__(self, sent: int, answered: int, failed: int) -> None:
        now = time.monotonic()
        if now - self._shown < (_REDRAW_S if self._terminal else _REPORT_S):
            return
        self._shown = now
        line = f"{sent} sent, {answered} ended ({failed} without an answer), {sent - answered} in flight"
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            say(line)

    def end(self) -> None:
        """Leave the line."""
        if self._open:
            print(file=sys.stderr, flush=True)
