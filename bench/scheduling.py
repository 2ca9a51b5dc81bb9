"""Schedulers under load, live and simulated: goodput and latency of fifo, edf, emoe and affinity.

    python -m bench.scheduling [--json FILE] [--rate R] [--seeds 3] [--wrong-labels 0,0.2,0.5,1]

One `emoe serve` of emoe-nano for each scheduler, with 40 % of the experts and a slowed store. The store's bandwidth
makes loading cost, beside computing, what it does for a large model: an expert of Mixtral 8x7B has 352 MB, which PCIe
moves in 14 ms at 25 GB/s, while a layer computes for 1 to 2 ms: a load is worth 7 to 14 layers. A layer of emoe-nano
decodes in about 1 ms here and its experts have 240 KiB, so 34 MB/s, 7.2 ms a load, is the lower end of that.

Targets: `--slo-scale` times what the server of fifo needs unloaded, by task; with `--slo-answer S`, that and S of the
mean answer's time, so that first-token targets grow with the task's answers; or those of `--slo-file`, as `emoe
simulate --slo` reads them (bench/scheduling_targets.json holds some that grow so); `--slo` goes before both.

The load: the highest at which fifo still meets the targets of `--met` of the requests, found by bisection; then every
scheduler at multiples of it, the same requests for all, each run with as many seeds. `--at-once` servers run side by
side, each with a store of its own, in an order that changes from seed to seed. Ratios are of the same requests, medians
over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.scheduling_server import PROGRAM
from bench.scheduling_simulated import Simulated
from emoe.bench.serve.comparing import Comparison, Outcome
from emoe.bench.serve.local import Server
from emoe.bench.serve.targets import Book, Targets, parse_targets
from emoe.bench.serve.workload import read_prompts
from emoe.simulation.serving_targets import read_targets

SCHEDULERS = ("fifo", "edf", "emoe", "affinity")
BASE = "fifo"
SEARCH_S = 25.0  # seconds of arrivals of a run that looks for the load
SEARCH_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run was."""

    scheduler: str
    rate: float
    seed: int
    wrong: float
    live: Outcome
    simulated: Outcome | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "scheduler": self.scheduler,
            "rate": self.rate,
            "seed": self.seed,
            "wrong_labels": self.wrong,
            "live": self.live.as_dict(),
            "simulated": self.simulated.as_dict() if self.simulated else None,
        }


class Bench(Comparison):
    """The servers, the targets and what was found."""

    def __init__(self, args: argparse.Namespace, servers: Mapping[str, Server], answers: Mapping[str, float]) -> None:
        super().__init__(servers, read_prompts(), args.max_tokens)
        self.args = args
        self.answers = answers

    def targets(self) -> None:
        """Calibrated with fifo's server, or given."""
        found = self.calibrate(BASE, self.args.slo_scale)
        self.book = book_of(found, self.answers, self.args)
        for task, needs in found.items():
            say(f"  {task}: unloaded {_ms(needs)} ms, targets {_ms(self.book.of(task))} ms")

    def search(self) -> float:
        """The highest rate at which fifo meets the targets of `--met` of the requests, by bisection."""
        low, high = self.args.search
        for _ in range(SEARCH_STEPS):
            rate = (low * high) ** 0.5
            (found,) = self.live([(BASE, self.requests(rate, max(12, round(rate * SEARCH_S)), seed=99))])
            say(f"  {rate:.2f} requests/s: {BASE} meets the targets of {found.met_share:.0%}")
            low, high = (rate, high) if found.met_share >= self.args.met else (low, rate)
        return float(low)

    def sweep(self, schedulers: Sequence[str], rate: float) -> list[Run]:
        """All seeds of one load."""
        return [run for seed in range(1, self.args.seeds + 1) for run in self.one(schedulers, rate, seed)]

    def one(self, schedulers: Sequence[str], rate: float, seed: int, wrong: float = 0.0) -> list[Run]:
        """These schedulers with the same requests, as many side by side as may be."""
        requests = self.requests(rate, self.args.requests, seed, wrong)
        order = [schedulers[(i + seed) % len(schedulers)] for i in range(len(schedulers))]
        found = []
        for start in range(0, len(order), self.args.at_once):
            group = order[start : start + self.args.at_once]
            outcomes = self.live([(scheduler, requests) for scheduler in group])
            for scheduler, live in zip(group, outcomes, strict=True):
                found.append(Run(scheduler=scheduler, rate=rate, seed=seed, wrong=wrong, live=live))
        found.sort(key=lambda run: schedulers.index(run.scheduler))
        told = ", ".join(f"{run.scheduler} {run.live.met_share:.0%} met, {run.live.latency_s:.2f} s" for run in found)
        say(f"  {rate:.2f} requests/s, {wrong:.0%} wrong, seed {seed}: {told}")
        return found

    def mislabelled(self, schedulers: Sequence[str], rate: float) -> list[Run]:
        """Every share of wrong labels, one after another for each seed, so that a slow hour meets all of them."""
        found = []
        for seed in range(1, self.args.wrong_seeds + 1):
            for share in self.args.wrong_labels:
                found += self.one(schedulers, rate, seed, share)
        return found

    def costs(self, scheduler: str) -> dict[str, float]:
        """What that server's cost model has learned."""
        found: dict[str, float] = httpx.get(f"{self.servers[scheduler].url}/costs", trust_env=False).json()
        return found


