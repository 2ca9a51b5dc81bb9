"""emoe on a CUDA device: correctness first, then speed at 100, 60, 40 and 20 % of the experts, host tier or not.

    make bench-gpu                                 both shapes, in under 8 minutes
    python bench/gpu.py --virtual --shapes tiny    the same code on the CPU, to see that it runs; times mean nothing

Each part runs in a process of its own: one that fails, hangs or takes the device down is reported, and the next runs.
Needs torch, transformers, pytest and this repository; no network. Random checkpoints are written to a temporary folder.
Before a shape's numbers its logits are checked: bit for bit those of the fully resident model, and near to those of
transformers itself. Decoding is greedy, and each row's logits, too, must be the fully resident model's. Prints tables
in markdown, writes them beside --out (.md), what the tests said (.tests.log), and everything to --out as JSON; ends
with 2 where there is no CUDA device, 1 where something was wrong.
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
from contextlib import contextmanager
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
COPIES_S, CHECK_S = 60.0, 120.0
"""Seconds that the copies, and one shape's check, may take."""

ERROR = 0.05
"""Of logits against transformers', the median over positions at most. Other kernels round otherwise in bfloat16, and a
choice between experts of like scores then falls otherwise, which is seen in the worst position (docs/log.md)."""

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
        self.found: dict[str, Any] = {
            "machine": {},
            "tests": None,
            "copies": [],
            "checks": [],
            "rows": [],
            "failed": [],
        }
        self.wrong: list[str] = []
        self.beside(".md").write_text("")

    def run(self) -> int:
        """Tests, copies, tables; the exit code."""
        try:
            self.found["machine"] = describe(self.args.virtual)
        except Exception as error:  # said like any other failure
            self.failed("the machine", error)
        self.say(f"# emoe on {self.found['machine'].get('device', 'a device that does not answer')}\n")
        if not self.args.skip_tests:
            self.test()
        self.copies()
        for shape in self.args.shapes:
            self.shape(shape)
        self.save()
        self.say(f"\n{self.found['seconds']} s in all; all figures are in {self.args.out}")
        for each in self.wrong:
            self.say(f"WRONG: {each}")
        return 1 if self.wrong else 0

    def beside(self, ending: str) -> Path:
        """A file beside --out."""
        path: Path = self.args.out
        return path.with_name(path.stem + ending)

    def say(self, text: str) -> None:
        """Print, and keep in the file of tables."""
        print(text, flush=True)
        with self.beside(".md").open("a") as file:
            file.write(text + "\n")

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
        self.say(f"{part} FAILED: {last}")
        self.save()

    def left(self) -> float:
        """Seconds until nothing new is started."""
        return float(self.args.seconds) - (time.monotonic() - self.begun)

    def test(self) -> None:
        """The tests that need the device; what they say goes to a file, line by line."""
        paths = [str(ROOT / path) for path in TESTS]
        command = [sys.executable, "-u", "-m", "pytest", "-v", "--maxfail=5", "-p", "no:cacheprovider", *paths]
        limit_s, lines = max(60, self.left() / 2), []
        with self.beside(".tests.log").open("w") as log, running(command, limit_s, subprocess.STDOUT) as child:
            for line in child.process.stdout or ():
                log.write(line)
                log.flush()
                lines.append(line.rstrip())
                if " FAILED" in line or " ERROR" in line or line.rstrip().endswith("0%]"):
                    print(line.rstrip(), flush=True)
            code = child.process.wait()
        if child.late:
            lines.append(f"not done after {limit_s:.0f} s")
        self.found["tests"] = {"returned": code, "end": lines[-30:]}
        self.say(f"Tests ({' '.join(TESTS)}): {lines[-1] if lines else 'no output'}\n")
        if code:
            print("\n".join(lines[-30:]))
            self.wrong.append("the tests that need a CUDA device failed")
        self.save()

    def copies(self) -> None:
        """The link's bandwidth from pinned and from pageable memory."""
        self.say("| copy | pinned, GB/s | pageable, GB/s |\n|---|---|---|")
        for found in self.part("the copies", ["copy", *map(str, COPIES)], COPIES_S):
            self.found["copies"].append(found)
            size = format_bytes(found["nbytes"])
            self.say(f"| {size} | {found['pinned']:.1f} | {found['pageable']:.1f} |{found['notice']}")
        self.say("")
        self.save()

    def check(self, shape: str, path: Path) -> None:
        """One shape's logits: the least budget's against the whole model's, and these against transformers'."""
        for found in self.part(f"checking {shape}", ["check", str(path), str(min(self.args.budgets))], CHECK_S):
            self.found["checks"].append(found | {"shape": shape})
            near = found["median_error"] < ERROR
            same = (
                "bit for bit those" if found["equal"] else f"in {found['other_positions']} positions not those: WRONG"
            )
            self.say(
                f"Logits with {found['budget']} % of the experts: {same} of the whole model. Against transformers: "
                f"{found['median_error']:.2%} off in the median position, {found['worst_error']:.2%} in the worst, "
                f"the same choice in {found['same_choice']:.0%}{'' if near else ': WRONG'}.\n"
            )
            if not found["equal"]:
                self.wrong.append(f"{shape} at {found['budget']} %: other logits than with every expert resident")
            if not near:
                self.wrong.append(f"{shape}: logits {found['median_error']:.2%} off transformers' own")
        self.save()

    def shape(self, shape: str) -> None:
        """One shape's table. After a row that failed, the others go on in a new process."""
        start = time.monotonic()
        try:
            path = make_checkpoint(shape, self.folder / shape)
        except Exception as error:  # a full disk, say: the next shape may be smaller
            self.failed(f"writing {shape}", error)
            return
        self.say(f"## {shape} (written in {time.monotonic() - start:.0f} s)\n")
        if self.left() > 0:
            self.check(shape, path)
        self.say(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        expected: dict[str, Any] | None = None
        ways = list(self.ways())
        while ways:
            if self.left() < 0:
                for budget, host, on_miss in ways:
                    self.say(f"| {budget} % | {host}, {on_miss} | not run: {self.args.seconds:.0f} s are over |")
                break
            of = f"{shape} at {ways[0][0]} %, host {ways[0][1]}, {ways[0][2]}"
            for row in self.part(of, ["rows", str(path), *(":".join(map(str, way)) for way in ways)]):
                budget, host, on_miss = ways.pop(0)
                row |= {"shape": shape, "budget": budget, "host": host, "on_miss": on_miss}
                self.found["rows"].append(row)
                expected = expected or row
                what = "logits" if on_miss == "load" else "tokens"
                same = row[what] == expected[what]
                if not same and on_miss == "load":
                    self.wrong.append(
                        f"{shape} at {budget} %, host {host}: other logits than with every expert resident"
                    )
                self.say(self.line(row, same))
                self.save()
                of = f"{shape} at {ways[0][0]} %, host {ways[0][1]}, {ways[0][2]}" if ways else f"the end of {shape}"
                self.now = of
                if self.left() < 0:
                    break
            else:
                if ways and not self.ended_badly:
                    self.failed(of, "the part ended without it")
                del ways[:1]  # the one that failed, as has been said
        self.say("")

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
        limit_s = max(GRACE_S, min(limit_s, self.left() + GRACE_S))
        with tempfile.TemporaryFile("w+") as said:
            with running(command, limit_s, said) as child:
                for line in child.process.stdout or ():
                    if line.startswith(RESULT):
                        yield json.loads(line.removeprefix(RESULT))
                code = child.process.wait()
            if code:
                said.seek(0)
                end = "\n".join(said.read().strip().splitlines()[-12:])
                self.ended_badly = True
                self.failed(
                    self.now, "it took too long and was ended" if child.late else end or f"it ended with {code}"
                )

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
        other = " other tokens (CPU arithmetic)" if row["on_miss"] == "hybrid" else " other logits: WRONG"
        note = "" if same else other
        return "| " + " | ".join(cells) + " |" + note


class Child:
    """A process; `late`: it took too long and was ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.late = False

    def end(self) -> None:
        """It is late."""
        self.late = self.process.poll() is None
        self.process.kill()


@contextmanager
def running(command: list[str], limit_s: float, errors: Any) -> Iterator[Child]:
    """Run a command of this repository's for `limit_s` at most, and no longer than somebody reads what it says."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment()
    )
    child = Child(process)
    stop = threading.Timer(limit_s, child.end)
    stop.start()
    try:
        yield child
    finally:
        stop.cancel()
        if process.poll() is None:  # nobody wants the rest
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


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
