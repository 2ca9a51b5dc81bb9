"""`emoe quantise`: int8 or int4 experts made ahead, so that no first start has to wait for them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from emoe.checkpoint.codecs.formats import CODECS
from emoe.cli.early import refuse_early
from emoe.cli.options import add_command, add_json, add_model, positive
from emoe.cli.output import ProgressLine, lossy_experts, note, print_json
from emoe.config import format_bytes


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "quantise",
        run,
        "Store a model's experts as int8 or int4, once, for --expert-dtype of other commands.",
        aliases=["quantize"],
    )
    add_model(parser)
    parser.add_argument("--expert-dtype", choices=tuple(CODECS), required=True, help="what experts become (lossy)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="the folder that keeps them, --expert-cache of other commands (default: .emoe in the model's, or the "
        "user's cache)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("-t", "--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Make the cache, or find it. What is done stays when it is interrupted."""
    start = time.monotonic()
    refuse_early(args.model, None, args.expert_dtype)
    import torch

    import emoe
    from emoe.checkpoint.codecs.cache import Card
    from emoe.cli.session import bars_on_terminals_only

    bars_on_terminals_only()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    options: dict[str, Any] = {} if args.revision is None else {"revision": args.revision}
    if args.trust_remote_code:
        options["trust_remote_code"] = True
    written: list[int] = []
    line = ProgressLine("quantising experts")

    def progress(done: int, total: int) -> None:
        written.append(done)
        line(done, total)

    try:
        folder = emoe.quantise(
            args.model, expert_dtype=args.expert_dtype, expert_cache=args.out, progress=progress, **options
        )
    except KeyboardInterrupt:
        note("stopped; what is done is kept, and the same command goes on from there")
        raise
    card = Card.read(folder)
    values = {
        "model": args.model or "emoe-nano",
        "expert_dtype": card.codec,
        "folder": str(folder),
        "experts": card.experts,
        "bytes": card.nbytes,
        "made": bool(written),
        "seconds": round(time.monotonic() - start, 2),
    }
    if args.json:
        print_json(values)
    else:
        what = "quantised" if written else "were there already"
        print(f"{card.experts} experts, {format_bytes(card.nbytes)} as {card.codec}, {what}: {folder}")
        print(f"LOSSY: with --expert-dtype {card.codec} {lossy_experts(card.codec)}")
    return 0
