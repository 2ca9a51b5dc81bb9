"""emoe on a CUDA device: correctness first, then speed at 100, 60, 40 and 20 % of the experts, host tier or not.

    make bench-gpu                                 both shapes, in under 8 minutes
    python bench/gpu.py --virtual --shapes tiny    the same code on the CPU, to see that it runs; times mean nothing

Needs torch, transformers, pytest and this repository; no network. Random checkpoints are written to a temporary folder.
Decoding is greedy and every budget must give the tokens of the fully resident model. Prints a table in markdown, writes
everything to --out as JSON, and ends with 2 where there is no CUDA device, 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import emoe
from emoe.bench.decode import machine
from emoe.bench.prompts import prompt_ids
from emoe.bench.shapes import make_checkpoint
from emoe.config import format_bytes
from emoe.model import close, placement
from emoe.residency.devices import device_at
from emoe.residency.transfers import copy_seconds
from emoe.residency.virtual import VirtualDevice

ROOT = Path(__file__).parent.parent
TESTS = ("tests/cuda", "tests/kernels/test_slots.py")
SHAPES = ("qwen3-moe-2.5gb", "mixtral-1.2gb")
BUDGETS = (100, 60, 40, 20)
COLUMNS = (
    "experts on the device",
    "host tier",
    "misses",
    "ttft, s",
    "tokens/s",
    "copied, MB/token",
    "link busy at least",
    "read from disk, MB/token",
    "waits/token",
    "device memory",
)
COPIES = (1 << 20, 8 << 20, 64 << 20)


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), help="%% of the experts on the device")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=440, help="start nothing new after this long (default 440)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--virtual", action="store_true", help="a virtual device on the CPU; its times mean nothing")
    args = parser.parse_args()
    if not args.virtual and not torch.cuda.is_available():
        print(f"bench/gpu.py needs a CUDA device, and torch {torch.__version__} sees none.", file=sys.stderr)
        return 2
    if args.virtual:
        placement.device_at = lambda place: VirtualDevice(2e10)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="emoe-bench-gpu-") as temporary:
        return Bench(args, args.folder or Path(temporary)).run()


class Bench:
    """One run of everything."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.begun = time.monotonic()
        self.place = torch.device("cpu" if args.virtual else "cuda")
        self.found: dict[str, Any] = {"machine": describe(args.virtual), "tests": None, "copies": [], "rows": []}
        self.wrong: list[str] = []

    def run(self) -> int:
        """Tests, copies, tables; the exit code."""
        print(f"# emoe on {self.found['machine']['device']}\n", flush=True)
        if not self.args.skip_tests:
            self.test()
        self.copies()
        for shape in self.args.shapes:
            self.shape(shape)
        self.found["wrong"] = self.wrong
        self.found["seconds"] = round(time.monotonic() - self.begun, 1)
        self.args.out.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"\n{self.found['seconds']} s in all; all figures are in {self.args.out}")
        for each in self.wrong:
            print(f"WRONG: {each}")
        return 1 if self.wrong else 0

    def left(self) -> float:
        """Seconds until nothing new is started."""
        return float(self.args.seconds) - (time.monotonic() - self.begun)

    def test(self) -> None:
        """The tests that need the device, in a process of their own."""
        paths = [str(ROOT / path) for path in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        try:
            done = subprocess.run(
                command,
                check=False,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(60, self.left() / 2),
            )
            lines, code = (done.stdout + done.stderr).strip().splitlines(), done.returncode
        except subprocess.TimeoutExpired as late:
            lines, code = [f"not done after {late.timeout:.0f} s"], 1
        self.found["tests"] = {"returned": code, "end": lines[-30:]}
        print(f"Tests ({' '.join(TESTS)}): {lines[-1] if lines else 'no output'}\n", flush=True)
        if code:
            print("\n".join(lines[-30:]))
            self.wrong.append("the tests that need a CUDA device failed")

    def copies(self) -> None:
        """The link's bandwidth from pinned and from pageable memory."""
        device = VirtualDevice(2e10) if self.args.virtual else device_at(self.place)
        print("| copy | pinned, GB/s | pageable, GB/s |\n|---|---|---|")
        for nbytes in COPIES:
            target = device.bank(nbytes)
            held = device.host(nbytes)
            pinned = nbytes / copy_seconds(device, held.memory, target, 9) / 1e9
            pageable = nbytes / copy_seconds(device, torch.zeros(nbytes, dtype=torch.uint8), target, 9) / 1e9
            device.free_host(held)
            found = {"nbytes": nbytes, "pinned": pinned, "pageable": pageable, "notice": held.notice}
            self.found["copies"].append(found)
            print(f"| {format_bytes(nbytes)} | {pinned:.1f} | {pageable:.1f} |{held.notice}")
        print(flush=True)

    def shape(self, shape: str) -> None:
        """One shape's table."""
        start = time.monotonic()
        path = make_checkpoint(shape, self.folder / shape)
        print(f"## {shape} (written in {time.monotonic() - start:.0f} s)\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
        expected: list[int] | None = None
        for budget, host, on_miss in self.ways():
            if self.left() < 0:
                print(f"| {budget} % | {host} | not run: {self.args.seconds:.0f} s are over |")
                continue
            row = self.row(path, budget, host, on_miss)
            row |= {"shape": shape, "budget": budget, "host": host, "on_miss": on_miss}
            self.found["rows"].append(row)
            expected = expected or row["tokens"]
            same = row["tokens"] == expected
            if not same and on_miss == "load":
                self.wrong.append(f"{shape} at {budget} %, host {host}: other tokens than with every expert resident")
            print(self.line(row, same), flush=True)
        print()

    def ways(self) -> Iterator[tuple[int, str, str]]:
        """(budget, host memory, on_miss) of each row."""
        for budget in self.args.budgets:
            yield budget, "auto", "load"
            if budget < 100:
                yield budget, "0", "load"
                yield budget, "auto", "hybrid"

    def line(self, row: dict[str, Any], same: bool) -> str:
        """A row of the table."""
        host = "staging only" if row["host"] == "0" else "not needed" if row["budget"] == 100 else "all that is free"
        host += ", hybrid" * (row["on_miss"] == "hybrid")
        cells = [
            f"{row['budget']} %", host, f"{row['miss_rate']:.1%}", f"{row['ttft_s']:.3f}",
            f"{row['tokens_per_s']:.1f}", f"{row['copied_per_token'] / 1e6:.1f}", f"{row['link_share']:.0%}",
            f"{row['read_per_token'] / 1e6:.1f}", f"{row['waits_per_token']:.1f}", format_bytes(row["device_bytes"]),
        ]  # fmt: skip
        note = "" if same else " other tokens" + (" (CPU arithmetic)" if row["on_miss"] == "hybrid" else ": WRONG")
        return "| " + " | ".join(cells) + " |" + note

    def row(self, path: Path, budget: int, host: str, on_miss: str) -> dict[str, Any]:
        """Load, warm up, measure; medians over rounds."""
        if not self.args.virtual:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model, _ = emoe.load(
            path,
            device_map=str(self.place),
            expert_memory=None if budget == 100 else f"{budget}%",
            host_memory=host,
            on_miss=on_miss,  # type: ignore[arg-type]
        )
        loaded_s = time.perf_counter() - start
        try:
            waits = self.generate(model, path, -1, count=True)["waits"]
            samples = [self.generate(model, path, number) for number in range(self.args.rounds)]
            stats = emoe.stats(model)
        finally:
            close(model)
        decodes = [sample["decode"] for sample in samples]
        steps = max(1, self.args.new_tokens - 1)
        link_s = 0.0
        if self.found["copies"]:
            link_s = sum(d["bytes_copied"] for d in decodes) / (self.found["copies"][-1]["pinned"] * 1e9)
        hits, misses = sum(d["hits"] for d in decodes), sum(d["misses"] for d in decodes)
        return {
            "loaded_s": loaded_s,
            "tokens": [token for sample in samples for token in sample["tokens"]],
            "ttft_s": statistics.median(sample["ttft_s"] for sample in samples),
            "tokens_per_s": statistics.median(steps / sample["decode_s"] for sample in samples),
            "miss_rate": misses / max(1, hits + misses),
            "copied_per_token": sum(d["bytes_copied"] for d in decodes) / len(decodes) / steps,
            "read_per_token": sum(d["bytes_read"] for d in decodes) / len(decodes) / steps,
            "link_share": link_s / sum(sample["decode_s"] for sample in samples),
            "waits_per_token": waits / steps,
            "device_bytes": 0 if self.args.virtual else torch.cuda.max_memory_allocated(),
            "stats": {name: stats[name] for name in ("host", "hybrid", "slot_kernels", "reader", "reader_reason")},
        }

    @torch.inference_mode()
    def generate(self, model: Any, path: Path, number: int, *, count: bool = False) -> dict[str, Any]:
        """Read a prompt, decode greedily; `count` what waits for the device, which takes time itself."""
        ids = torch.tensor([prompt_ids(path, number % 97, self.args.prompt_tokens)], device=self.place)
        self.synchronise()
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        tokens = [out.logits[0, -1].argmax()]
        self.synchronise()
        ttft_s = time.perf_counter() - start
        before = emoe.stats(model)
        with counted_waits(count and not self.args.virtual) as waits:
            start = time.perf_counter()
            for _ in range(self.args.new_tokens - 1):
                out = model(input_ids=tokens[-1].view(1, 1), past_key_values=out.past_key_values, use_cache=True)
                tokens.append(out.logits[0, -1].argmax())
            self.synchronise()
            decode_s = time.perf_counter() - start
        after = emoe.stats(model)
        names = ("hits", "misses", "loads", "bytes_read", "bytes_copied", "synchronisations")
        return {
            "ttft_s": ttft_s,
            "decode_s": decode_s,
            "tokens": [int(token) for token in tokens],
            "decode": {name: after[name] - before[name] for name in names},
            "waits": waits() + after["synchronisations"] - before["synchronisations"],
        }

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def counted_waits(count: bool) -> Iterator[Callable[[], int]]:
    """Count the calls of torch's that wait for the device; emoe's own waits are in its stats."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if count:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchroniz" in str(warning.message) for warning in caught)
        finally:
            if count:
                torch.cuda.set_sync_debug_mode("default")


def describe(virtual: bool) -> dict[str, Any]:
    """Device, machine, versions."""
    found: dict[str, Any] = machine() | {"torch": torch.__version__, "transformers": transformers.__version__}
    found["device"] = "a virtual device: times mean nothing" if virtual else torch.cuda.get_device_name()
    if not virtual:
        found |= {"cuda": torch.version.cuda, "device_bytes": torch.cuda.get_device_properties(0).total_memory}
    return found


if __name__ == "__main__":
    raise SystemExit(main())
