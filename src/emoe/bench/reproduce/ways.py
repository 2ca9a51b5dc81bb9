"""Ways to have a model's experts (all resident, on demand, prefetched, ours), and what a request takes with each.

Every way is fed the same tokens, so all do the same work. A measured time is of one request, or one batch, that has
the model to itself.

A store is a page cache where a model is small, and loading costs nearly nothing. So everything is measured with a
slowed store, too: one in which loading an expert takes `LOAD_LAYERS` times what a layer computes for a token. That is
what it is for Mixtral 8x7B, whose 352 MB an expert take 14 ms over PCIe at 25 GB/s where a layer takes 1 to 2 ms.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from emoe.bench import forced
from emoe.bench.engines import COUNTED, Running, Sample
from emoe.bench.process import memory
from emoe.bench.reproduce.room import all_resident, refusal
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import BudgetError, UsageError
from emoe.model import stats
from emoe.model.bind import label_task
from emoe.planner import facts_of

Store = Literal["as it is", "slowed"]
T = TypeVar("T")
STORES: tuple[Store, ...] = ("slowed", "as it is")
LOAD_LAYERS = 7.0
PAPER_P = 40
"""Prompts between two plans (section 2.3)."""

ALL, BARE, DEMAND = "all resident", "on demand, nothing kept", "on demand"
NEXT_GATE, MATCHING, OURS = "next-gate prefetching", "MoE-Infinity-style", "eMoE"


@dataclass(frozen=True, slots=True)
class Way:
    """Options of `emoe.load`; `kept`: of the experts, where it is not the run's share; `learns`: a predictor, trained
    first."""

    options: Mapping[str, Any]
    kept: str | None = None
    learns: str | None = None


WAYS: dict[str, Way] = {
    ALL: Way({}, "100%"),
    BARE: Way({}, "one layer's k"),
    DEMAND: Way({}),
    NEXT_GATE: Way({"prefetch": "next-gate"}),
    MATCHING: Way({"replan_prompts": 1}, learns="moe-infinity"),
    OURS: Way({"mode": "resident"}, learns="task-popularity"),
}


def kept(bench: Workbench, way: str) -> str:
    """Of the experts, for people."""
    return WAYS[way].kept or bench.share


def in_words(share: str) -> str:
    """A share as texts have it."""
    return share.replace("%", " %")


def fitting(bench: Workbench, ways: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ways that fit the memory of this run, and a note for each that does not.

    Raises:
        BudgetError: none does but `BARE`.
    """
    why = {way: refusal(bench, None if way == ALL else bench.share) for way in ways if way != BARE}
    left = tuple(way for way in ways if why.get(way) is None)
    if all(why.values()):
        raise BudgetError(" ".join(dict.fromkeys(filter(None, why.values()))))
    return left, tuple(f"Not measured: {way}. {text}" for way, text in why.items() if text is not None)


def bandwidth_of(bench: Workbench, store: Store) -> float | None:
    """Bytes per second of that store; None: as fast as it is. Measured once in a run."""
    return None if store == "as it is" else float(_slowed(bench)["bytes_per_s"])


def about_stores(bench: Workbench) -> str:
    """The slowed store in words."""
    found = _slowed(bench)
    return (
        f"Slowed store: {found['bytes_per_s'] / 1e6:.3g} MB/s, so that loading an expert of "
        f"{found['expert_nbytes'] / 1024:,.0f} KiB takes {1e3 * found['load_s']:.2f} ms, {LOAD_LAYERS:g} times what a "
        f"layer computes for a token here ({1e3 * found['layer_s']:.2f} ms); on Mixtral 8x7B over PCIe it is 7 to 14 "
        f"times. Store as it is: for a model that the page cache holds, reads at the speed of memory."
    )


def _slowed(bench: Workbench) -> dict[str, float]:
    def measure() -> dict[str, float]:
        _, facts = facts_of(bench.settings.model)
        layers = len(facts.expert_layers)
        # Where not all experts fit, waiting for them is taken off: what is left is computing.
        with bench.model(expert_memory=bench.budget) as (model, _):
            running = Running(model, counters_of(model))
            samples = [feed(running, sequences(bench, 1, 48 + 32, turn)[:1], 48) for turn in range(4)]
        waits = statistics.fmean(sample.decode["load_wait_s"] / len(sample.step_s) for sample in samples[1:])
        step_s = statistics.median(step for sample in samples[1:] for step in sample.step_s)
        layer_s = max(step_s - waits, 0.1 * step_s) / layers
        load_s = LOAD_LAYERS * layer_s
        nbytes = facts.expert_bytes / facts.experts
        return {"bytes_per_s": nbytes / load_s, "expert_nbytes": nbytes, "load_s": load_s, "layer_s": layer_s}

    found: dict[str, float] = bench.cell("slowed store", {"layers": LOAD_LAYERS}, measure)
    return found


@contextmanager
def opened(bench: Workbench, way: str, store: Store, plan_prompts: int = PAPER_P) -> Iterator[Running]:
    """The model, loaded in one of the `WAYS`; ours asks its predictor every `plan_prompts` prompts."""
    chosen = WAYS[way]
    options = dict(chosen.options)
    if way == ALL:
        all_resident(bench)
    elif way != BARE:
        options["expert_memory"] = bench.share
    else:
        options["expert_memory"] = f"{facts_of(bench.settings.model)[1].top_k}/layer"
    if chosen.learns is not None:
        options |= {"predictor": chosen.learns, "profile": bench.trained(chosen.learns)}
        options.setdefault("replan_prompts", plan_prompts)
    with bench.model(**options, max_read_bytes_per_s=bandwidth_of(bench, store)) as (model, _):
        yield Running(model, counters_of(model))


