"""`emoe bench`: hands over to the benchmarks, which have their own options."""

from __future__ import annotations

import argparse
from typing import Any

from emoe.cli.options import add_command


def add_parser(commands: Any) -> None:
    """Add the command and, below it, one for each benchmark."""
    parser = commands.add_parser("bench", help="Measure.", description="Measure.")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    summary = "Decode speed at several budgets, beside plain transformers and accelerate's disk offload."
    decode = add_command(benchmarks, "decode", run_decode, summary, add_help=False)  # its own parser has --help
    decode.add_argument("options", nargs=argparse.REMAINDER)


def run_decode(args: argparse.Namespace) -> int:
    """Hand the options that follow to the benchmark."""
    from emoe.bench import decode

    return decode.main(args.options)
