"""The options of `emoe bench`, and what its commands do with them. Nothing heavy is imported until one runs.

`emoe.cli` adds these to its own parser: `add_decode(parser)`, `add_replay(parser)`, `add_checkpoint(parser)`; each sets
`run`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from emoe.bench.options import ended_in_order, modes, say, seed, words
from emoe.bench.settings import BASELINES, NO_PREFETCH, DecodeSettings, parse_budget
from emoe.checkpoint.codecs.formats import EXPERT_DTYPES, NATIVE
from emoe.config import PREFETCHES, ExpertMemory, format_bytes, parse_bytes
from emoe.errors import UsageError

DECODE = "Decode speed at several budgets, beside plain transformers and accelerate's disk offload."
CHECKPOINT = "Write a random-weight checkpoint of a named shape, to measure on."
REPLAY = "Feed a planted checkpoint the tokens of its trace and measure. Sizes and routing are real, text is not."
REPLAY_BUDGETS = "100,80,60,40,20"


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Options of `emoe bench decode`."""
    usual = DecodeSettings()
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a checkpoint's folder or a hub id (default: emoe-nano)"
    )
    _add_measuring(parser, ",".join(f"{budget}" for budget in usual.budgets), ",".join(usual.baselines))
    for name, what in (("prompt_tokens", "length of a prompt"), ("new_tokens", "tokens to generate")):
        _add_number(parser, name, what)
    parser.set_defaults(run=run_decode, forced=False, batch=1, chunk=None)