def book_of(needs: Mapping[str, Targets], answers: Mapping[str, float], args: argparse.Namespace) -> Book:
    """The targets that the options ask for, by task.

    Args:
        needs: what an unloaded server needs.
        answers: tokens of the mean answer.
        args: `slo_scale`, `slo_answer`, `slo_file` and `slo`.

    Raises:
        UsageError: targets that cannot be read, or of a task that there is not.
    """
    if args.slo_file is not None:
        read = read_targets(args.slo_file, list(needs))
        found = {task: Targets(each.ttft_s, each.tpot_s) for task, each in read.items()}
    else:
        found = {
            task: growing(each, args.slo_answer * max(0.0, answers.get(task, 0.0) - 1)).scaled(args.slo_scale)
            for task, each in needs.items()
        }
    return Book(found | parse_targets(args.slo))


def growing(needs: Targets, tokens: float) -> Targets:
    """The first token's time and that of so many later tokens; each later one's as it is."""
    if needs.ttft_s is None or needs.tpot_s is None:
        return needs
    return Targets(needs.ttft_s + tokens * needs.tpot_s, needs.tpot_s)


def simulate(bench: Bench, simulated: Simulated, runs: Sequence[Run]) -> list[Run]:
    """The same runs on the virtual clock, with each server's own costs."""
    costs = {scheduler: bench.costs(scheduler) for scheduler in bench.servers}
    made = []
    for run in runs:
        requests = bench.requests(run.rate, bench.args.requests, run.seed, run.wrong)
        found = simulated.run(run.scheduler, requests, bench.book, costs[run.scheduler]).summary()
        outcome = Outcome(found.goodput, found.met_share, found.latency.mean, found.ttft.mean)
        made.append(
            Run(
                scheduler=run.scheduler, rate=run.rate, seed=run.seed, wrong=run.wrong, live=run.live, simulated=outcome
            )
        )
    return made


def table(runs: Sequence[Run], kind: str, by: str, base: str, against: Callable[[Run], Run]) -> list[str]:
    """Markdown rows, one for each (load or share of wrong labels, scheduler); ratios are to the run `against` names."""
    lines = [
        f"| {by} | scheduler | met | goodput/s | times {base} | mean latency s | times {base} |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, scheduler in dict.fromkeys((_key(run, by), run.scheduler) for run in runs):
        mine = [run for run in runs if (_key(run, by), run.scheduler) == (key, scheduler)]
        pairs = [(getattr(run, kind), getattr(against(run), kind)) for run in mine]
        better = [one.goodput / max(other.goodput, 1e-9) for one, other in pairs]
        slower = [one.latency_s / other.latency_s for one, other in pairs]
        lines.append(
            f"| {key:.2f} | {scheduler} | {statistics.mean(one.met_share for one, _ in pairs):.0%} | "
            f"{_spread([one.goodput for one, _ in pairs])} | {_spread(better)} | "
            f"{_spread([one.latency_s for one, _ in pairs])} | {_spread(slower)} |"
        )
    return lines


def _key(run: Run, by: str) -> float:
    return run.rate if by == "requests/s" else run.wrong


def _spread(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.2f} ({min(values):.2f}..{max(values):.2f})" if middle < 1e6 else "-"


def _ms(targets: Targets) -> str:
    return "/".join("-" if value is None else f"{value * 1e3:.0f}" for value in (targets.ttft_s, targets.tpot_s))


def apart(runs: Sequence[Run]) -> list[str]:
    """How far the simulator is from the live runs, means over the seeds of each load and scheduler."""
    lines = ["| requests/s | scheduler | latency, simulated/live | goodput, simulated/live |", "|---|---|---|---|"]
    for key in dict.fromkeys((run.rate, run.scheduler) for run in runs):
        mine = [run for run in runs if (run.rate, run.scheduler) == key and run.simulated is not None]
        pairs = [
            [
                statistics.mean(getattr(one, name) for one in side)
                for side in ([r.simulated for r in mine], [r.live for r in mine])
            ]
            for name in ("latency_s", "goodput")
        ]
        latency, goodput = (f"{s:.2f}/{x:.2f} = {s / x:.2f}" if x else f"{s:.2f}/0" for s, x in pairs)
        lines.append(f"| {key[0]:.2f} | {key[1]} | {latency} | {goodput} |")
    return lines


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - _START:5.0f} s] {text}", flush=True)


