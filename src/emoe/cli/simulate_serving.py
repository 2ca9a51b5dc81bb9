"""`emoe simulate --arrivals`: continuous batching under each scheduler, on a virtual clock."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.cli.options import expert_memory, positive
from emoe.cli.output import ProgressLine, note, print_json, table
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.scheduling.arrivals import Arrival
    from emoe.simulation.serving import SimulationSettings
    from emoe.simulation.serving_results import ServingResults
    from emoe.simulation.serving_traffic import Routes, Targets
    from emoe.tasks.lengths import Lengths
    from emoe.tasks.profile import Profile

COSTS = {"step_s": 0.003, "token_s": 0.0006, "prefill_token_s": 0.0002, "expert_load_s": 0.004}
"""emoe-nano on one core, and a store so slow that one load takes what a step computes, as on large models."""

NOT_SERVING = ("random", "policy", "history", "split", "prompts", "bandwidth", "plot", "replan_prompts")
LIMITS = ("max_running", "max_batch_tokens", "kv_tokens", "max_input_tokens")
ONLY_SERVING = ("requests", "seeds", "task_mix", "slo", "model_like", "costs", "load_time", "expert_memory", *LIMITS)


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Options of serving."""
    add = parser.add_argument_group(
        "serving", "requests that arrive, are scheduled and batched (docs/simulation.md)"
    ).add_argument
    add("--arrivals", type=Path, metavar="FILE", help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens (Azure's)")
    add("--poisson", type=_above_0, metavar="RATE", help="instead of a file, so many requests per second on average")
    add("--requests", type=positive, metavar="N", help="how many (default: all of the file; 300)")
    add("--rate-scale", type=_above_0, default=1.0, metavar="X", help="2: twice as fast as the file")
    add("--length-scale", type=_above_0, default=1.0, metavar="X", help="factor for lengths")
    add("--schedulers", default="fifo,edf,emoe,affinity", metavar="NAMES", help="default: fifo,edf,emoe,affinity")
    add("--seeds", type=_whole_numbers, metavar="N,N", help="draws of traffic to average over (default: --seed)")
    add("--task-mix", metavar="MIX", help="weights of tasks, as qa=2,converse=1 (default: all alike)")
    add("--wrong-labels", type=float, default=0.0, metavar="SHARE", help="requests that bear another task's label")
    add("--slo", type=Path, metavar="FILE", help='JSON {"TASK": {"ttft_s": 1.5, "tpot_s": 0.05}, ...}; null: none')
    add(
        "--slo-scale",
        type=_two,
        default=(5.0, 3.0),
        metavar="A,B",
        help="without --slo: A times the first token's time alone, B times a later token's (default: 5,3)",
    )
    add("--model-like", metavar="NAME", help="shape, costs and limits of a preset (mixtral) instead of emoe-nano's")
    add(
        "--costs", type=Path, metavar="FILE", help="JSON of step_s, token_s, prefill_token_s, kv_token_s, expert_load_s"
    )
    add("--load-time", type=_above_0, metavar="S", help="seconds to load an expert, in place of those costs'")
    add("--expert-memory", type=expert_memory, metavar="SIZE", help="share of the experts that fit (default: 40%%)")
    add("--eviction", default="least-stale", metavar="NAME", help="of experts (default: least-stale)")
    for name in ("--max-running", "--max-batch-tokens", "--kv-tokens", "--max-input-tokens"):
        add(name, type=positive, metavar="N", help="as of emoe serve")


def asked_for(args: argparse.Namespace) -> bool:
    """Whether the command line is about serving.

    Raises:
        UsageError: it mixes options of serving and of replaying a trace.
    """
    serving = args.arrivals is not None or args.poisson is not None
    for name in NOT_SERVING if serving else ONLY_SERVING:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option} means nothing for requests that arrive: leave it out."
                if serving
                else f"{option} is for requests that arrive: give --arrivals FILE or --poisson RATE with it."
            )
    return serving


