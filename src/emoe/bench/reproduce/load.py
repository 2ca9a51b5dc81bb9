"""Requests that arrive, as Figures 12 and 19 send them: what a step costs, and which load is much, by measurement.

The engine runs once under load; its cost model then knows what a step, a token and a load take. The simulator
(`emoe simulate --arrivals`) serves recorded routes with those costs; live, `emoe serve` answers on this machine.
"""

from __future__ import annotations

import queue
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from emoe.bench.reproduce.ways import PAPER_P, bandwidth_of, rotated
from emoe.bench.reproduce.workbench import Workbench
from emoe.bench.serve.comparing import Comparison, Outcome
from emoe.bench.serve.local import Server
from emoe.bench.serve.workload import Prompt
from emoe.config import ExpertMemory
from emoe.engine.engine import Engine
from emoe.engine.interface import EngineSettings, FinishedEvent, Submission
from emoe.errors import EmoeError
from emoe.residency.budget import LayerNeed, plan_slots
from emoe.residency.eviction import make_eviction
from emoe.scheduling.arrivals import Arrival, poisson_arrivals
from emoe.simulation.serving import SimulationSettings, simulate_serving
from emoe.simulation.serving_targets import alone, targets_from
from emoe.simulation.serving_traffic import Routes, Targets, make_calls

PLAIN = "all resident, fifo"
"""Plain continuous batching: the same engine with every expert resident."""
SYSTEMS = {PLAIN: "fifo", "fifo": "fifo", "emoe": "emoe", "affinity": "affinity"}
"""The scheduler of each; all but `PLAIN` keep the run's share of the experts and load the others on demand."""
REROUTED = "emoe, rerouted"
"""Algorithm 1 with mode `resident`, as the paper has it: a missing expert is replaced by the best that is there. Live
only: the simulator loads every miss."""
OPTIONS: dict[str, tuple[str, ...]] = {
    REROUTED: ("--mode", "resident", "--predictor", "task-popularity", "--replan-prompts", str(PAPER_P))
}
RUNNING = 8
LIVE_S = 30.0
"""Seconds of arrivals in a live run."""
SCALE = (5.0, 5.0)
"""Targets: so many times what the first token, and a later one, take alone."""
MET = 0.9
"""The load that others are multiples of: fifo still meets the targets of this share of the requests."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What the simulator needs: routes of the scored prompts, targets by task, settings by system."""

    routes: Routes
    lengths: Mapping[str, Any]
    shares: Any
    targets: Mapping[str, Targets]
    settings: Mapping[str, SimulationSettings]

    def run(self, system: str, arrivals: Sequence[Arrival], seed: int, wrong: float = 0.0) -> Outcome:
        """One run on the virtual clock."""
        settings = self.settings[system]
        calls = make_calls(
            arrivals,
            self.routes,
            self.lengths,
            lambda task: self.targets[task],
            wrong_labels=wrong,
            longest=settings.kv_tokens // 2,
            seed=seed,
        )
        found = simulate_serving(calls, self.routes, settings, shares=self.shares).summary()
        return Outcome(found.goodput, found.met_share, found.latency.mean, found.ttft.mean)


def simulated(bench: Workbench) -> Simulated:
    """Ready to run, with the costs of this machine and the slowed store."""
    trace, _ = bench.recorded("score")
    routes, profile = Routes.of_trace(trace), bench.profile
    shape = routes.shape
    needs = [LayerNeed(rank, shape.experts, shape.top_k, 1) for rank in range(shape.layers)]
    plan = plan_slots(ExpertMemory.parse(bench.share), needs, shared_from=make_eviction("least-stale").shared_from)
    costs = engine_costs(bench)
    settings = {
        system: SimulationSettings(
            scheduler=scheduler,
            max_running=RUNNING,
            costs=costs,
            bank=None if system == PLAIN else plan.pools[0],
        )
        for system, scheduler in SYSTEMS.items()
    }
    known = {task: lengths for task in routes.prompts if (lengths := profile.lengths_of(task)) is not None}
    targets = targets_from(alone(routes, known, settings["fifo"]), *SCALE)
    return Simulated(routes, known, profile.popularity_of, targets, settings)


