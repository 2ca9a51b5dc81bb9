"""Section 5.5 of the paper: the longest prompt and the largest batch in the memory that the fully resident model needs.

    python -m bench.capacity MODEL [--expert-memory 60%] [--measure] [--modes exact,resident] [--json FILE]

The arithmetic first, from the plan of `emoe serve`: M is what a server with every expert takes for one prompt of
`--prompt` tokens (for the batch: for `--batch` such requests); then the longest prompt, and the largest batch, that
a server with `--expert-memory` has room for in M. A byte of experts less is a byte of keys and values more, so

    ratio = 1 + bytes freed / (bytes of one prompt, or of one request),

which is large where the experts are many and the attention has few key-value heads, whatever emoe does.

`--measure` runs it: engines in memory cgroups of M and `--margin` percent: one prompt of `--prompt-ratio` times the
length, and the batch at `--batch-ratio` times the size, decoded together, against the fully resident model at its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from emoe.bench.cgroup import memory_cgroup
from emoe.config import ExpertMemory, format_bytes
from emoe.engine.interface import EngineSettings
from emoe.planner import facts_of
from emoe.planner.facts import Facts
from emoe.server.planning import PADDING_PAGES, ServingPlan, plan_serving

PAGE = EngineSettings().page_tokens
CHUNK = 512
LONGEST = 1 << 24


@dataclass(frozen=True, slots=True)
class Run:
    """One engine that ran inside M."""

    what: str
    requests: int
    prompt: int
    answer: int
    limit_bytes: int
    peak_rss: int
    charged: int
    ttft_s: float
    decode_tokens_per_s: float
    tokens_per_s: float


def planned(facts: Facts, context: int, requests: int, share: str | None) -> ServingPlan:
    """A server for `requests` requests of `context` tokens at once."""
    token_bytes = sum(layer.token_nbytes for layer in facts.cache_layers)
    pages = requests * -(-context // PAGE) + PADDING_PAGES
    return plan_serving(
        replace(facts, max_context=None),
        model="it",
        memory_bytes=None,
        expert_memory=ExpertMemory.parse(share or "100%"),
        context=context,
        kv_memory_bytes=pages * PAGE * token_bytes,
        max_running=requests,
        max_batch_tokens=max(CHUNK, requests),
        page_tokens=PAGE,
    )


def most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by doubling and halving; 0 where 1 does not."""
    low, high = 0, 1
    while high < LONGEST and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def arithmetic(facts: Facts, args: argparse.Namespace) -> dict[str, Any]:
    """What fits into the memory of the fully resident model; bytes."""
    length = args.prompt + args.answer
    one = planned(facts, length, 1, None).memory.total_bytes
    many = planned(facts, length, args.batch, None).memory.total_bytes
    context = most(lambda n: planned(facts, n, 1, args.expert_memory).memory.total_bytes <= one)
    requests = most(lambda n: planned(facts, length, n, args.expert_memory).memory.total_bytes <= many)
    freed = planned(facts, length, 1, None).memory.resident_bytes
    freed -= planned(facts, length, 1, args.expert_memory).memory.resident_bytes
    return {
        "freed_bytes": freed,
        "kv_token_bytes": sum(layer.token_nbytes for layer in facts.cache_layers),
        "prompt": args.prompt,
        "memory_one_bytes": one,
        "longest_context": context,
        "prompt_ratio": (context - args.answer) / args.prompt,
        "model_context": facts.max_context,
        "batch": args.batch,
        "memory_batch_bytes": many,
        "largest_batch": requests,
        "batch_ratio": requests / args.batch,
    }


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    """The arithmetic, for people."""
    freed, token = found["freed_bytes"], found["kv_token_bytes"]
    print(f"{args.model}: {args.expert_memory} of the experts leave {format_bytes(freed)}; a token has {token:,} bytes")
    print(
        f"  longest prompt in {format_bytes(found['memory_one_bytes'])} (fully resident, {args.prompt} tokens): ",
        end="",
    )
    print(f"{found['longest_context'] - args.answer:,} tokens, {found['prompt_ratio']:.0f} times (paper: 40)")
    if found["model_context"] is not None and found["longest_context"] > found["model_context"]:
        made_for = found["model_context"]
        print(f"    but the model was made for {made_for:,}: {made_for / args.prompt:.0f} times")
    print(
        f"  largest batch in {format_bytes(found['memory_batch_bytes'])} (fully resident, {args.batch} requests of ",
        end="",
    )
    print(f"{args.prompt} + {args.answer}): {found['largest_batch']}, {found['batch_ratio']:.1f} times (paper: 4.5)")