def run_serving(args: argparse.Namespace) -> None:
    """Print one row for each scheduler."""
    from emoe.scheduling.registry import make_scheduler
    from emoe.simulation.serving import simulate_serving
    from emoe.simulation.serving_traffic import make_calls

    if args.arrivals is not None and args.poisson is not None:
        raise UsageError("--arrivals and --poisson both say when requests come: give one of them.")
    names = [name.strip() for name in args.schedulers.split(",") if name.strip()]
    if not names:
        raise UsageError("--schedulers names none: write them like fifo,affinity.")
    for name in names:
        make_scheduler(name)
    routes, lengths, shares = _routes(args)
    settings = _settings(args, routes)
    targets = _targets(args, routes, lengths, settings)
    for task, each in targets.items():
        note(f"targets of {task}: first token {_ms(each.ttft_s)}, later tokens {_ms(each.tpot_s)}")
    mix = _mix(args.task_mix)
    found: dict[str, list[ServingResults]] = {name: [] for name in names}
    for seed in args.seeds or [args.seed]:
        calls = make_calls(
            _arrivals(args, seed),
            routes,
            lengths,
            lambda task: targets[task],
            mix=mix,
            wrong_labels=args.wrong_labels,
            length_scale=args.length_scale if args.arrivals is None else 1.0,
            longest=settings.kv_tokens // 2,
            seed=seed,
        )
        for name in names:
            progress = _Requests(f"{name}, seed {seed}:")
            one = dataclasses.replace(settings, scheduler=name)
            found[name].append(simulate_serving(calls, routes, one, shares=shares, report=progress))
    if args.json:
        seeds = args.seeds or [args.seed]
        pairs = ((seed, each) for results in found.values() for seed, each in zip(seeds, results, strict=True))
        print_json([{"seed": seed, **each.as_dict()} for seed, each in pairs])
        return
    first = found[names[0]][0]
    span = first.calls[-1].at_s - first.calls[0].at_s
    note(f"{len(first.calls)} requests in {span:.0f} s of virtual time; {routes.source}")
    print(table(cells(found), right=range(1, 20), indent=""))


def cells(found: Mapping[str, list[ServingResults]]) -> list[list[str]]:
    """The table for people, headings first: means over the seeds."""
    head = ["scheduler", "latency", "p50", "p99", "first token", "p99", "per token", "p99"]
    head += ["met", "goodput/s", "tokens/s", "loads/step", "queued"]
    lines = [head]
    for name, results in found.items():
        summaries = [each.summary() for each in results]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        lines.append(
            [
                name,
                _s(mean([s.latency.mean for s in summaries])),
                _s(mean([s.latency.p50 for s in summaries])),
                _s(mean([s.latency.p99 for s in summaries])),
                _s(mean([s.ttft.mean for s in summaries])),
                _s(mean([s.ttft.p99 for s in summaries])),
                _s(mean([s.tpot.mean for s in summaries])),
                _s(mean([s.tpot.p99 for s in summaries])),
                f"{mean([s.met_share for s in summaries]):.1%}",
                f"{mean([s.goodput for s in summaries]):.4g}",
                f"{mean([s.tokens_per_s for s in summaries]):.4g}",
                f"{mean([r.loads / max(1, r.steps) for r in results]):.3g}",
                _s(mean([s.queue.mean for s in summaries])),
            ]
        )
    return lines


class _Requests(ProgressLine):
    """Progress in requests."""

    def line(self, done: int, total: int, seconds: float, since: int) -> str:
        """The text for `done` of `total`."""
        return f"{self._what} {done} of {total} requests ({done / total:.0%})"


def _routes(args: argparse.Namespace) -> tuple[Routes, Mapping[str, Lengths], Any]:
    """What requests replay, the lengths of their answers, and what schedulers believe of their experts."""
    from emoe.routing.trace import Trace
    from emoe.simulation.serving_presets import preset
    from emoe.simulation.serving_traffic import Routes

    profile = _profile(args.profile)
    if args.trace is not None:
        routes = Routes.of_trace(Trace.read(args.trace, args.experts))
        fits = profile.shape == routes.shape and set(profile.popularity) >= set(routes.prompts)
        if args.profile is not None and not fits:
            raise UsageError(f"the profile {args.profile} is of another model, or of other tasks, than {args.trace}.")
        return routes, profile.lengths if fits else {}, profile.popularity_of if fits else None
    if args.model_like is not None:
        like = preset(args.model_like)
        note(f"costs and limits of the preset {args.model_like!r}, from arithmetic, not measured")
        return Routes.drawn(like.shape, like.shares(profile.tasks), args.seed), profile.lengths, None
    shares = {task: profile.popularity_of(task) for task in profile.tasks}
    return Routes.drawn(profile.shape, shares, args.seed), profile.lengths, profile.popularity_of


