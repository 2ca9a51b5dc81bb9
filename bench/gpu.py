"""emoe on a CUDA device: correctness first, then speed at 100, 60, 40 and 20 % of the experts, host tier or not.

    make bench-gpu                                 both shapes, in under 8 minutes
    python bench/gpu.py --virtual --shapes tiny    the same code on the CPU, to see that it runs; times mean nothing

Each part runs in a process of its own: one that fails, hangs or takes the device down is reported, and the next runs.
Needs torch, transformers, pytest and this repository; no network. Random checkpoints are written to a temporary folder.
Decoding is greedy and every budget must give the tokens of the fully resident model. Prints a table in markdown, writes
everything to --out as JSON, and ends with 2 where there is no CUDA device, 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.gpu_part import RESULT, use_virtual, work
from emoe.bench.decode import machine
from emoe.bench.random_weights import make_checkpoint
from emoe.config import format_bytes

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
COPIES_S = 60.0
"""Seconds that the copies may take."""

GRACE_S = 20.0
"""Seconds that a part may run on when the time is over: with the tests' half, all of it stays under 8 minutes."""


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
    parser.add_argument(
        "--processes", action="store_true", help="with --virtual, too, each part in a process of its own"
    )
    args = parser.parse_args()
    if not args.virtual and not torch.cuda.is_available():
        print(f"bench/gpu.py needs a CUDA device, and torch {torch.__version__} sees none.", file=sys.stderr)
        return 2
    if args.virtual and not args.processes:
        use_virtual()
    with tempfile.TemporaryDirectory(prefix="emoe-bench-gpu-") as temporary:
        return Bench(args, args.folder or Path(temporary)).run()


