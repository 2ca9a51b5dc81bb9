"""Prometheus: vLLM's names under `emoe:`, and what the experts behind them do.

Distributions are observed as requests run; everything else is read from the engine when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import emoe
from emoe.config import Mode
from emoe.engine.interface import EngineStats, Report, TokenEvent
from emoe.tasks.keywords import OTHER

LAYER_GROUPS = ("early", "middle", "late")

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TPOT = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)

Value = tuple[tuple[str, ...], float]


class Watched(Protocol):
    """The parts of an engine that are measured."""

    @property
    def mode(self) -> Mode: ...
    @property
    def lossy(self) -> bool: ...
    @property
    def expert_dtype(self) -> str: ...
    @property
    def scheduler_name(self) -> str: ...
    @property
    def layers(self) -> int: ...
    def stats(self) -> EngineStats: ...


def layer_group(layer: int, layers: int) -> str:
    """The third of the model in which the MoE layer lies, 0 being the first layer."""
    return LAYER_GROUPS[min(layer * len(LAYER_GROUPS) // max(layers, 1), len(LAYER_GROUPS) - 1)]


class Metrics:
    """All metrics of one server, in a registry of their own. The engine bounds the number of different tasks."""

    def __init__(self, model_name: str, engine: Watched) -> None:
        # A series per series, which nobody draws.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._model = model_name
        self.slo_met = 0
        self.slo_asked = 0

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"emoe:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"emoe:{name}", text, ["model_name", *labels], registry=self.registry)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", _TPOT)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", _WHOLE)
        self._queue = histogram("request_queue_time_seconds", "From arrival to admission.", _WHOLE)
        self._success = counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._refused = counter("requests_refused", "Requests that were not taken, by the error's code.", "code")
        self._slo = counter("slo", "Requests with a target, by task, target and whether it was met.", *_SLO_LABELS)
        self.registry.register(EngineCollector(model_name, engine))

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def refused(self, code: str | None) -> None:
        """A request was not taken."""
        self._refused.labels(self._model, code or "other").inc()

    def token(self, event: TokenEvent, before: TokenEvent | None) -> None:
        """A token has come, after another of the same answer."""
        if before is not None:
            self._itl.observe(event.at_s - before.at_s)

    def ended(self, report: Report, reason: str) -> None:
        """An answer has ended."""
        self._success.labels(self._model, reason).inc()
        self._queue.observe(report.queue_s)
        self._e2e.observe(report.e2e_s)
        if report.ttft_s is not None:
            self._ttft.observe(report.ttft_s)
        if reason != "cancelled":  # who hangs up has no target any more
            self._count_slo(report)

    def _count_slo(self, report: Report) -> None:
        task = report.task or OTHER
        for target, met in (("ttft", report.ttft_met), ("tpot", report.tpot_met), ("all", report.slo_met)):
            if met is not None:
                self._slo.labels(self._model, task, target, str(met).lower()).inc()
        if report.slo_met is not None:
            self.slo_asked += 1
            self.slo_met += report.slo_met


_SLO_LABELS = ("task", "target", "met")


class EngineCollector(Collector):
    """Reads the engine's counters whenever the registry is asked."""

    def __init__(self, model_name: str, engine: Watched) -> None:
        self._model = model_name
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """All that comes from `engine.stats()`."""
        s = self._engine.stats()
        yield from self._gauges(s)
        yield from self._counters(s)
        for name, text, counts in (
            ("expert_hits", "Expert keys that were resident when a layer wanted them.", s.hits),
            ("expert_misses", "Expert keys that were not.", s.misses),
        ):
            yield self._counter(name, text, self._by_group(counts), "layer_group", "task")
        for name, text, tokens in (
            ("rerouted_tokens", "Tokens (per layer) of which a chosen expert was replaced.", s.rerouted_tokens),
            ("routed_tokens", "Tokens (per layer) that were routed.", s.routed_tokens),
        ):
            yield self._counter(name, text, self._by_task(tokens), "task")

    def _gauges(self, s: EngineStats) -> Iterable[Metric]:
        engine = self._engine
        labels = {
            "mode": engine.mode,
            "lossy": str(engine.lossy).lower(),
            "expert_dtype": engine.expert_dtype,
            "scheduler": engine.scheduler_name,
            "version": emoe.__version__,
        }
        info = self._gauge("info", "1; the labels say what is served.", 1, *labels)
        info.add_metric([self._model, *labels.values()], 1)
        yield info
        yield self._gauge("num_requests_running", "Requests that are being answered.", s.running)
        yield self._gauge("num_requests_waiting", "Requests that wait.", s.waiting)
        usage = s.kv_tokens_used / s.kv_tokens if s.kv_tokens else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of KV memory in use, 1 is all.", usage)
        yield self._gauge("expert_resident_bytes", "Bytes of experts in slots.", s.resident_bytes)
        yield self._gauge("expert_budget_bytes", "Bytes that experts may take.", s.budget_bytes)
        ratio = float("nan") if s.predictor_hit_rate is None else s.predictor_hit_rate
        yield self._gauge("predictor_hit_ratio", "Share of what was planned that was used; NaN: none yet.", ratio)
        routed = sum(s.routed_tokens.values())
        share = sum(s.rerouted_tokens.values()) / routed if routed else 0.0
        yield self._gauge("rerouted_token_ratio", "Share of routed tokens that were rerouted.", share)

    def _counters(self, s: EngineStats) -> Iterable[Metric]:
        for name, text, value in (
            ("prompt_tokens", "Input tokens read.", s.prompt_tokens),
            ("generation_tokens", "Tokens generated.", s.generation_tokens),
            ("num_preemptions", "Requests set back for want of KV memory.", s.preemptions),
            ("expert_loads", "Experts loaded.", s.loads),
            ("expert_loaded_bytes", "Bytes of experts loaded.", s.bytes_loaded),
            ("expert_load_wait_seconds", "Seconds in which layers waited for loads.", s.load_wait_s),
            ("expert_prefetch_wasted", "Prefetched experts that nobody used.", s.prefetches_unused),
            ("expert_prefetch_wasted_bytes", "Bytes of prefetched experts that nobody used.", s.prefetch_bytes_unused),
            ("predictor_calls", "Predictions made.", s.predictor_calls),
            ("predictor_seconds", "Seconds spent on predictions.", s.predictor_s),
            ("expert_plans", "Plans of Equation 2.", s.plans),
            ("engine_steps", "Passes through the model.", s.steps),
            ("engine_busy_seconds", "Seconds in passes.", s.busy_s),
        ):
            yield self._counter(name, text, [((), value)])

    def _gauge(self, name: str, text: str, value: float, *labels: str) -> GaugeMetricFamily:
        made = GaugeMetricFamily(f"emoe:{name}", text, labels=["model_name", *labels])
        if not labels:
            made.add_metric([self._model], value)
        return made

    def _counter(self, name: str, text: str, values: Iterable[Value], *labels: str) -> CounterMetricFamily:
        made = CounterMetricFamily(f"emoe:{name}", text, labels=["model_name", *labels])
        for of, value in values:
            made.add_metric([self._model, *of], value)
        return made

    def _by_group(self, counts: Mapping[tuple[str, int], int]) -> list[Value]:
        sums: dict[tuple[str, str], int] = {}
        for (task, layer), count in counts.items():
            key = layer_group(layer, self._engine.layers), task
            sums[key] = sums.get(key, 0) + count
        return sorted(sums.items())

    def _by_task(self, counts: Mapping[str, int]) -> list[Value]:
        return sorted(((task,), float(count)) for task, count in counts.items())
