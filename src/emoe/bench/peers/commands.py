"""The options of `emoe bench peers`, and what it does with them. Nothing heavy is imported until it runs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from emoe.bench.peers.build import build_command, build_llama, cache_folder
from emoe.bench.peers.entries import LLAMA_PRECISIONS, PEERS, PeersSettings
from emoe.bench.settings import IMPLEMENTATIONS, parse_budget
from emoe.config import MODES, Mode
from emoe.errors import UsageError

PEERS_HELP = "emoe beside transformers, accelerate, AirLLM and llama.cpp: same checkpoint, tokens, memory, threads."


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
        metavar="SIZE",
        help="of each process, page cache included: a share of the checkpoint's bytes, a size, or none (default: 40%%)",
    )
    add("--budgets", metavar="LIST", help="emoe's expert memory (default: the most that the limit allows)")
    add("--modes", default="exact,resident", metavar="LIST", help="emoe's modes (default: exact,resident)")
    add("--threads", default="1,2", metavar="LIST", help="numbers of threads (default: 1,2)")
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
    add("--warmups", type=int, metavar="N", help="prompts before the measured one (default: 1 without a limit, else 0)")
    add("--cold", action="store_true", help="without a limit too: drop files from the page cache before each process")
    add("--check-routes", action="store_true", help="first see whether llama.cpp takes the routes that were planted")
    add("--json", action="store_true", help="print one JSON object (docs/benchmarks.md) instead of a table")
    parser.set_defaults(run=run_peers)


def peers_settings(args: argparse.Namespace) -> PeersSettings:
    """The settings that `args` ask for. Raises UsageError."""
    if args.folder is None:
        raise UsageError("name the checkpoint's folder to measure, or only --build-llama-cpp to build")
    if not args.folder.is_dir():
        raise UsageError(f"{args.folder} is no folder; make a checkpoint with emoe bench plant")
    modes: list[Mode] = []
    for word in _words(args.modes):
        found = next((mode for mode in MODES if mode == word), None)
        if found is None:
            raise UsageError(f"no mode is called {word!r}; use {', '.join(MODES)}")
        modes.append(found)
    try:
        threads = tuple(int(word) for word in _words(args.threads))
    except ValueError as error:
        raise UsageError(f"threads must be numbers, as 1,2, not {args.threads!r}") from error
    return PeersSettings(
        folder=args.folder.resolve(),
        cache=cache_folder(args.cache),
        memory_limit=None if args.memory_limit == "none" else args.memory_limit,
        prefill=args.prefill,
        decode=args.decode,
        rounds=args.rounds,
        threads=threads,
        peers=tuple(_words(args.peers)),
        modes=tuple(modes),
        budgets=tuple(parse_budget(word) for word in _words(args.budgets or "")),
        expert_dtypes=tuple(_words(args.expert_dtypes)),
        implementations=tuple(_words(args.implementations)),
        cold=args.cold,
        warmups=args.warmups,
        check_routes=args.check_routes,
        timeout_s=args.timeout,
        decode_s=args.decode_seconds,
    )


def run_peers(args: argparse.Namespace) -> int:
    """Build, measure and print, as asked. Exit code 1 when a row of emoe's failed; peers may."""
    if args.build_llama_cpp:
        cache = cache_folder(args.cache)
        _say(f"building llama.cpp in {cache}: {' '.join(build_command(cache))}")
        print(build_llama(cache))
        if args.folder is None:
            return 0
    settings = peers_settings(args)
    from emoe.bench.peers.comparing import compare
    from emoe.bench.peers.results import report_text

    # Ended from outside, the processes it started and the files they wrote must go too: as with Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = compare(settings, _say)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps(report.as_dict()) if args.json else report_text(report))
    return 1 if report.failed else 0


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _say(text: str) -> None:
    print(f"emoe: {text}", file=sys.stderr, flush=True)
