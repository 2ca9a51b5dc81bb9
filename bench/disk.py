"""How much of a disk's bandwidth do emoe's readers reach, one expert at a time and a layer's experts in a stream?

    python bench/disk.py CHECKPOINT [--rounds 5] [--seconds 0.5] [--kinds direct]

Rounds take turns between the raw O_DIRECT rate of the same files (the best of a few ways, `emoe.profiling.disk`) and
emoe's own reader into slots, so that what disturbs the disk disturbs all alike. "one": the next expert is asked for
when the last has come, as a miss while decoding is. "stream": four loads under way, as while reading a prompt. Prints
medians, the share of the raw rate of the same round, processor seconds per GB, and what was left in the page cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch

from emoe.bench.page_cache import cached_bytes, drop
from emoe.checkpoint.source import resolve
from emoe.profiling import disk
from emoe.profiling.model_rates import ExpertReads

RAW_WAYS = ((4, 1 << 20), (8, 1 << 20), (8, 4 << 20))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--kinds", default="direct")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns(), help="which places are read (default: others every time)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = resolve(args.model)
    torch.set_num_threads(1)
    benches = {kind: ExpertReads(folder, kind, args.seed) for kind in args.kinds.split(",")}
    first = next(iter(benches.values()))
    files = list(first.index.files)
    seeds = random.Random(args.seed)

    def raw(way: tuple[int, int]) -> float:
        return disk.direct_bytes_per_s(files, *way, args.seconds, seeds.randrange(1 << 30))

    contenders: dict[str, Callable[[], float]] = {
        f"raw, {threads} threads x {block >> 20} MiB": lambda way=(threads, block): raw(way)  # type: ignore[misc]
        for threads, block in RAW_WAYS
    }
    for kind, bench in benches.items():
        contenders[f"emoe {kind}, one expert at a time"] = lambda b=bench: b.one(args.seconds)  # type: ignore[misc]
        contenders[f"emoe {kind}, stream of layers"] = lambda b=bench: b.stream(args.seconds)  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    left: dict[str, int] = dict.fromkeys(contenders, 0)
    for number in range(args.rounds):
        for name in sorted(contenders, key=lambda name: hash((number, name))):
            drop(files)
            before = cached_bytes(files)
            busy, start = time.process_time(), time.perf_counter()
            rates[name].append(contenders[name]())
            seconds = time.perf_counter() - start
            cpu[name].append((time.process_time() - busy) / (rates[name][-1] * seconds / 1e9))
            left[name] = max(left[name], cached_bytes(files) - before)
    raw_names = [name for name in rates if name.startswith("raw")]
    best = max(raw_names, key=lambda name: statistics.median(rates[name]))
    rows = [
        {
            "what": name,
            "mb_per_s": statistics.median(rates[name]) / 1e6,
            "least": min(rates[name]) / 1e6,
            "most": max(rates[name]) / 1e6,
            "share_of_raw": statistics.median(a / b for a, b in zip(rates[name], rates[best], strict=True)),
            "cpu_s_per_gb": statistics.median(cpu[name]),
            "left_in_page_cache": left[name],
        }
        for name in rates
    ]
    for bench in benches.values():
        bench.close()
    expert = first.index.stored_nbytes(*first.keys[0])
    if args.json:
        print(json.dumps({"model": str(folder), "expert_bytes": expert, "rounds": args.rounds, "rows": rows}))
        return
    print(f"{folder.name}: experts of {expert / 1e6:.1f} MB, {args.rounds} rounds of {args.seconds:g} s, of {best!r}")
    for row in rows:
        print(
            f"  {row['what']:36} {row['mb_per_s']:6.0f} MB/s ({row['least']:.0f}..{row['most']:.0f})  "
            f"{row['share_of_raw']:4.0%}  {row['cpu_s_per_gb']:.2f} CPU s/GB  "
            f"{row['left_in_page_cache'] / 1e6:.0f} MB left in the page cache"
        )


if __name__ == "__main__":
    main()