def run_here(args: argparse.Namespace) -> None:
    """In a process of its own: load, run `--requests` prompts together, print one JSON line."""
    import psutil
    import torch

    import emoe
    from emoe.engine.engine import Engine
    from emoe.engine.interface import Event, FinishedEvent, Sampling, Submission

    torch.set_num_threads(args.threads)
    model, _ = emoe.load(args.model, expert_memory=args.expert_memory, mode=args.modes)
    context = args.prompt + args.answer
    settings = EngineSettings(
        scheduler="fifo",
        max_running=args.batch,
        max_batch_tokens=max(CHUNK, args.batch),
        kv_tokens=args.batch * -(-context // PAGE) * PAGE,
        page_tokens=PAGE,
        context=context,
    )
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, context)
    engine = Engine(model, None, settings)
    times: list[list[float]] = [[] for _ in range(args.batch)]
    ended, errors = threading.Semaphore(0), list[str]()

    def listen(number: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            if not isinstance(event, FinishedEvent):
                times[number].append(event.at_s)
                return
            if event.error is not None:
                errors.append(str(event.error))
            ended.release()

        return on_event

    vocabulary = model.config.get_text_config().vocab_size
    engine.start()
    start = time.perf_counter()
    for number in range(args.batch):
        ids = [(number * 37 + i) % (vocabulary - 8) for i in range(args.prompt)]
        sampling = Sampling(temperature=0, ignore_end=True)
        engine.submit(Submission(prompt_ids=ids, max_tokens=args.answer, sampling=sampling), listen(number))
    peak = 0
    for _ in range(args.batch):
        while not ended.acquire(timeout=0.5):
            peak = max(peak, psutil.Process().memory_info().rss)
    engine.stop()
    if errors:
        raise SystemExit(errors[0])
    all_read = max(each[0] for each in times)
    last = max(each[-1] for each in times)
    late = sum(1 for each in times for at in each if at > all_read)
    status = Path("/proc/self/status").read_text()
    high = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(
        json.dumps(
            {
                "peak_rss": max(peak, high),
                "ttft_s": all_read - start,
                "decode_tokens_per_s": late / (last - all_read) if last > all_read else 0.0,
                "tokens_per_s": args.batch * args.answer / (last - start),
            }
        )
    )


def run_in(limit: int, what: str, prompt: int, requests: int, share: str, mode: str, args: argparse.Namespace) -> Run:
    """One engine in a memory cgroup."""
    words = [sys.executable, "-m", "bench.capacity", str(args.model), "--here", "--expert-memory", share]
    words += ["--modes", mode, "--prompt", str(prompt), "--batch", str(requests), "--answer", str(args.answer)]
    words += ["--threads", str(args.threads)]
    print(
        f"  {what}: {requests} x ({prompt} + {args.answer}) in {format_bytes(limit)} ...", file=sys.stderr, flush=True
    )
    with memory_cgroup(limit) as group:
        child = subprocess.Popen(
            ["sh", "-c", f'echo $$ > {group.entry} && exec "$@"', "sh", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )
        told, errors = child.communicate()
        charged, kills = group.peak_bytes or 0, group.kills
    if child.returncode:
        why = "killed by the memory limit" if kills else errors.strip().splitlines()[-1]
        raise SystemExit(f"{what} failed: {why}")
    return Run(what, requests, prompt, args.answer, limit, charged=charged, **json.loads(told.splitlines()[-1]))


def measured(found: dict[str, Any], args: argparse.Namespace) -> list[Run]:
    """The fully resident model at its own size, and every mode at the paper's multiples."""
    margin = 1 + args.margin / 100
    one, many = (int(found[name] * margin) for name in ("memory_one_bytes", "memory_batch_bytes"))
    long, large = int(args.prompt * args.prompt_ratio), int(args.batch * args.batch_ratio)
    runs = [run_in(one, "prompt, fully resident", args.prompt, 1, "100%", "exact", args)]
    modes = args.modes.split(",")
    runs += [run_in(one, f"prompt, {m} {args.expert_memory}", long, 1, args.expert_memory, m, args) for m in modes]
    runs.append(run_in(many, "batch, fully resident", args.prompt, args.batch, "100%", "exact", args))
    runs += [
        run_in(many, f"batch, {m} {args.expert_memory}", args.prompt, large, args.expert_memory, m, args) for m in modes
    ]
    return runs


def main() -> None:
    """Print the arithmetic and, if asked, a table of what ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path)
    add("--expert-memory", default="60%")
    add("--prompt", type=int, default=512)
    add("--answer", type=int, default=32)
    add("--batch", type=int, default=4, help="requests of the fully resident model (the paper's Fig. 18 starts at 4)")
    add("--prompt-ratio", type=float, default=40.0)
    add("--batch-ratio", type=float, default=4.5)
    add("--modes", default="exact,resident")
    add("--margin", type=float, default=3.0, help="percent of the limit above M")
    add("--threads", type=int, default=1)
    add("--measure", action="store_true")
    add("--here", action="store_true", help=argparse.SUPPRESS)
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.here:
        run_here(args)
        return
    _, facts = facts_of(args.model)
    found = arithmetic(facts, args)
    show(found, args)
    runs = measured(found, args) if args.measure else []
    if runs:
        print(f"\n{args.threads} thread(s); limits are M and {args.margin:g} %\n")
        print("| run | requests x prompt | limit | peak RSS | first tokens of all s | decode tok/s | answers tok/s |")
        print("|---|---|---|---|---|---|---|")
    for run in runs:
        print(
            f"| {run.what} | {run.requests} x {run.prompt:,} | {format_bytes(run.limit_bytes)} | "
            f"{format_bytes(run.peak_rss)} | {run.ttft_s:.1f} | {run.decode_tokens_per_s:.2f} | "
            f"{run.tokens_per_s:.2f} |"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found | {"runs": [asdict(run) for run in runs]}) + "\n")


if __name__ == "__main__":
    main()