class Bench:
    """One run of everything. Each part runs in a process of its own: its end, whatever it is, ends nothing else."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.begun = time.monotonic()
        self.found: dict[str, Any] = {"machine": {}, "tests": None, "copies": [], "rows": [], "failed": []}
        self.wrong: list[str] = []

    def run(self) -> int:
        """Tests, copies, tables; the exit code."""
        try:
            self.found["machine"] = describe(self.args.virtual)
        except Exception as error:  # said like any other failure
            self.failed("the machine", error)
        print(f"# emoe on {self.found['machine'].get('device', 'a device that does not answer')}\n", flush=True)
        if not self.args.skip_tests:
            self.test()
        self.copies()
        for shape in self.args.shapes:
            self.shape(shape)
        self.save()
        print(f"\n{self.found['seconds']} s in all; all figures are in {self.args.out}")
        for each in self.wrong:
            print(f"WRONG: {each}")
        return 1 if self.wrong else 0

    def save(self) -> None:
        """Write what is known so far."""
        self.found["wrong"] = self.wrong
        self.found["seconds"] = round(time.monotonic() - self.begun, 1)
        partly = self.args.out.with_name(self.args.out.name + ".partial")
        partly.write_text(json.dumps(self.found, indent=1) + "\n")
        partly.replace(self.args.out)

    def failed(self, part: str, error: object) -> None:
        """Note that a part failed; the others go on."""
        said = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        self.found["failed"].append({"part": part, "error": said})
        last = said.strip().splitlines()[-1] if said.strip() else "it says nothing"
        self.wrong.append(f"{part} failed: {last}")
        print(f"{part} FAILED: {last}", flush=True)
        self.save()

    def left(self) -> float:
        """Seconds until nothing new is started."""
        return float(self.args.seconds) - (time.monotonic() - self.begun)

    def test(self) -> None:
        """The tests that need the device."""
        paths = [str(ROOT / path) for path in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
        try:
            done = subprocess.run(
                command,
                check=False,
                cwd=ROOT,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=max(60, self.left() / 2),
            )
            lines, code = (done.stdout + done.stderr).strip().splitlines(), done.returncode
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            lines, code = [*said.splitlines()[-29:], f"not done after {late.timeout:.0f} s"], 1
        self.found["tests"] = {"returned": code, "end": lines[-30:]}
        print(f"Tests ({' '.join(TESTS)}): {lines[-1] if lines else 'no output'}\n", flush=True)
        if code:
            print("\n".join(lines[-30:]))
            self.wrong.append("the tests that need a CUDA device failed")
        self.save()

    def copies(self) -> None:
        """The link's bandwidth from pinned and from pageable memory."""
        print("| copy | pinned, GB/s | pageable, GB/s |\n|---|---|---|")
        for found in self.part("the copies", ["copy", *map(str, COPIES)], COPIES_S):
            self.found["copies"].append(found)
            size = format_bytes(found["nbytes"])
            print(f"| {size} | {found['pinned']:.1f} | {found['pageable']:.1f} |{found['notice']}", flush=True)
        print(flush=True)
        self.save()

    def shape(self, shape: str) -> None:
        """One shape's table. After a row that failed, the others go on in a new process."""
        start = time.monotonic()
        try:
            path = make_checkpoint(shape, self.folder / shape)
        except Exception as error:  # a full disk, say: the next shape may be smaller
            self.failed(f"writing {shape}", error)
            return
        print(f"## {shape} (written in {time.monotonic() - start:.0f} s)\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
        expected: list[int] | None = None
        ways = list(self.ways())
        while ways:
            if self.left() < 0:
                for budget, host, on_miss in ways:
                    print(f"| {budget} % | {host}, {on_miss} | not run: {self.args.seconds:.0f} s are over |")
                break
            of = f"{shape} at {ways[0][0]} %, host {ways[0][1]}, {ways[0][2]}"
            for row in self.part(of, ["rows", str(path), *(":".join(map(str, way)) for way in ways)]):
                budget, host, on_miss = ways.pop(0)
                row |= {"shape": shape, "budget": budget, "host": host, "on_miss": on_miss}
                self.found["rows"].append(row)
                expected = expected or row["tokens"]
                same = row["tokens"] == expected
                if not same and on_miss == "load":
                    self.wrong.append(
                        f"{shape} at {budget} %, host {host}: other tokens than with every expert resident"
                    )
                print(self.line(row, same), flush=True)
                self.save()
                of = f"{shape} at {ways[0][0]} %, host {ways[0][1]}, {ways[0][2]}" if ways else f"the end of {shape}"
                self.now = of
                if self.left() < 0:
                    break
            else:
                if ways and not self.ended_badly:
                    self.failed(of, "the part ended without it")
                del ways[:1]  # the one that failed, as has been said
        print()

    def part(self, name: str, what: list[str], limit_s: float = 1e9) -> Iterator[dict[str, Any]]:
        """Run a part (bench/gpu_part.py) in a process of its own, and give each of its results when it is there."""
        self.now, self.ended_badly = name, False
        if self.args.virtual and not self.args.processes:
            try:
                yield from work(argparse.Namespace(**vars(self.args), pinned_gb_s=self.pinned()), what)
            except Exception as error:
                self.ended_badly = True
                self.failed(self.now, error)
            return
        given = ["--prompt-tokens", self.args.prompt_tokens, "--new-tokens", self.args.new_tokens]
        given += ["--rounds", self.args.rounds, "--pinned-gb-s", self.pinned()]
        given += ["--virtual"] if self.args.virtual else []
        command = [sys.executable, str(ROOT / "bench" / "gpu_part.py"), *map(str, given), *what]
        with tempfile.TemporaryFile("w+") as said:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment())
            stop = threading.Timer(max(GRACE_S, min(limit_s, self.left() + GRACE_S)), child.kill)
            stop.start()
            try:
                for line in child.stdout or ():
                    if line.startswith(RESULT):
                        yield json.loads(line.removeprefix(RESULT))
                code = child.wait()
            finally:
                late = not stop.is_alive()
                stop.cancel()
                if child.poll() is None:  # nobody wants the rest
                    child.kill()
                    child.wait()
                if child.stdout is not None:
                    child.stdout.close()
            if code:
                said.seek(0)
                end = "\n".join(said.read().strip().splitlines()[-12:])
                self.ended_badly = True
                self.failed(self.now, "it took too long and was ended" if late else end or f"it ended with {code}")

    def pinned(self) -> float:
        """The largest copy's bandwidth, GB/s; 0: not known."""
        return float(self.found["copies"][-1]["pinned"]) if self.found["copies"] else 0.0

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


def environment() -> dict[str, str]:
    """Where a part finds this repository."""
    return os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}


def describe(virtual: bool) -> dict[str, Any]:
    """Device, machine, versions."""
    found: dict[str, Any] = machine() | {"torch": torch.__version__, "transformers": transformers.__version__}
    found["device"] = "a virtual device: times mean nothing" if virtual else torch.cuda.get_device_name()
    if not virtual:
        found |= {"cuda": torch.version.cuda, "device_bytes": torch.cuda.get_device_properties(0).total_memory}
    return found


if __name__ == "__main__":
    raise SystemExit(main())
