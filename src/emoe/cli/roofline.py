"""`emoe roofline`: the least time per token that this machine allows, and the share of it that was reached."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.cli.options import add_command, add_expert_dtype, add_json, add_model, positive
from emoe.cli.output import ProgressLine, note, print_json, table
from emoe.cli.routes import TRACE_TOKENS, trace_of
from emoe.config import format_bytes
from emoe.errors import UsageError
from emoe.planner import facts_of
from emoe.profiling.kept import cores, keep, known, layout_of
from emoe.profiling.machine import Machine
from emoe.profiling.measuring import measure, with_engine, with_model

if TYPE_CHECKING:
    from emoe.profiling.roofline import Floor
    from emoe.simulation.roofline import Limit

SUMMARY = "Measure this machine, and say how fast a model could run on it at each budget."


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "roofline", run, SUMMARY)
    add_model(parser)
    add_expert_dtype(parser, cache=False)
    parser.add_argument(
        "--budgets",
        type=_shares,
        default=_shares("20,40,60,80,100"),
        metavar="LIST",
        help="percent of all experts that are resident (default: 20,40,60,80,100)",
    )
    parser.add_argument(
        "--trace",
        metavar="TRACE",
        help="routes to find the misses of; a planted checkpoint has its own (default: every expert alike)",
    )
    parser.add_argument(
        "--trace-tokens", type=positive, default=TRACE_TOKENS, metavar="N", help="of them (default: %(default)s)"
    )
    parser.add_argument(
        "--policy", default="least-stale", metavar="NAME", help="eviction rule beside Belady's (default: least-stale)"
    )
    parser.add_argument("-t", "--threads", type=positive, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument(
        "-c", "--context", type=positive, default=512, metavar="N", help="tokens before the one decoded"
    )
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help="length of the prompt")
    parser.add_argument(
        "--link",
        choices=("direct", "cached", "pinned", "pageable"),
        default="direct",
        help="where missing experts come from: disk, page cache, host memory of a GPU (default: direct)",
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (default: cpu)")
    parser.add_argument("--fresh", action="store_true", help="measure the machine anew")
    parser.add_argument(
        "--measured",
        action="append",
        default=[],
        metavar="FILE",
        help="what `emoe bench decode --json` or `replay --json` printed: adds the share of the limit reached",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure where that was not done before, and print the limits."""
    measured = [each for file in args.measured for each in _measured(Path(file))]
    name, facts = facts_of(
        args.model,
        dtype=None if args.dtype == "auto" else args.dtype,
        expert_dtype=args.expert_dtype,
        revision=args.revision,
    )
    from emoe.simulation.roofline import limits

    trace, routes = trace_of(args.trace, args.trace_tokens, facts.path)
    machine = this_machine(facts.path, device=args.device, fresh=args.fresh)
    threads = args.threads or cores()
    machine = _with_engine(machine, threads, facts.path)
    found = limits(
        facts,
        machine,
        threads,
        args.budgets,
        trace=trace,
        policy=args.policy,
        context=args.context,
        prompt_tokens=args.prompt_tokens,
        link=args.link,
        report=None if trace is None else _Progress(),
    )
    reached = [_reached(limit, each) for limit in found for each in measured if each["share"] == limit.share]
    if args.json:
        print_json(
            {
                "model": name,
                "dtype": facts.dtype,
                "expert_dtype": facts.expert_dtype,
                "threads": threads,
                "link": args.link,
                "routes": routes,
                "context": args.context,
                "prompt_tokens": args.prompt_tokens,
                "machine": machine.as_dict(),
                "limits": [limit.as_dict() for limit in found],
                "measured": reached,
            }
        )
        return 0
    print(machine_text(machine))
    print(f"\n{name} ({facts.model_type}, {facts.dtype}, experts {facts.expert_dtype}), {threads} threads, {args.link}")
    print(f"routes: {routes}\n")
    print(table(_cells(found, args), right=range(1, 9)))
    if reached:
        print("\nreached:")
        print(table(_reached_cells(reached), right=range(1, 6)))
    return 0