def add_replay(parser: argparse.ArgumentParser) -> None:
    """Options of `emoe bench replay`."""
    parser.add_argument("model", metavar="DIR", help="a folder that emoe bench plant wrote")
    _add_measuring(parser, REPLAY_BUDGETS, "none")
    add = parser.add_argument
    add("--prefill", dest="prompt_tokens", type=int, default=512, metavar="N", help="tokens of a prompt (default: 512)")
    add("--decode", dest="steps", type=int, default=64, metavar="N", help="tokens fed one by one (default: 64)")
    add("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    add("--chunk", type=int, metavar="N", help="read prompts in passes of N tokens (default: in one)")
    parser.set_defaults(run=run_decode, forced=True)


def _add_number(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    option = f"--{name.replace('_', '-')}"
    usual = getattr(DecodeSettings(), name)
    parser.add_argument(option, type=int, default=usual, metavar="N", help=f"{what} (default: %(default)s)")


def _add_measuring(parser: argparse.ArgumentParser, budgets: str, baselines: str) -> None:
    """What to compare, how often, and under which conditions."""
    usual = DecodeSettings()
    add = parser.add_argument
    add(
        "--budgets",
        default=budgets,
        metavar="LIST",
        help="expert memory: 100,60,40,20 are percent; also 8GiB, 12/layer, or fit: what --memory-limit leaves "
        "(default: %(default)s)".replace("%,", "%%,"),
    )
    add("--modes", default=",".join(usual.modes), metavar="LIST", help="exact, resident (default: both)")
    add(
        "--baselines",
        default=baselines,
        metavar="LIST",
        help=f"of {','.join(BASELINES)} (accelerate-disk:BUDGET), or none (default: %(default)s)",
    )
    add("--against", metavar="NAME", help="the contender that ratios refer to (default: transformers' fastest in each)")
    _add_number(parser, "rounds", "measured generations of each contender")
    _add_number(parser, "warmups", "generations before them, not measured")
    add("-t", "--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    add("--memory-limit", metavar="SIZE", help="run each contender in a memory cgroup of this size")
    add("--cold", action="store_true", help="drop the checkpoint from the page cache before every generation")
    add("--one-at-a-time", action="store_true", help="never hold two contenders in memory")
    add("--reader", choices=("auto", "cached", "direct", "advised"), default="auto", help="how emoe reads experts")
    add("--eviction", default="", metavar="LIST", help="emoe's eviction rules, each a contender (default: emoe.load's)")
    add("--history", metavar="TRACE", help="routes of other prompts, from which next-use learns before it is measured")
    add("--expert-dtype", choices=EXPERT_DTYPES, default=NATIVE, help="emoe's experts in int8 or int4 (lossy)")
    add("--expert-cache", metavar="DIR", help="where those are kept (default: .emoe in the model's folder)")
    add("--embeddings", choices=("memory", "disk"), default="memory", help="where emoe's input embedding lies")
    add("--predictor", metavar="NAME", help="load ahead what this predictor expects; an unknown name lists all")
    add(
        "--prefetch",
        default="",
        metavar="LIST",
        help=f"emoe's prefetching, of {','.join((NO_PREFETCH, *PREFETCHES))}, each a contender (default: "
        f"{NO_PREFETCH}, or plan with a predictor)",
    )
    add("--offload-folder", metavar="DIR", help="where accelerate may write weights (default: the temporary folder)")
    add("--seed", type=seed, default=usual.seed, metavar="N", help="of random prompts")
    add("--json", action="store_true", help="print one JSON object (docs/benchmarks.md) instead of a table")


def decode_settings(args: argparse.Namespace) -> DecodeSettings:
    """The settings that `args` ask for. Raises UsageError."""
    return DecodeSettings(
        model=args.model,
        budgets=tuple(_budget(word, args) for word in words(args.budgets)),
        modes=modes(args.modes),
        baselines=tuple(word for word in words(args.baselines) if word != "none"),
        prompt_tokens=args.prompt_tokens,
        # A replay reads one token off the prompt's logits and one off each step's.
        new_tokens=args.steps + 1 if args.forced else args.new_tokens,
        rounds=args.rounds,
        warmups=args.warmups,
        threads=args.threads,
        memory_limit=None if args.memory_limit is None else parse_bytes(args.memory_limit),
        cold=args.cold,
        reader=args.reader,
        evictions=tuple(words(args.eviction)),
        history=args.history,
        baseline=args.against,
        offload_folder=args.offload_folder,
        seed=args.seed,
        one_at_a_time=args.one_at_a_time,
        expert_dtype=args.expert_dtype,
        expert_cache=args.expert_cache,
        predictor=args.predictor,
        prefetches=tuple(words(args.prefetch)),
        embeddings=args.embeddings,
        forced=args.forced,
        batch=args.batch,
        chunk=args.chunk,
    )


def _budget(word: str, args: argparse.Namespace) -> ExpertMemory:
    """A budget, or "fit": what the plan leaves for experts in the memory limit, less the 3 % that it may be off."""
    if word != "fit":
        return parse_budget(word)
    from emoe.bench.fitting import fitting_budget

    if args.memory_limit is None:
        raise UsageError("the budget fit is what --memory-limit leaves for experts; give that too")
    prompt, new = args.prompt_tokens, args.steps if args.forced else args.new_tokens
    return fitting_budget(
        args.model,
        parse_bytes(args.memory_limit),
        context=prompt + new,
        prompt=prompt,
        batch=args.batch,
        chunk=args.chunk,
        expert_dtype=args.expert_dtype,
        embeddings=args.embeddings,
    )


def run_decode(args: argparse.Namespace) -> int:
    """Measure and print. Exit code 1 when a contender failed or an exact one changed the text."""
    from emoe.bench import decode
    from emoe.bench.report import report_text

    with ended_in_order():
        report = decode.run(decode_settings(args), say)
    print(json.dumps(report.as_dict()) if args.json else report_text(report))
    return 1 if report.failed or report.inexact else 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Options of `emoe bench checkpoint`."""
    parser.add_argument("shape", metavar="SHAPE", help="its name, e.g. qwen3-moe-2.5gb; any other word lists them")
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write it")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the weights (default: 0)")
    parser.set_defaults(run=run_checkpoint)


def run_checkpoint(args: argparse.Namespace) -> int:
    """Write the checkpoint."""
    from emoe.bench.random_weights import make_checkpoint, shape_of, total_bytes

    shape = shape_of(args.shape)
    say(f"writing {shape.name}, {format_bytes(total_bytes(shape))}, to {args.folder}")
    print(make_checkpoint(shape, args.folder, args.seed))
    return 0