def engine_costs(bench: Workbench) -> dict[str, float]:
    """Seconds of a step, a token, an input token and a load, as the engine's cost model has learned them under load."""
    count = bench.pick(32, 96)

    def measure() -> dict[str, float]:
        ids, prompts = bench.ids("score"), bench.prompts["score"]
        ended: queue.Queue[FinishedEvent] = queue.Queue()
        options = {"expert_memory": bench.share, "profile": bench.profile}
        with bench.model(**options, max_read_bytes_per_s=bandwidth_of(bench, "slowed")) as (model, tokenizer):
            settings = EngineSettings(scheduler="fifo", max_running=RUNNING, max_waiting=count)
            engine = Engine(model, tokenizer, settings, profile=bench.profile)
            engine.start()
            try:
                for number in range(count):
                    at = number % len(ids)
                    engine.submit(
                        Submission(prompt_ids=ids[at], max_tokens=bench.new_tokens, task=prompts[at].task),
                        lambda event: ended.put(event) if isinstance(event, FinishedEvent) else None,
                    )
                for _ in range(count):
                    event = ended.get()
                    if event.error is not None:
                        raise event.error
                return dict(engine.costs.as_dict())
            finally:
                engine.stop()

    found: dict[str, float] = bench.cell("engine costs", {"requests": count, "running": RUNNING}, measure)
    return found


def usual_rate(bench: Workbench, sim: Simulated) -> float:
    """Requests per second at which fifo, simulated, still meets the targets of `MET` of the requests; by bisection."""

    def search() -> float:
        low, high = 0.01, 100.0
        for _ in range(14):
            rate = (low * high) ** 0.5
            runs = [sim.run("fifo", poisson_arrivals(rate, 150, seed), seed) for seed in (90, 91)]
            met = statistics.fmean(run.met_share for run in runs)
            low, high = (rate, high) if met >= MET else (low, rate)
        return low

    found: float = bench.cell("usual rate", {"met": MET, "running": RUNNING, "scale": SCALE}, search)
    return found


def live_runs(
    bench: Workbench, systems: Sequence[str], loads: Sequence[tuple[float, float]], seed: int
) -> list[list[dict[str, float]]]:
    """An outcome for each (requests per second, share of wrong labels) and system; each run lasts about half a minute.

    One server is under load at a time; the order of the systems changes with the load.
    """
    found = []
    with live(bench, systems) as comparison:
        for number, (rate, wrong) in enumerate(loads):
            count = max(16, min(80, round(rate * LIVE_S)))
            requests = comparison.requests(rate, count, seed, wrong)
            outcomes = {}
            for system in rotated(systems, number + seed):
                bench.say(f"  {rate:.2f} requests/s, {wrong:.0%} of the labels wrong, seed {seed}: {system}")
                (outcomes[system],) = comparison.live([(system, requests)])
            found.append([outcomes[system].as_dict() for system in systems])
    return found


@contextmanager
def live(bench: Workbench, systems: Sequence[str]) -> Iterator[Comparison]:
    """A server of each system on 127.0.0.1, with the slowed store, and targets by what fifo's needs unloaded.

    All end with the block.

    Raises:
        EmoeError: a server does not start, or a request fails.
    """
    bench.profile  # noqa: B018 - made before servers read it
    model = [] if bench.settings.model is None else [str(bench.folder)]
    words = ["--max-num-seqs", str(RUNNING), "--max-queue", "10000", "--status-interval", "0"]
    words += ["--profile", str(bench.work / "profile"), "-t", str(bench.settings.threads)]
    slow = ["--max-read-bytes-per-s", str(round(bandwidth_of(bench, "slowed") or 0))]
    prompts = [Prompt(prompt.messages[-1]["content"], prompt.task) for prompt in bench.prompts["score"]]
    with ExitStack() as stack:
        servers = {}
        for system in systems:
            kept = [] if system == PLAIN else ["--expert-memory", bench.share, *OPTIONS.get(system, ())]
            scheduler = SYSTEMS.get(system, "emoe")
            servers[system] = stack.enter_context(Server(scheduler, [*words, *slow, *kept, *model]))
        for server in servers.values():
            try:
                server.wait()
            except RuntimeError as error:
                raise EmoeError(str(error)) from error
        comparison = Comparison(servers, prompts, bench.new_tokens)
        comparison.calibrate("fifo" if "fifo" in systems else systems[0], SCALE[0])
        yield comparison


def scaled(arrivals: Sequence[Arrival], rate: float, sim: Simulated) -> list[Arrival]:
    """The same arrivals at `rate` requests per second, inputs and answers on average as long as this model's.

    How bursty they are, and how unequal in length, stays.
    """
    prompts = [prompt for each in sim.routes.prompts.values() for prompt in each]
    usual = (
        statistics.fmean(prompt.input_rows for prompt in prompts),
        statistics.fmean(each.mean for each in sim.lengths.values()),
    )
    given = (
        statistics.fmean(each.input_tokens or 1 for each in arrivals),
        statistics.fmean(each.output_tokens or 1 for each in arrivals),
    )
    faster = (len(arrivals) - 1) / max(1e-9, arrivals[-1].at_s - arrivals[0].at_s) / rate
    return [
        Arrival(
            each.at_s * faster,
            max(1, round((each.input_tokens or 1) * usual[0] / given[0])),
            max(1, round((each.output_tokens or 1) * usual[1] / given[1])),
        )
        for each in arrivals
    ]
