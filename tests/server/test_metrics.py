"""What /metrics says, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from emoe.engine.interface import TokenEvent
from emoe.server.log import Reading, status_line
from emoe.server.metrics import Metrics, layer_group
from tests.server.conftest import Running, Serve, until
from tests.server.stand_ins import REPORT, STATS, ScriptedEngine, finished

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


class Fixed(ScriptedEngine):
    """Its counters are STATS."""

    def stats(self) -> Any:
        return STATS


def samples(text: bytes | str) -> dict[tuple[str, ...], float]:
    """(name, labels other than the model's, sorted) -> value."""
    found = {}
    for family in text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "m"
            labels = sorted(f"{k}={v}" for k, v in sample.labels.items() if k != "model_name")
            found[(sample.name, *labels)] = sample.value
    return found


def test_what_is_read_from_the_engine() -> None:
    found = samples(Metrics("m", Fixed()).text())
    assert found[("emoe:num_requests_running",)] == 1
    assert found[("emoe:num_requests_waiting",)] == 2
    assert found[("emoe:kv_cache_usage_perc",)] == 0.25
    assert found[("emoe:prompt_tokens_total",)] == 30
    assert found[("emoe:generation_tokens_total",)] == 20
    assert found[("emoe:num_preemptions_total",)] == 1
    assert found[("emoe:expert_hits_total", "layer_group=early", "task=qa")] == 8
    assert found[("emoe:expert_misses_total", "layer_group=late", "task=code")] == 4
    assert found[("emoe:expert_loaded_bytes_total",)] == 2 << 20
    assert found[("emoe:expert_prefetch_wasted_bytes_total",)] == 512
    assert (found[("emoe:expert_resident_bytes",)], found[("emoe:expert_budget_bytes",)]) == (1000, 2000)
    assert (found[("emoe:predictor_calls_total",)], found[("emoe:predictor_hit_ratio",)]) == (3, 0.75)
    assert found[("emoe:rerouted_tokens_total", "task=qa")] == 2
    assert found[("emoe:rerouted_token_ratio",)] == 0.25
    info = next(name for name in found if name[0] == "emoe:info")
    assert {"lossy=false", "mode=exact", "expert_dtype=native", "scheduler=fifo"} < set(info) and found[info] == 1


def test_nothing_has_happened_yet() -> None:
    class New(ScriptedEngine):
        def stats(self) -> Any:
            return replace(STATS, kv_tokens=0, predictor_hit_rate=None, hits={}, misses={}, routed_tokens={})

    found = samples(Metrics("m", New()).text())
    assert math.isnan(found[("emoe:predictor_hit_ratio",)])
    assert found[("emoe:rerouted_token_ratio",)] == found[("emoe:kv_cache_usage_perc",)] == 0


def test_what_is_observed_as_requests_run() -> None:
    metrics = Metrics("m", Fixed())
    metrics.token(TokenEvent(1, 10.0), None)
    metrics.token(TokenEvent(1, 10.5), TokenEvent(1, 10.0))
    metrics.ended(REPORT, "stop")
    metrics.ended(replace(REPORT, ttft_s=None, ttft_met=False, slo_met=False), "error")
    metrics.ended(replace(REPORT, task=None), "cancelled")
    metrics.refused("queue_full")
    found = samples(metrics.text())
    assert found[("emoe:inter_token_latency_seconds_sum",)] == 0.5
    assert found[("emoe:inter_token_latency_seconds_count",)] == 1
    assert found[("emoe:time_to_first_token_seconds_count",)] == 2
    assert found[("emoe:e2e_request_latency_seconds_count",)] == 3
    assert found[("emoe:request_queue_time_seconds_sum",)] == pytest.approx(0.03)
    assert [found[("emoe:request_success_total", f"finished_reason={r}")] for r in ("stop", "error", "cancelled")] == [
        1,
        1,
        1,
    ]
    assert found[("emoe:slo_total", "met=true", "target=ttft", "task=qa")] == 1
    assert found[("emoe:slo_total", "met=false", "target=all", "task=qa")] == 1
    assert not any(name[0] == "emoe:slo_total" and "target=tpot" in name for name in found)
    assert (metrics.slo_met, metrics.slo_asked) == (1, 2)
    assert found[("emoe:requests_refused_total", "code=queue_full")] == 1


def test_every_refusal_is_counted_and_no_end(serve: Serve) -> None:
    """Whoever refuses: the routes, the schema, the middleware, the engine. Ends have a counter of their own."""
    server = serve(ScriptedEngine([finished("timeout")]), api_key="k", max_body_bytes=100)
    server.client.get("/v1/models")
    server.client.headers["Authorization"] = "Bearer k"
    server.client.get("/nowhere")
    server.client.get("/v1/completions")
    server.post("/v1/completions", {"prompt": "x", "temperature": 3})
    server.post("/v1/completions", {"prompt": "x" * 200})
    assert server.post("/v1/completions", {"prompt": "x"}).status_code == 504
    codes = ["invalid_api_key", "unknown_url", "method_not_allowed", "invalid_value", "body_too_large"]
    counted = re.findall(r'requests_refused_total{code="(\w+)".*} 1.0', server.client.get("/metrics").text)
    assert sorted(counted) == sorted(codes)


@pytest.mark.parametrize(
    ("layers", "groups"), [(6, "eemmll"), (1, "e"), (2, "em"), (7, "eeemmll"), (32, "e" * 11 + "m" * 11 + "l" * 10)]
)
def test_layer_groups(layers: int, groups: str) -> None:
    assert "".join(layer_group(layer, layers)[0] for layer in range(layers)) == groups


def test_the_live_counters_agree_with_the_reply(server: Running) -> None:
    def counted() -> dict[str, float]:
        text = server.client.get("/metrics").text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + (sample.value if "bucket" not in sample.name else 0)
        return found

    before = counted()
    reply = server.chat("Hello", max_tokens=4, ignore_eos=True, emoe={"slo_ttft_ms": 1e6}).json()
    after = counted()
    changes = {name: after[name] - before.get(name, 0) for name in after}
    assert changes["emoe:prompt_tokens_total"] == reply["usage"]["prompt_tokens"]
    assert changes["emoe:generation_tokens_total"] == 4
    assert changes["emoe:inter_token_latency_seconds_count"] == 3
    assert changes["emoe:expert_hits_total"] == reply["emoe"]["hits"]
    assert changes["emoe:expert_misses_total"] == reply["emoe"]["misses"]
    assert changes["emoe:slo_total"] == 2
    assert changes["emoe:request_success_total"] == 1


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_every_metric_of_the_dashboard_exists(serve: Serve) -> None:
    engine = Fixed()
    metrics = serve(engine).service.metrics
    metrics.ended(REPORT, "stop")
    metrics.refused("x")
    there: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    asked = dashboard_queries()
    assert len(asked) > 25
    for query in asked:
        found = re.findall(r"(emoe:\w+)\{([^}]*)\}", query)
        assert found and len(found) == query.count("emoe:")
        for name, selectors in found:
            assert name in there, f"{name} in {query}"
            assert set(re.findall(r"(\w+)=", selectors)) <= there[name]
            groups = re.findall(r"by \(([^)]*)\) \(rate\(" + re.escape(name), query)
            assert {label.strip() for group in groups for label in group.split(",")} <= there[name]


def test_the_dashboard_is_whole() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_status_line() -> None:
    before = Reading(0.0, STATS, 3, 5)
    later = replace(
        STATS,
        prompt_tokens=130,
        generation_tokens=70,
        hits={("qa", 0): 95},
        misses={("qa", 0): 10},
        bytes_loaded=5 << 20,
        preemptions=3,
    )
    line = status_line(before, Reading(10.0, later, 6, 9))
    assert line == (
        "1 running, 2 waiting; 10.0 tokens/s in, 5.0 out; KV 25%; experts 94.4% hits, 3.0 MiB loaded; "
        "targets met 3 of 4; 2 preempted"
    )


def test_no_status_line_when_nothing_happens() -> None:
    idle = replace(STATS, running=0, waiting=0)
    assert status_line(Reading(0.0, idle, 0, 0), Reading(10.0, idle, 0, 0)) is None
    assert status_line(Reading(0.0, idle, 0, 0), Reading(10.0, replace(idle, waiting=1), 0, 0)) is not None


def test_the_server_logs_it(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "emoe.server"):
        server.chat("Hello", max_tokens=4, ignore_eos=True)
        assert until(lambda: any("tokens/s in" in record.message for record in caplog.records))