_START = time.monotonic()


def main() -> None:
    """Print tables; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--schedulers", default=",".join(SCHEDULERS))
    add("--budget", default="40%")
    add("--read-bandwidth", default="34MB", help="of the store, bytes per second")
    add("--max-running", type=int, default=16)
    add("--max-tokens", type=int, default=32)
    add("--requests", type=int, default=24, help="in a run")
    add("--seeds", type=int, default=3)
    add("--slo-scale", type=float, default=5.0)
    add(
        "--slo-answer", type=float, default=0.0, metavar="SHARE", help="of a mean answer's time, in first-token targets"
    )
    add("--slo-file", type=Path, metavar="FILE", help="targets of all tasks, JSON as of emoe simulate --slo")
    add("--slo", action="append", default=[], metavar="TASK=TTFT/TPOT", help="targets of a task in ms instead of those")
    add("--met", type=float, default=0.9, help="what fifo must meet at the load that is looked for")
    add("--search", type=_numbers, default=[0.2, 3.2], help="rates between which to look for it")
    add("--rate", type=float, help="that load, instead of looking for it")
    add("--loads", type=_numbers, default=[1.0, 1.5, 2.0], help="multiples of it")
    add("--wrong-labels", type=_numbers, default=[0.0, 0.2, 0.5, 1.0], help="shares; at the second load")
    add("--wrong-schedulers", default="emoe,affinity")
    add("--wrong-seeds", type=int, default=2, help="seeds of those runs")
    add("--at-once", type=int, default=2, help="servers under load side by side")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    schedulers = list(dict.fromkeys([BASE, *args.schedulers.split(",")]))
    torch_one_thread()
    say("recording the routes of all prompts, for the simulator")
    simulated = Simulated(args.budget, args.max_tokens, args.max_running)
    words = ["--expert-memory", args.budget, "--max-read-bytes-per-s", args.read_bandwidth, "--status-interval", "0"]
    words += ["--max-num-seqs", str(args.max_running), "--max-queue", "10000"]
    with ExitStack() as stack:
        servers = {name: stack.enter_context(Server(name, words, PROGRAM)) for name in schedulers}
        for server in servers.values():
            server.wait()
        bench = Bench(args, servers, simulated.answers)
        asked = f"of {args.slo_file}" if args.slo_file else f"{args.slo_scale:g} times what {BASE} needs unloaded"
        asked += f", {args.slo_answer:g} of the mean answer's time included" if args.slo_answer else ""
        say(f"targets are {asked} (first token/each later one)")
        bench.targets()
        say(f"looking for the load at which {BASE} meets the targets of {args.met:.0%}")
        rate = args.rate or bench.search()
        runs = [run for load in args.loads for run in bench.sweep(schedulers, load * rate)]
        middle = args.loads[min(1, len(args.loads) - 1)] * rate
        wrong = bench.mislabelled(args.wrong_schedulers.split(","), middle)
        say("the same in the simulator")
        runs, wrong = simulate(bench, simulated, runs), simulate(bench, simulated, wrong)
        costs = {name: bench.costs(name) for name in servers}
    for kind in ("live", "simulated"):
        print(f"\n{kind}: {args.requests} requests, {args.seeds} seeds, median (least..greatest)\n")
        against = {(run.rate, run.seed): run for run in runs if run.scheduler == BASE}
        print("\n".join(table(runs, kind, "requests/s", BASE, lambda run: against[run.rate, run.seed])))  # noqa: B023
        if not wrong:
            continue
        labelled = {(run.scheduler, run.seed): run for run in wrong if run.wrong == min(args.wrong_labels)}
        print(f"\n{kind}, at {middle:.2f} requests/s, {args.wrong_seeds} seeds, by the share of wrong labels\n")
        first = f"{min(args.wrong_labels):.0%} wrong"
        print("\n".join(table(wrong, kind, "wrong", first, lambda run: labelled[run.scheduler, run.seed])))  # noqa: B023
    print("\nsimulated against live, means over the seeds\n")
    print("\n".join(apart(runs)))
    say("done")
    if args.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        targets = {task: each.as_dict() for task, each in bench.book.by_task.items()}
        found = {"settings": settings, "rate": rate, "targets": targets, "costs": costs}
        args.json.write_text(json.dumps(found | {"runs": [run.as_dict() for run in runs + wrong]}) + "\n")


def torch_one_thread() -> None:
    """emoe-nano is too small for more."""
    import torch

    torch.set_num_threads(1)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",") if word]


if __name__ == "__main__":
    main()
