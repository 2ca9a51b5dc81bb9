"""What each request, task and layer wanted and got, against a recount token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import emoe
from emoe.model.bind import binding_of
from emoe.model.passes import Pass
from tests.conftest import Checkpoints
from tests.engine.running import ENDLESS, SMALL, engine_of, prompt, send


@pytest.fixture(params=["exact", "resident", "all"])
def model(checkpoints: Checkpoints, request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    about: dict[str, Any] = {} if request.param == "all" else {"expert_memory": "5/layer", "mode": request.param}
    made, _ = emoe.load(checkpoints("qwen2_moe", torch.float32), dtype="float32", **about)
    yield made
    emoe.close(made)


class Recount:
    """Watches the passes that went well, slowly."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.binding = binding_of(model)
        self.runtime = self.binding.runtime
        self.of_request: dict[int, Counter[str]] = {}
        self.of_layer: Counter[tuple[str, str, int]] = Counter()
        self.runtime.observers.append(self.observe)

    def observe(self, now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        runtime = self.runtime.layers[layer]
        rank = sorted(self.runtime.layers).index(layer)
        resident = {e for e in range(runtime.experts) if runtime.pool.table.is_resident((layer, e))}
        few = self.runtime.answering_of(runtime, len(ids)) is not None  # the last layer, of a prompt
        filling = self.runtime.filling(runtime, ids) if few else frozenset()
        for segment in now.segments:
            chosen = {e for row in ids[segment.start : segment.stop].tolist() for e in row}
            rows = ids[segment.stop - 1 if few else segment.start : segment.stop].tolist()
            wanted = {e for row in rows for e in row} | (chosen & filling)
            found = self.of_request.setdefault(segment.sequence, Counter())
            found["hits"] += len(wanted & resident)
            found["misses"] += len(wanted - resident)
            task = segment.task or "other"
            self.of_layer["hits", task, rank] += len(wanted & resident)
            self.of_layer["misses", task, rank] += len(wanted - resident)
            self.of_layer["routed", task, rank] += len(rows)
            if self.runtime.mode == "exact" or runtime.keeps_route:
                found["loads"] += len(wanted - resident)
                found["bytes"] += sum(self.binding.index.stored_nbytes(layer, e) for e in wanted - resident)
            else:
                found["rerouted"] += sum(not set(row) <= resident for row in rows)


def test_against_a_recount(model: PreTrainedModel) -> None:
    recount = Recount(model)
    tasks = ["maths", "code", None, "maths", None]
    with engine_of(model) as engine:
        answers = [
            send(engine, prompt(n, 9 + 5 * n), 8, task=task, sampling=ENDLESS)[1] for n, task in enumerate(tasks)
        ]
        reports = [answer.end.report for answer in answers]
        stats = engine.stats()
    for number, report in enumerate(reports, start=1):
        found = recount.of_request[number]
        assert (report.hits, report.misses) == (found["hits"], found["misses"])
        assert (report.experts_loaded, report.bytes_loaded) == (found["loads"], found["bytes"])
        assert report.rerouted_tokens == found["rerouted"]
    assert {key: n for key, n in stats.hits.items() if n} == {
        (task, rank): n for (kind, task, rank), n in recount.of_layer.items() if kind == "hits" and n
    }
    assert {key: n for key, n in stats.misses.items() if n} == {
        (task, rank): n for (kind, task, rank), n in recount.of_layer.items() if kind == "misses" and n
    }
    assert sum(stats.rerouted_tokens.values()) == sum(report.rerouted_tokens for report in reports)
    for task, routed in stats.routed_tokens.items():
        assert routed == sum(n for (kind, of, _), n in recount.of_layer.items() if kind == "routed" and of == task)
    assert stats.prompt_tokens == sum(9 + 5 * n for n in range(5))
    assert stats.generation_tokens == 5 * 8
    mode = emoe.stats(model)["mode"]
    if mode == "exact":
        assert stats.loads <= sum(stats.misses.values())  # several requests of a step may want the same load
        assert not any(stats.rerouted_tokens.values())
    if mode == "resident":
        assert sum(stats.rerouted_tokens.values()) > 0
    assert stats.resident_bytes <= stats.budget_bytes


def test_loads_of_a_lone_request_are_its_own(checkpoints: Checkpoints) -> None:
    """Alone, what a request wanted and missed is what was loaded."""
    model, _ = emoe.load(checkpoints("mixtral", torch.float32), expert_memory="40%", dtype="float32")
    with engine_of(model, SMALL) as engine:
        report = send(engine, prompt(1, 20), 15, sampling=ENDLESS)[1].end.report
        stats = engine.stats()
    assert (report.experts_loaded, report.bytes_loaded) == (stats.loads, stats.bytes_loaded)
    assert report.experts_loaded > 0
    assert stats.load_wait_s > 0
    emoe.close(model)
