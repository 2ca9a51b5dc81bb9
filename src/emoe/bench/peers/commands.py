"""The options of `emoe bench peers`, and what it does with them. Nothing heavy is imported until it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from emoe.bench.cores import parse_cores
from emoe.bench.options import ended_in_order, modes, numbers, say, words
from emoe.bench.peers.build import build_command, build_llama, cache_folder
from emoe.bench.peers.entries import LLAMA_PRECISIONS, PEERS, PeersSettings
from emoe.bench.settings import IMPLEMENTATIONS, parse_budget
from emoe.errors import UsageError

PEERS_HELP = "emoe beside transformers, accelerate, AirLLM and llama.cpp: same checkpoint, tokens, memory, threads."
INTERRUPTED = 130


def add_peers(parser: argparse.ArgumentParser) -> None:
    """Options of `emoe bench peers`."""
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="a checkpoint's folder, as emoe bench plant makes one")
    add(
        "--build-llama-cpp",
        action="store_true",
        help="first build llama.cpp into the cache, from the source package of llama-cpp-python (some minutes)",
    )
    add("--cache", metavar="DIR", help="for builds and converted checkpoints (default: emoe/peers in the user's cache)")
    add(
        "--memory-limit",
        default="40%",
        metavar="LIST",
        help="of each process, page cache included, one after the other: shares of the checkpoint's bytes (20%%,40%%), "
        "sizes, or none (default: 40%%)",
    )
    add("--budgets", metavar="LIST", help="emoe's expert memory (default: the most that the limit allows)")
    add("--modes", default="exact,resident", metavar="LIST", help="emoe's modes (default: exact,resident)")
    add("--eviction", default="", metavar="LIST", help="emoe's eviction rules, a row for each (default: emoe.load's)")
    add("--history", metavar="TRACE", help="routes of other prompts, from which next-use learns before it is measured")
    add("--threads", default="1,2", metavar="LIST", help="numbers of threads (default: 1,2)")
    add(
        "--cores",
        default="auto",
        metavar="LIST",
        help="pin each process to the first N of these for -t N; none: leave it to the system (default: all)",
    )
    add("--peers", default=",".join(PEERS), metavar="LIST", help=f"default: {','.join(PEERS)}")
    add(
        "--expert-dtypes",
        default="native",
        metavar="LIST",
        help=f"of {', '.join(LLAMA_PRECISIONS)}: emoe's --expert-dtype beside llama.cpp's "
        f"{', '.join(LLAMA_PRECISIONS.values())} experts (default: native)",
    )
    add(
        "--implementations",
        default="grouped_mm",
        metavar="LIST",
        help=f"transformers' experts implementations, of {', '.join(IMPLEMENTATIONS)} (default: grouped_mm)",
    )
    add("--prefill", type=int, default=512, metavar="N", help="tokens of the prompt (default: 512)")
    add("--decode", type=int, default=32, metavar="N", help="tokens given after it, one by one (default: 32)")
    add("--rounds", type=int, default=2, metavar="N", help="processes of each, in turn (default: 2)")
    add("--timeout", type=float, default=600.0, metavar="S", help="for loading and for the prompt (default: 600)")
    add(
        "--decode-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="of decoding; a slow engine decodes fewer tokens (default: 60)",
    )
    add(
        "--warmups",
        type=int,
        default=1,
        metavar="N",
        help="prompts before the measured one; 0 measures the first prompt of a process (default: 1)",
    )
    add("--cold", action="store_true", help="without a limit too: drop files from the page cache before each process")
    add("--check-routes", action="store_true", help="first see whether llama.cpp takes the routes that were planted")
    add("--out", type=Path, metavar="FILE", help="append each measurement to FILE; a rerun goes on after the last one")
    add("--json", action="store_true", help="print one JSON object (docs/benchmarks.md) instead of a table")
    parser.set_defaults(run=run_peers)


def peers_settings(args: argparse.Namespace) -> PeersSettings:
    """The settings that `args` ask for. Raises UsageError."""
    if args.folder is None:
        raise UsageError("name the checkpoint's folder to measure, or only --build-llama-cpp to build")
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder} is no folder; make a checkpoint with emoe bench plant")
    return PeersSettings(
        folder=args.folder.resolve(),
        cache=cache_folder(args.cache),
        memory_limits=tuple(words(args.memory_limit)),
        prefill=args.prefill,
        decode=args.decode,
        rounds=args.rounds,
        threads=numbers(args.threads, "threads"),
        peers=tuple(words(args.peers)),
        modes=modes(args.modes),
        budgets=tuple(parse_budget(word) for word in words(args.budgets or "")),
        expert_dtypes=tuple(words(args.expert_dtypes)),
        implementations=tuple(words(args.implementations)),
        cores=parse_cores(args.cores),
        evictions=tuple(words(args.eviction)),
        history=args.history,
        cold=args.cold,
        warmups=args.warmups,
        check_routes=args.check_routes,
        timeout_s=args.timeout,
        decode_s=args.decode_seconds,
        out=args.out,
    )


def run_peers(args: argparse.Namespace) -> int:
    """Build, measure and print, as asked. Exit code 1 when a row of emoe's failed (peers may), 130 interrupted."""
    if args.build_llama_cpp:
        cache = cache_folder(args.cache)
        say(f"building llama.cpp in {cache}: {' '.join(build_command(cache))}")
        print(build_llama(cache))
        if args.folder is None:
            return 0
    settings = peers_settings(args)
    from emoe.bench.peers.comparing import compare
    from emoe.bench.peers.report import report_text

    with ended_in_order():
        report = compare(settings, say)
    print(json.dumps(report.as_dict()) if args.json else report_text(report))
    if report.interrupted:
        return INTERRUPTED
    return 1 if report.failed else 0
