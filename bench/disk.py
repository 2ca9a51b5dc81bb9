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
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from emoe.bench.page_cache import cached_bytes, drop
from emoe.checkpoint.index import build_index
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.skeleton import skeleton
from emoe.checkpoint.source import resolve
from emoe.model.bind import LOADER_THREADS
from emoe.profiling import disk
from emoe.residency.bank import Bank
from emoe.residency.devices import device_at
from emoe.residency.loader import Loader

DEPTH = 4
RAW_WAYS = ((4, 1 << 20), (8, 1 << 20), (8, 4 << 20))


class Bench:
    """One checkpoint's experts, read into a bank of a few slots."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        """Open the reader."""
        self.index = build_index(folder, skeleton(folder)[1])
        self.reader = Reader(kind, self.index.files)  # type: ignore[arg-type]
        self.bank = Bank(self.index.layers[0].parts, 2 * DEPTH, device_at(torch.device("cpu")))
        parts = self.index.layers[0].parts
        alike = [layer.layer for layer in self.index.layers if layer.parts == parts]
        self.keys = [(layer, e) for layer in alike for e in range(self.index.layer(layer).num_experts)]
        self.layers = alike
        self.draw = random.Random(seed)
        self.loader = Loader(LOADER_THREADS[self.reader.kind])

    def one(self, seconds: float) -> float:
        """Bytes per second of experts drawn at random, one after another."""
        start, nbytes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            key = self.draw.choice(self.keys)
            nbytes += self.reader.read_into(self.index.pieces(*key), self.bank.views[0])
        return nbytes / (time.perf_counter() - start)

    def stream(self, seconds: float) -> float:
        """Bytes per second of whole layers, DEPTH loads under way."""
        start, nbytes = time.perf_counter(), 0
        flights: deque[object] = deque()
        while time.perf_counter() - start < seconds:
            layer = self.draw.choice(self.layers)
            for expert in range(self.index.layer(layer).num_experts):
                if len(flights) == DEPTH:
                    nbytes += self.loader.wait(flights.popleft())  # type: ignore[arg-type]
                views = self.bank.views[expert % len(self.bank.views)]
                pieces = self.index.pieces(layer, expert)
                flights.append(self.loader.submit(lambda p=pieces, v=views: self.reader.read_into(p, v), "expert"))  # type: ignore[misc]
        while flights:
            nbytes += self.loader.wait(flights.popleft())  # type: ignore[arg-type]
        return nbytes / (time.perf_counter() - start)

    def close(self) -> None:
        """Stop the threads."""
        self.loader.close()
        self.reader.close()


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
    benches = {kind: Bench(folder, kind, args.seed) for kind in args.kinds.split(",")}
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
