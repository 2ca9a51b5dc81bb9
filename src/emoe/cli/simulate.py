"""`emoe simulate`: how far each policy is from the best possible, on a recorded trace."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.bench.options import seed
from emoe.cli.options import add_command, positive, size
from emoe.cli.output import ProgressLine, note, print_json, table
from emoe.cli.simulate_serving import add_serving, asked_for, run_serving
from emoe.config import MODES, ExpertMemory, format_bytes
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.routing.trace import Trace
    from emoe.simulation.runs import Row, Task

Curves = dict[str, list[tuple[float, float]]]

SUMMARY = "Serve a recorded trace under policies and capacities, beside the best possible (Belady's rule)."
DEFAULT_POLICIES = "lru,lfu,least-stale,belady"
DEFAULT_CAPACITIES = "20%,40%,60%,80%"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "simulate", run, SUMMARY)
    parser.add_argument("trace", nargs="?", metavar="TRACE", help="a trace file, or a folder with a trace.npz")
    parser.add_argument(
        "--random",
        metavar="LxExK:TOKENS",
        help="instead of TRACE, tokens routed at random over L layers to K of E experts, e.g. 24x32x4:20000",
    )
    parser.add_argument(
        "--policy",
        type=_names,
        metavar="NAMES",
        help="policies, separated by commas; NAME@pool: one bank shared by all layers, NAME@engine: a replay "
        "as recorded, with the engine's slots and its prefill; an unknown name lists all "
        f"(default: {DEFAULT_POLICIES})",
    )
    parser.add_argument(
        "--capacity",
        type=_capacities,
        default=_capacities(DEFAULT_CAPACITIES),
        metavar="SHARES",
        help="shares of each layer's experts that fit (default: 20%%,40%%,60%%,80%%)",
    )
    parser.add_argument("--history", metavar="TRACE", help="what policies may learn from before")
    parser.add_argument(
        "--split",
        type=_seeds,
        metavar="SEEDS",
        help="learn on a random half of the prompts and score the other, once for each seed (0,1,2), and average",
    )
    parser.add_argument(
        "--interleave", type=positive, default=1, metavar="N", help="sequences that take turns, as a batch (default: 1)"
    )
    parser.add_argument(
        "--phase",
        choices=("all", "prefill", "decode"),
        default="all",
        help="which tokens are looked up, one by one (default: all)",
    )
    parser.add_argument("--prompts", type=positive, metavar="N", help="score only the first N prompts")
    parser.add_argument(
        "--experts", type=positive, metavar="N", help="experts of a layer, for traces that do not say (default: seen)"
    )
    parser.add_argument(
        "--replan-prompts",
        metavar="P",
        help="prompts between two calls of a predictor, or adaptive, or adaptive:DRIFT (default: 40; for counts 1)",
    )
    parser.add_argument(
        "--prefetch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load what a predictor names, or only order evictions by it (default: load)",
    )
    parser.add_argument(
        "--binding",
        choices=MODES,
        default="exact",
        help="what a miss is bound to: a load (exact), the best resident expert (resident, lossy), or the one or the "
        "other by the task's sensitivity (balanced, lossy; needs --profile)",
    )
    parser.add_argument("--profile", metavar="DIR", help="of the trace's model: which layers are sensitive")
    parser.add_argument(
        "--sensitivity-threshold", type=float, metavar="X", help="binding balanced: as in `emoe generate`"
    )
    parser.add_argument(
        "--tasks", action=argparse.BooleanOptionalAction, default=True, help="show or hide the prompts' task labels"
    )
    parser.add_argument(
        "--token-ids", action=argparse.BooleanOptionalAction, default=True, help="show or hide the tokens' ids"
    )
    parser.add_argument(
        "--subtract-prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="counts for each prompt: leave out what all prompts of a label have in common (default: leave out)",
    )
    parser.add_argument(
        "--expert-bytes", type=size, metavar="SIZE", help="bytes of one expert (default: as the trace says)"
    )
    parser.add_argument("--bandwidth", type=_rate, metavar="SIZE/s", help="of loads: adds the time per token")
    parser.add_argument(
        "--compute-time", type=_seconds, default=0.0, metavar="SECONDS", help="of one layer for one token (default: 0)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of training and random routes (default: 0)")
    parser.add_argument("--plot", metavar="FILE", help="draw ratio and hit rate against capacity (.png or .svg)")
    parser.add_argument("--json", action="store_true", help="print a JSON list (docs/cli.md) instead of text")
    add_serving(parser)


def run(args: argparse.Namespace) -> int:
    """Print one row for each policy and capacity."""
    from emoe.routing.counts import holds_counts

    if asked_for(args):
        run_serving(args)
        return 0
    if (args.trace is None) == (args.random is None):
        raise UsageError("give a TRACE or --random, one of the two.")
    if args.plot is not None:
        from emoe.simulation.plot import check_plot

        check_plot(args.plot)
    if args.trace is not None and holds_counts(args.trace):
        _run_counts(args)
    else:
        _run_trace(args)
    return 0


def _run_trace(args: argparse.Namespace) -> None:
    from emoe.simulation.runs import simulate

    trace = _trace(args)
    task = _task(args, trace)
    task.check()
    runs = _runs(args, trace)
    about = f"{len(trace)} tokens of {trace.num_prompts} prompts, {len(trace.layers)} layers x {trace.num_experts}"
    note(f"{about}, top-{trace.top_k}{_labels(trace)}")
    if task.expert_bytes is None:
        note("the trace does not say how large an expert is, so loads are not given in bytes: see --expert-bytes")
    if task.binding.lossy:
        note(f"LOSSY: in binding {args.binding!r} misses are rerouted, so loads say nothing without the text's quality")
    rows = simulate(runs, task, _Progress("tokens"), note)
    if args.json:
        print_json([row.as_dict(task.expert_bytes) for row in rows])
    else:
        print(table(cells(rows, task.expert_bytes), right=range(1, 20), indent=""))
    ratios: Curves = {}
    hits: Curves = {}
    for row in rows:
        hits.setdefault(row.policy, []).append((row.capacity, row.hit_rate))
        if row.belady_ratio is not None:
            ratios.setdefault(row.policy, []).append((row.capacity, row.belady_ratio))
    _plot(args, {"loads, times those of Belady's rule": ratios, "hit rate": hits}, "belady")


def _run_counts(args: argparse.Namespace) -> None:
    """Per-prompt counts: predictors alone."""
    from emoe.routing.counts import read_counts
    from emoe.simulation.policies import Settings
    from emoe.simulation.prompts import check_predictors, plan_prompts

    names = _names("static,task-popularity,previous-prompt") if args.policy is None else args.policy
    check_predictors(names)
    _refuse_for_counts(args)
    counts, past = (None if path is None else read_counts(path) for path in (args.trace, args.history))
    if counts is None:  # a path was given
        raise UsageError("give a TRACE.")
    if args.subtract_prefix:
        counts, past = counts.without_prefix(), None if past is None else past.without_prefix()
        note("counted without what all prompts of a label have in common; --no-subtract-prefix keeps it")
    if not args.tasks:
        counts, past = counts.without_tasks(), None if past is None else past.without_tasks()
    prompts, layers, experts = counts.counts.shape
    note(f"counts of {prompts} prompts, {layers} layers x {experts}, top-{counts.top_k}, {len(counts.tasks)} labels")
    runs = [(counts, past)]
    if args.split is not None:
        runs = [(counts.select(scored), counts.select(learned)) for learned, scored in _halves(args, prompts)]
    settings = Settings(args.replan_prompts or 1, args.prefetch, args.seed)
    rows = plan_prompts(runs, names, args.capacity, settings, _Progress("prompts"), note)
    if args.json:
        print_json([row.as_dict() for row in rows])
    else:
        lines = [["policy", "capacity", "lookups", "hit rate", "best set", "of it"]]
        for row in rows:
            rates = (row.hit_rate, row.best_rate, row.hit_rate / row.best_rate)
            lines.append([row.policy, _percent(row.capacity), str(row.lookups), *(f"{rate:.4f}" for rate in rates)])
        print(table(lines, right=range(1, 6), indent=""))
    hits = {row.policy: [(r.capacity, r.hit_rate) for r in rows if r.policy == row.policy] for row in rows}
    hits["best set"] = [(row.capacity, row.best_rate) for row in rows if row.policy == names[0]]
    _plot(args, {"hit rate of a plan for the prompt": hits}, "best set")


def _refuse_for_counts(args: argparse.Namespace) -> None:
    """Options that need the order of tokens."""
    given = {
        "--interleave": args.interleave != 1,
        "--phase": args.phase != "all",
        "--prompts": args.prompts is not None,
        "--bandwidth": args.bandwidth is not None,
        "--binding": args.binding != "exact",
    }
    for name, there in given.items():
        if there:
            raise UsageError(f"{name} means nothing for counts of whole prompts: leave it out.")


def _plot(args: argparse.Namespace, curves: dict[str, Curves], bound: str) -> None:
    if args.plot is None:
        return
    from emoe.simulation.plot import Panel, check_plot, draw

    title = args.random or Path(args.trace).resolve().name
    draw(check_plot(args.plot), title, [Panel(label, each, bound) for label, each in curves.items()])
    note(f"drawn to {args.plot}")


def cells(rows: Sequence[Row], expert_bytes: int | None) -> list[list[str]]:
    """The table for people, headings first."""
    spread = any(len(row.ratios) > 1 for row in rows)
    timed = any(row.latencies for row in rows)
    head = ["policy", "capacity", "lookups", "misses", "loads", "hit rate", "x Belady"]
    lossy = any(row.mode != "exact" for row in rows)
    head += ["+-"] * spread + ["rerouted"] * lossy + ["loaded", "wasted"] + ["mean", "p50", "p95"] * timed
    lines = [head]
    for row in rows:
        values = row.as_dict(expert_bytes)
        line = [row.policy, _percent(row.capacity), str(row.lookups), str(row.misses), str(row.loads)]
        line += [f"{row.hit_rate:.4f}", "-" if row.belady_ratio is None else f"{row.belady_ratio:.3f}"]
        if spread:
            line.append(f"{(max(row.ratios) - min(row.ratios)) / 2:.3f}" if row.ratios else "-")
        if lossy:
            line.append(f"{row.rerouted / row.lookups:.4f}")
        for count, name in ((row.loads, "bytes_loaded"), (row.wasted, "wasted_prefetch_bytes")):
            line.append(str(count) if values[name] is None else format_bytes(values[name]))
        if timed:
            times = [values.get(f"token_{name}_s") for name in ("mean", "p50", "p95")]
            line += ["-" if time is None else f"{time * 1000:.4g} ms" for time in times]
        lines.append(line)
    return lines


def _percent(share: float) -> str:
    return f"{share * 100:.4g}%"


class _Progress(ProgressLine):
    """Progress in tokens or prompts; called with (what runs, done, in all)."""

    def __init__(self, unit: str) -> None:
        super().__init__("")
        self._unit = unit

    def __call__(self, *state: Any) -> None:
        """Show the state, if it is time to."""
        what, done, total = state
        if what != self._what:
            self._what = what
            self._start = None
        super().__call__(done, total)

    def line(self, done: int, total: int, seconds: float, since: int) -> str:
        """The text for `done` of `total`."""
        rate = since / max(seconds, 1e-3)
        return f"{self._what} {done} of {total} {self._unit} ({done / total:.0%})  {rate:.0f} {self._unit}/s"


def _trace(args: argparse.Namespace) -> Trace:
    from emoe.routing.trace import Trace
    from emoe.simulation.generate import parse_random, random_trace
    from emoe.simulation.runs import without

    if args.random is not None:
        return random_trace(*parse_random(args.random), args.seed)
    return without(Trace.read(args.trace, args.experts), tasks=not args.tasks, token_ids=not args.token_ids)


def _runs(args: argparse.Namespace, trace: Trace) -> list[tuple[Trace, Trace | None]]:
    """What is scored, and what was learned from before."""
    from emoe.routing.trace import Trace as Read
    from emoe.simulation.runs import without

    if args.split is not None:
        return [(trace.select(scored), trace.select(learned)) for learned, scored in _halves(args, trace.num_prompts)]
    if args.history is None:
        return [(trace, None)]
    history = Read.read(args.history, args.experts or trace.num_experts)
    return [(trace, without(history, tasks=not args.tasks, token_ids=not args.token_ids))]


def _halves(args: argparse.Namespace, prompts: int) -> list[tuple[list[int], list[int]]]:
    """For each seed, prompts to learn from and prompts to score."""
    from emoe.simulation.runs import halves

    if args.history is not None:
        raise UsageError("--history and --split both say what to learn from: give one of them.")
    return [halves(prompts, seed) for seed in args.split]


def _task(args: argparse.Namespace, trace: Trace) -> Task:
    from emoe.prediction.schedule import DEFAULT_PROMPTS
    from emoe.simulation.bindings import Binding
    from emoe.simulation.clock import Link
    from emoe.simulation.policies import Settings
    from emoe.simulation.runs import Task
    from emoe.tasks.profile import Profile

    known = trace.source.get("expert_bytes")
    sensitivity = None if args.profile is None else Profile.read(args.profile).sensitivity
    return Task(
        policies=_names(DEFAULT_POLICIES) if args.policy is None else args.policy,
        capacities=args.capacity,
        settings=Settings(args.replan_prompts or DEFAULT_PROMPTS, args.prefetch, args.seed),
        phases=args.phase,
        interleave=args.interleave,
        prompts=args.prompts,
        expert_bytes=args.expert_bytes or (known if isinstance(known, int) else None),
        link=None if args.bandwidth is None else Link(args.bandwidth, args.compute_time),
        binding=Binding(args.binding, sensitivity, args.sensitivity_threshold),
    )


def _labels(trace: Trace) -> str:
    found = f", {len(trace.tasks)} tasks" if trace.tasks else ", no task labels"
    return found if trace.token_ids is not None else f"{found}, no token ids"


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("name at least one policy")
    return names


def _capacities(text: str) -> list[float]:
    try:
        found = [ExpertMemory.parse(part.strip()) for part in text.split(",")]
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if any(each.kind != "share" for each in found):
        raise argparse.ArgumentTypeError(f"capacities are shares of each layer's experts, e.g. 20%,40%, not {text!r}")
    return [float(each.value) for each in found]


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"seeds are whole numbers separated by commas, e.g. 0,1,2, not {text!r}")
    return [int(part) for part in parts]


def _rate(text: str) -> int:
    if not text.endswith("/s"):
        raise argparse.ArgumentTypeError(f"a bandwidth is a size per second, e.g. 2GB/s, not {text!r}")
    rate = size(text.removesuffix("/s"))
    if not rate:
        raise argparse.ArgumentTypeError("a bandwidth must be above 0")
    return rate


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be seconds of at least 0, e.g. 0.0004, not {text!r}")
    return value
