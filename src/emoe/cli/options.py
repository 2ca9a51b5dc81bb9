"""Options that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from emoe.bench.options import seed
from emoe.checkpoint.codecs.formats import EXPERT_DTYPES, NATIVE
from emoe.config import (
    EMBEDDINGS,
    LAYER_SPLITS,
    MODES,
    ON_MISS,
    PREFETCHES,
    ExpertMemory,
    parse_bytes,
    parse_host_memory,
)
from emoe.errors import UsageError

DTYPES = ("auto", "bfloat16", "float16", "float32")
READERS = ("auto", "cached", "direct", "advised")


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, **kwargs: Any
) -> argparse.ArgumentParser:
    """Add a command whose namespace has `run`, `debug` and itself as `parser`."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, **kwargs)
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and warnings")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and what chooses its files."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a checkpoint's folder or a hub id; without it, the embedded emoe-nano",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="what the weights run in (default: as stored)")


def add_expert_dtype(parser: argparse.ArgumentParser, *, cache: bool = True) -> None:
    """The form experts are kept in, and (with `cache`) where."""
    parser.add_argument(
        "--expert-dtype",
        choices=EXPERT_DTYPES,
        default=NATIVE,
        help="what experts are stored, read and computed as; int8 and int4 are lossy, and made once "
        "(default: native, as the model has them)",
    )
    if cache:
        parser.add_argument(
            "--expert-cache",
            metavar="DIR",
            help="the folder that keeps int8 and int4 experts (default: .emoe in the model's, or the user's cache)",
        )


def add_embeddings(parser: argparse.ArgumentParser) -> None:
    """--embeddings."""
    parser.add_argument(
        "--embeddings",
        choices=EMBEDDINGS,
        default="memory",
        help="where the input embedding lies; on disk its rows are read when they are needed, and its memory is free "
        "for experts; auto: on disk where not every expert is in memory (default: memory)",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    parser.add_argument(
        "--expert-memory",
        type=expert_memory,
        metavar="SIZE",
        help="memory for experts: 8GiB, 512MB, 40%% of them or 12/layer (default: all of them)",
    )
    add_expert_dtype(parser)
    add_embeddings(parser)
    add_host_memory(parser)
    add_device(parser)
    parser.add_argument(
        "--expert-devices",
        type=names,
        metavar="NAMES",
        help="spread every layer's experts over these devices, e.g. cuda:0,cuda:1, --device among them; the expert "
        "memory is of all together (default: experts lie with their layer)",
    )
    parser.add_argument(
        "--spread",
        choices=("auto", "always"),
        default="auto",
        help="auto: spread them only where that is faster by measurement; always (default: auto)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="exact",
        help="exact: load a missing expert and wait; resident: use the best resident one (lossy); balanced: the first "
        "where the task is sensitive to it, the second elsewhere (lossy; needs a profile)",
    )
    parser.add_argument(
        "--on-miss",
        choices=ON_MISS,
        default="load",
        help="on a GPU: load a missing expert, or hybrid: let the CPU compute it where that is faster (exact routes, "
        "CPU arithmetic for misses; default: load)",
    )
    parser.add_argument(
        "--replan-prompts",
        type=prompts_apart,
        default=1,
        metavar="N",
        help="choose the resident experts anew at every N-th prompt, in modes that reroute or with a predictor, which "
        "can also be asked when its prediction has drifted: adaptive (default: 1)",
    )
    parser.add_argument(
        "--profile", metavar="DIR", help="what `emoe profile` learned of this model (emoe-nano has its own)"
    )
    parser.add_argument(
        "--predictor", metavar="NAME", help="load ahead what this predictor expects; an unknown name lists all"
    )
    parser.add_argument(
        "--prefetch",
        choices=PREFETCHES,
        help="what is loaded ahead: a predictor's plan, or what the next layer's router would choose now (mode exact)",
    )
    parser.add_argument(
        "--layer-split",
        choices=LAYER_SPLITS,
        default="uniform",
        help="how layers share the memory: evenly, or for the fewest misses by the profile's popularity",
    )
    parser.add_argument(
        "--sensitivity-threshold",
        type=float,
        metavar="X",
        help="mode balanced: accuracy from which a layer may reroute; 0: all may, above 1: none (default: 0.85)",
    )
    parser.add_argument("--reader", choices=READERS, default="auto", help="how experts are read from disk")
    parser.add_argument(
        "--eviction",
        metavar="NAME",
        default="least-stale",
        help="which resident expert makes room: least-stale, lru, lfu, or a scorer of expected use; an unknown name "
        "lists all (default: least-stale)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="CPU threads (default: torch's; 1 for emoe-nano)"
    )
    parser.add_argument("--trace", metavar="FILE", help="record the routing to FILE")
    parser.add_argument("--task", metavar="LABEL", help="the prompts' task, for the trace and for what looks ahead")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="where the model runs: cpu, cuda, cuda:1, or auto, which spreads its layers over all GPUs (default: cpu)",
    )


def add_process_memory(parser: Any) -> None:
    """--process-memory."""
    parser.add_argument(
        "--process-memory",
        type=size,
        metavar="SIZE",
        help="on a GPU, what the process may use of the machine's memory, host memory included (default: what is free)",
    )


def add_host_memory(parser: argparse.ArgumentParser) -> None:
    """--host-memory."""
    parser.add_argument(
        "--host-memory",
        type=host_memory,
        metavar="SIZE",
        help="where experts run on a GPU, pinned RAM for the others: 16GiB, 50%% of all experts, 0, or auto: what is "
        "free (default: auto)",
    )


def add_sampling(parser: argparse.ArgumentParser, default_tokens: int | None = None) -> None:
    """How tokens are chosen. What is left out comes from the model's generation configuration."""
    parser.add_argument(
        "-n",
        "--max-new-tokens",
        type=positive,
        metavar="N",
        default=default_tokens,
        help=f"tokens of an answer at most (default: {default_tokens or 'as the model says, else 256'})",
    )
    parser.add_argument(
        "--temperature",
        "--temp",
        type=float,
        metavar="T",
        help="0 takes the likeliest token, 1 samples as trained",
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this share")
    parser.add_argument("--top-k", type=positive, metavar="K", help="sample from this many likeliest tokens")
    parser.add_argument("--seed", type=seed, metavar="N", help="makes sampling repeatable")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for `Session.generate` from the sampling options. Raises UsageError for impossible ones."""
    if args.temperature is not None and not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UsageError(f"--temperature must be a number of at least 0, not {args.temperature:g}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, not {args.top_p:g}")
    chosen = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    given = {name: value for name, value in chosen.items() if value is not None}
    if args.temperature == 0:
        if len(given) > 1:
            raise UsageError("--temperature 0 takes the likeliest token: --top-p and --top-k have no effect with it")
        given = {"do_sample": False}
    elif given:
        given["do_sample"] = True
    return given | {"seed": args.seed, "max_new_tokens": args.max_new_tokens}


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object (docs/cli.md) instead of text")


def size(text: str) -> int:
    """argparse type for bytes."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def expert_memory(text: str) -> ExpertMemory:
    """argparse type for expert memory."""
    try:
        return ExpertMemory.parse(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def host_memory(text: str) -> ExpertMemory | str | None:
    """argparse type for host memory."""
    try:
        return parse_host_memory(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def names(text: str) -> tuple[str, ...]:
    """argparse type for names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def prompts_apart(text: str) -> int | str:
    """argparse type for p: a whole number of prompts, or "adaptive"."""
    return text if text.partition(":")[0] == "adaptive" else positive(text)


def positive(text: str) -> int:
    """argparse type for a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)