def _profile(path: str | None) -> Profile:
    from emoe.tasks.profile import Profile

    if path is not None:
        return Profile.read(path)
    with as_file(files("emoe.nano") / "profile") as folder:
        return Profile.read(folder)


def _settings(args: argparse.Namespace, routes: Routes) -> SimulationSettings:
    from emoe.config import ExpertMemory
    from emoe.residency.budget import LayerNeed, plan_slots
    from emoe.residency.eviction import make_eviction
    from emoe.simulation.serving import SimulationSettings
    from emoe.simulation.serving_presets import preset

    like = None if args.model_like is None else preset(args.model_like)
    costs: Mapping[str, float] = COSTS if like is None else like.costs
    if args.costs is not None:
        costs = _read_costs(args.costs)
    if args.load_time is not None:
        costs = {**costs, "expert_load_s": args.load_time}
    memory = args.expert_memory or ExpertMemory("share", 0.4)
    if memory.kind == "bytes":
        raise UsageError("--expert-memory is a share of the experts here, like 40%, or 12/layer.")
    shape = routes.shape
    needs = [LayerNeed(rank, shape.experts, shape.top_k, 1) for rank in range(shape.layers)]
    plan = plan_slots(memory, needs, shared_from=make_eviction(args.eviction).shared_from)
    note(f"{plan.slots} of {shape.layers * shape.experts} experts fit; costs in seconds: {dict(costs)}")
    return SimulationSettings(
        max_running=args.max_running or (8 if like is None else like.max_running),
        max_batch_tokens=args.max_batch_tokens or (512 if like is None else like.max_batch_tokens),
        kv_tokens=args.kv_tokens or (16384 if like is None else like.kv_tokens),
        max_input_tokens=args.max_input_tokens,
        costs=costs,
        bank=plan.pools[0],
        eviction=args.eviction,
    )


def _targets(
    args: argparse.Namespace, routes: Routes, lengths: Mapping[str, Lengths], settings: SimulationSettings
) -> dict[str, Targets]:
    from emoe.simulation.serving_targets import alone, read_targets, targets_from

    if args.slo is not None:
        return read_targets(args.slo, routes.prompts)
    typical = None
    if args.arrivals is not None:
        arrivals = _arrivals(args, args.seed)
        typical = round(sum(each.input_tokens or 0 for each in arrivals) / len(arrivals)) or None
    longest = settings.kv_tokens // 2
    times = alone(routes, lengths, settings, input_tokens=typical, length_scale=args.length_scale, longest=longest)
    return targets_from(times, *args.slo_scale)


def _arrivals(args: argparse.Namespace, seed: int) -> list[Arrival]:
    from emoe.scheduling.arrivals import poisson_arrivals, read_arrivals

    if args.arrivals is None:
        return poisson_arrivals(args.poisson, args.requests or 300, seed)
    scales = {"time_scale": 1 / args.rate_scale, "length_scale": args.length_scale}
    return read_arrivals(args.arrivals, **scales, limit=args.requests)


def _read_costs(path: Path) -> dict[str, float]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        costs = {name: float(values[name]) for name in COSTS} | {"kv_token_s": float(values.get("kv_token_s", 0.0))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"cannot read costs from {path}: {error!r}; it holds {', '.join(COSTS)} in seconds."
        ) from error
    if min(costs.values()) < 0:
        raise UsageError(f"{path} holds a negative cost: {costs}.")
    return costs


def _mix(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        return {name.strip(): float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}
    except ValueError as error:
        raise UsageError(f"--task-mix {text!r}: write weights like qa=2,converse=1.") from error


def _two(text: str) -> tuple[float, float]:
    first, _, second = text.partition(",")
    return _above_0(first), _above_0(second)


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _whole_numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"whole numbers separated by commas, e.g. 0,1,2, not {text!r}")
    return [int(part) for part in parts]


def _s(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.4g} s"


def _ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"within {_s(seconds)}"
