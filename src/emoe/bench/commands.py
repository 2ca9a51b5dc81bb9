"""The options of `emoe bench`, and what its commands do with them. Nothing heavy is imported until one runs.

`emoe.cli` adds these to its own parser: `add_decode(parser)`, `add_checkpoint(parser)`; each sets `run`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from emoe.bench.settings import BASELINES, DecodeSettings, parse_budget
from emoe.config import MODES, Mode, format_bytes, parse_bytes
from emoe.errors import UsageError

DECODE = "Decode speed at several budgets, beside plain transformers and accelerate's disk offload."
CHECKPOINT = "Write a random-weight checkpoint of a named shape, to measure on."


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Options of `emoe bench decode`."""
    usual = DecodeSettings()
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a checkpoint's folder or a hub id (default: emoe-nano)")
    add(
        "--budgets",
        default=",".join(f"{budget}" for budget in usual.budgets),
        metavar="LIST",
        help="expert memory: 100,60,40,20 are percent; also 8GiB, 12/layer (default: %(default)s)".replace("%,", "%%,"),
    )
    add("--modes", default=",".join(usual.modes), metavar="LIST", help="exact, resident (default: both)")
    add(
        "--baselines",
        default=",".join(usual.baselines),
        metavar="LIST",
        help="transformers' experts implementations and accelerate-disk[:BUDGET], or none "
        f"(default: {','.join(BASELINES)})",
    )
    add("--against", metavar="NAME", help="the contender that ratios refer to (default: transformers' fastest in each)")
    numbers = (
        ("prompt_tokens", "length of a prompt"),
        ("new_tokens", "tokens to generate"),
        ("rounds", "measured generations of each contender"),
        ("warmups", "generations before them, not measured"),
    )
    for name, what in numbers:
        option = f"--{name.replace('_', '-')}"
        add(option, type=int, default=getattr(usual, name), metavar="N", help=f"{what} (default: %(default)s)")
    add("-t", "--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--memory-limit", metavar="SIZE", help="run each contender in a memory cgroup of this size")
    add("--cold", action="store_true", help="drop the checkpoint from the page cache before every generation")
    add("--one-at-a-time", action="store_true", help="never hold two contenders in memory")
    add("--reader", choices=("auto", "cached", "direct", "advised"), default="auto", help="how emoe reads experts")
    add("--eviction", metavar="NAME", help="emoe's eviction rule (default: emoe.load's)")
    add("--offload-folder", metavar="DIR", help="where accelerate may write weights (default: the temporary folder)")
    add("--seed", type=int, default=usual.seed, metavar="N", help="of random prompts")
    add("--json", action="store_true", help="print one JSON object (docs/benchmarks.md) instead of a table")
    parser.set_defaults(run=run_decode)


def decode_settings(args: argparse.Namespace) -> DecodeSettings:
    """The settings that `args` ask for. Raises UsageError."""
    modes: list[Mode] = []
    for word in _words(args.modes):
        found = next((mode for mode in MODES if mode == word), None)
        if found is None:
            raise UsageError(f"no mode is called {word!r}; use {', '.join(MODES)}")
        modes.append(found)
    return DecodeSettings(
        model=args.model,
        budgets=tuple(parse_budget(word) for word in _words(args.budgets)),
        modes=tuple(modes),
        baselines=tuple(word for word in _words(args.baselines) if word != "none"),
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        warmups=args.warmups,
        threads=args.threads,
        memory_limit=None if args.memory_limit is None else parse_bytes(args.memory_limit),
        cold=args.cold,
        reader=args.reader,
        eviction=args.eviction,
        baseline=args.against,
        offload_folder=args.offload_folder,
        seed=args.seed,
        one_at_a_time=args.one_at_a_time,
    )


def run_decode(args: argparse.Namespace) -> int:
    """Measure and print. Exit code 1 when a contender failed or an exact one changed the text."""
    from emoe.bench import decode
    from emoe.bench.report import report_text

    # Ended from outside, the processes it started and the files they wrote must go too: as with Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = decode.run(decode_settings(args), _say)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps(report.as_dict()) if args.json else report_text(report))
    return 1 if report.failed or report.inexact else 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Options of `emoe bench checkpoint`."""
    parser.add_argument("shape", metavar="SHAPE", help="its name, e.g. qwen3-moe-2.5gb; any other word lists them")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write it")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)")
    parser.set_defaults(run=run_checkpoint)


def run_checkpoint(args: argparse.Namespace) -> int:
    """Write the checkpoint."""
    from emoe.bench.shapes import make_checkpoint, shape_of

    shape = shape_of(args.shape)
    _say(f"writing {shape.name}, {format_bytes(shape.total_bytes)}, to {args.folder}")
    print(make_checkpoint(shape, args.folder, args.seed))
    return 0


def _say(text: str) -> None:
    print(f"emoe: {text}", file=sys.stderr, flush=True)