def this_machine(folder: Path, *, device: str = "cpu", fresh: bool = False) -> Machine:
    """This machine's rates over the checkpoint in `folder`: kept ones, else measured now and kept.

    Raises:
        UsageError: what is kept is damaged, or of another machine.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    found = None if fresh else known(files, device)
    if found is None:
        note("measuring this machine, half a minute; kept for the next time")
        found = measure(files, device, say=lambda text: note(f"  {text}"))
        note(f"kept in {keep(found)}")
    return found


def _with_engine(machine: Machine, threads: int, folder: Path) -> Machine:
    """The machine with emoe's own rates and the model's, measured where they were not: `emoe plan` predicts by them."""
    found = machine
    if machine.device == "cpu":
        if threads not in found.engine:
            found = with_engine(found, [threads], lambda text: note(f"  {text}"))
        own = found.models.get(layout_of(folder), {}).get(threads) if folder.is_dir() else None
        if folder.is_dir() and (own is None or own.token is None):
            found = with_model(found, folder, threads, lambda text: note(f"  {text}"))
    if found is not machine:
        keep(found)
    return found


def machine_text(machine: Machine) -> str:
    """The machine for people."""

    def rate(value: float | None) -> str:
        return "not measured" if value is None else f"{value / 1e9:.2f} GB/s"

    lines = [", ".join(f"{name} {value}" for name, value in machine.fingerprint.items())]
    per_thread = ", ".join(f"{n}: {rate(value)}" for n, value in machine.memory_bytes_per_s.items())
    lines.append(f"  memory, by threads    {per_thread}")
    way = machine.disk_direct_way
    how = f" ({way['threads']} threads, blocks of {format_bytes(way['block_bytes'])})" if way else ""
    lines.append(f"  disk                  {rate(machine.disk_direct_bytes_per_s)}{how}")
    lines.append(f"  page cache            {rate(machine.disk_cached_bytes_per_s)}")
    for dtype, rates in machine.flops.items():
        text = ", ".join(f"{n}: {value / 1e9:.0f} GFLOP/s" for n, value in rates.items())
        lines.append(f"  {dtype:<20}  {text}")
    for n, engine in machine.engine.items():
        lines.append(
            f"  emoe, {n} thread{'s' * (n > 1):<1}        dense {rate(engine.dense_bytes_per_s)}, experts "
            f"{rate(engine.expert_bytes_per_s)}, {engine.layer_s * 1e6:.0f} us a layer"
        )
    if machine.device != "cpu":
        lines.append(
            f"  to the GPU            pinned {rate(machine.h2d_pinned_bytes_per_s)}, pageable "
            f"{rate(machine.h2d_pageable_bytes_per_s)}"
        )
        lines.append(f"  the GPU's memory      {rate(machine.device_bytes_per_s)}")
        text = ", ".join(f"{dtype} {value / 1e12:.0f} TFLOP/s" for dtype, value in machine.device_flops.items())
        lines.append(f"  the GPU's products    {text}")
    lines += [f"  note: {text}" for text in machine.notes]
    return "\n".join(lines)


def _cells(found: Sequence[Limit], args: argparse.Namespace) -> list[list[str]]:
    head = [
        "experts",
        "misses",
        "ms/token",
        "tok/s",
        "bound by",
        args.policy,
        "ms/token",
        "tok/s",
        "prompt",
        "bound by",
    ]
    lines = [head]
    for each in found:
        lines.append(
            [
                f"{each.share:.0%}",
                f"{each.missing.belady:.1%}",
                *_token(each.token),
                each.token.bound_by,
                f"{each.missing.policy:.1%}",
                *_token(each.token_policy),
                f"{each.prompt.seconds:.3g} s",
                each.prompt.bound_by,
            ]
        )
    return lines


def _token(limit: Floor) -> tuple[str, str]:
    return f"{limit.seconds * 1000:.3g}", f"{1 / limit.seconds:.3g}" if limit.seconds else "-"


def _reached(limit: Limit, measured: dict[str, Any]) -> dict[str, Any]:
    """Shares of the limit that one contender of a benchmark reached."""
    token_s, first_s = 1 / measured["tokens_per_s"], measured["first_token_s"]
    return {
        **measured,
        "of_belady": limit.token.share(token_s),
        "of_policy": limit.token_policy.share(token_s),
        "of_prompt": limit.prompt.share(first_s),
    }


def _reached_cells(reached: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = [["", "tok/s", "of Belady's limit", "of the policy's", "first token", "of the prompt's limit"]]
    lines += [
        [
            each["name"],
            f"{each['tokens_per_s']:.3g}",
            f"{each['of_belady']:.0%}",
            f"{each['of_policy']:.0%}",
            f"{each['first_token_s']:.3g} s",
            f"{each['of_prompt']:.0%}",
        ]
        for each in reached
    ]
    return lines


def _measured(file: Path) -> list[dict[str, Any]]:
    """The exact contenders of emoe in a benchmark's JSON: name, share, tokens/s, seconds to the first token."""
    try:
        values = json.loads(file.read_text())
        return [
            {
                "name": each["name"],
                "share": 1.0 if each["expert_memory"] is None else float(each["expert_memory"].rstrip("%")) / 100,
                "tokens_per_s": float(each["decode_tokens_per_s"]["median"]),
                "first_token_s": float(each["first_token_s"]["median"]),
            }
            for each in values["contenders"]
            if each["engine"] == "emoe"
            and each["mode"] == "exact"
            and each["decode_tokens_per_s"]
            and str(each["expert_memory"] or "100%").endswith("%")
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is no JSON of `emoe bench decode` or `replay` ({type(error).__name__}: {error})."
        ) from error


def _shares(text: str) -> list[float]:
    """argparse type for --budgets."""
    try:
        shares = [float(word.strip().rstrip("%")) / 100 for word in text.split(",") if word.strip()]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"must be percents of all experts like 20,40,100, not {text!r}")
    return shares


class _Progress(ProgressLine):
    """Tokens simulated."""

    def __init__(self) -> None:
        super().__init__("")

    def __call__(self, what: str, done: int, total: int) -> None:  # type: ignore[override]
        """Called with (policy, tokens done, tokens in all)."""
        self._what = what
        super().__call__(done, total)

    def line(self, done: int, total: int, seconds: float, since: int) -> str:
        """The text."""
        return f"{self._what}: {done} of {total} tokens"


__all__ = ["add_parser", "machine_text", "run", "this_machine"]