def counters_of(model: Any) -> Callable[[], dict[str, float]]:
    """What the engine counts, read when asked."""

    def counters() -> dict[str, float]:
        values = stats(model)
        return {name: values[name] for name in COUNTED}

    return counters


def feed(running: Running, ids: Sequence[Sequence[int]], prompt: int, chunk: int | None = None) -> Sample:
    """Read `prompt` tokens of `ids` [batch][tokens] at once (or in passes of `chunk`), then the others in turn."""
    return forced.replay(running, [list(row) for row in ids], prompt, memory().now_bytes, chunk)


def sequences(bench: Workbench, batch: int, tokens: int, turn: int = 0) -> list[list[int]]:
    """`batch` rows of `tokens` token ids: the scored prompts one after another, from another place at every `turn`."""
    stream = [token for ids in bench.ids("score") for token in ids]
    if not stream:
        raise UsageError("the prompts to score have no tokens: give others with --prompts.")
    starts = [(turn * batch + row) * tokens for row in range(batch)]
    return [[stream[(start + at) % len(stream)] for at in range(tokens)] for start in starts]


@dataclass(frozen=True, slots=True)
class Request:
    """What one request took: seconds, of them waiting for loads; bytes and experts that were loaded."""

    latency_s: float
    first_token_s: float
    wait_s: float
    bytes_read: float
    loads: float
    tokens: int

    @property
    def compute_s(self) -> float:
        """What was not waiting."""
        return self.latency_s - self.wait_s

    @classmethod
    def of(cls, sample: Sample, tokens: int) -> Request:
        """Of one measured feeding of so many tokens."""

        def both(name: str) -> float:
            return sample.prefill[name] + sample.decode[name]

        latency_s = sample.first_token_s + sample.decode_s
        wait_s = min(both("load_wait_s"), latency_s)
        return cls(latency_s, sample.first_token_s, wait_s, both("bytes_read"), both("loads"), tokens)


Rounds = dict[tuple[str, Store], list[list[Request]]]
"""The requests of each round, by way and store."""


def requests(bench: Workbench, ways: Sequence[str]) -> Rounds:
    """One request after another in each way, with both stores: prompts of all tasks in turn, with the full model's
    answers as given.

    Rounds alternate between the ways, in another order each, every one with a newly loaded model, after one request
    that is not counted. Ours makes one plan in a round.
    """
    count, rounds = min(bench.pick(8, PAPER_P), len(bench.prompts["score"])), 3
    keys: list[dict[str, Any]] = [
        {"way": way, "store": store, "round": turn, "count": count}
        for turn in range(rounds)
        for store in STORES
        for way in rotated(ways, turn)
    ]
    found: Rounds = {}
    values = bench.cells("requests", keys, lambda **chosen: _round(bench, **chosen))
    for key, value in zip(keys, values, strict=True):
        found.setdefault((key["way"], key["store"]), []).append([Request(*row) for row in value])
    return found


def rotated(ways: Sequence[T], turn: int) -> list[T]:
    """Another order in every round, so that a slow minute does not always meet the same way."""
    return [ways[(at + turn) % len(ways)] for at in range(len(ways))]


def _round(bench: Workbench, way: str, store: Store, round: int, count: int) -> list[list[float]]:
    _, answers = bench.recorded("score")
    prompts, ids = bench.prompts["score"], bench.ids("score")
    by_turn = sorted(range(len(prompts)), key=lambda i: (_turn(bench, i), bench.tasks.index(prompts[i].task)))
    found = []
    with opened(bench, way, store, plan_prompts=count) as running:
        for number in range(-1, count):
            index = by_turn[number % len(by_turn)]
            label_task(running.model, prompts[index].task)
            answer = answers[index].ids[:-1]
            sample = feed(running, [[*ids[index], *answer]], len(ids[index]))
            made = Request.of(sample, len(ids[index]) + len(answer))
            if number >= 0:
                found.append([getattr(made, name) for name in made.__slots__])
    return found


def _turn(bench: Workbench, index: int) -> int:
    """How many prompts of its task come before it."""
    prompts = bench.prompts["score"]
    return sum(prompt.task == prompts[index].task for prompt in prompts[:index])


def batches(
    bench: Workbench,
    way: str,
    store: Store,
    batch: int,
    prompt: int,
    new: int,
    repeats: int,
    round: int,
) -> list[float]:
    """Seconds of `repeats` batches of `batch` prompts and `new` tokens each, one batch after another."""
    with opened(bench, way, store, plan_prompts=repeats * batch) as running:
        feed(running, sequences(bench, batch, prompt + new), prompt)
        samples = [feed(running, sequences(bench, batch, prompt + new, turn + 1), prompt) for turn in range(repeats)]
    return [sample.first_token_s + sample.decode_s for sample in samples]


def middle(values: Sequence[float]) -> float:
    """The median."""
    return float(statistics.median(values))
