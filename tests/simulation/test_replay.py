"""Invariant 4: the engine's own trace, replayed, gives the engine's hits, misses and loads, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emoe
from emoe import nano
from emoe.errors import UsageError
from emoe.model.bind import binding_of
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import SCORERS
from emoe.residency.budget import SlotPlan
from emoe.residency.eviction import make_eviction
from emoe.routing.trace import DECODE, PREFILL, Trace
from emoe.simulation.clock import Link
from emoe.simulation.generate import random_trace
from emoe.simulation.replay import Replay, passes, plan_of, replay
from emoe.tasks.profile import Profile
from tests.simulation.stand_ins import RecentScorer, make_trace

PROMPTS = ["Question: what is 3 + 4?\nAnswer:", "Summarise: the cat sat on the mat.", "A"]


def run_engine(path: Path, memory: str, eviction: str) -> tuple[dict[str, Any], SlotPlan]:
    """emoe.stats and the slots of a few prompts, one of them a batch, recorded to `path`."""
    model, tokenizer = emoe.load(expert_memory=memory, eviction=eviction, trace=path)
    assert tokenizer is not None
    with torch.no_grad():
        for prompt in PROMPTS:
            model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
        # Two sequences of one length, so that no padding is routed, and that end together.
        ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(1))
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
    stats, plan = emoe.stats(model), binding_of(model).plan
    emoe.close(model)
    return stats, plan


def check(stats: dict[str, Any], again: Replay) -> None:
    assert stats["loads"] > 0
    for layer, counted in stats["layers"].items():
        found = again.layers[layer]
        assert (found.hits, found.misses, found.loads) == (counted["hits"], counted["misses"], counted["loads"])
        assert found.tokens == counted["routed_tokens"]


@pytest.mark.parametrize(
    ("eviction", "memory", "shared"),
    [
        ("lru", "40%", False),
        ("lfu", "40%", False),
        ("least-stale", "40%", True),
        ("lru", "15%", False),
        ("least-stale", "4%", True),
        ("lru", "100%", False),
    ],
)
def test_a_replayed_run_counts_what_the_engine_counted(
    eviction: str, memory: str, shared: bool, tmp_path: Path
) -> None:
    stats, plan = run_engine(tmp_path / "run.npz", memory, eviction)
    assert (not any(plan.pools[0].quotas.values())) == shared
    trace = Trace.read(tmp_path / "run.npz")
    check(stats, replay(trace, plan, lambda: make_eviction(eviction)))
    assert trace.source["expert_bytes"] * stats["loads"] == stats["bytes_read"]
    if memory == "40%":
        same = plan_of(trace, 0.4, make_eviction(eviction))
        assert [(pool.slots, pool.quotas) for pool in same.pools] == [(pool.slots, pool.quotas) for pool in plan.pools]


@pytest.mark.parametrize(("name", "memory"), [("recent", "40%"), ("next-use", "40%"), ("next-use", "15%")])
def test_a_scorer_sees_in_a_replay_what_it_saw_in_the_engine(
    name: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORERS, "recent", RecentScorer)
    stats, plan = run_engine(tmp_path / "run.npz", memory, name)
    trace = Trace.read(tmp_path / "run.npz")
    scorer: Any = SCORERS[name](RoutingShape.of(trace))
    learned = Profile.read(nano.profile_path()).predictors
    if name in learned:  # emoe-nano is loaded with the profile it ships with
        scorer.restore(learned[name])
    check(stats, replay(trace, plan, scorer=scorer))
    with pytest.raises(UsageError, match="a rule or by a scorer"):
        replay(trace, plan)


def test_passes_are_steps_in_time() -> None:
    trace = make_trace(np.zeros((6, 1, 1), int), [3, 3], 2, phase=[PREFILL, PREFILL, DECODE] * 2)
    trace.step[:] = [4, 4, 7, 2, 4, 5]
    assert [rows.tolist() for rows in passes(trace)] == [[3], [0, 1, 4], [5], [2]]


def test_the_clock_adds_loads_and_layers() -> None:
    trace = random_trace(RoutingShape(2, 6, 2), 50)
    plan = plan_of(trace, 0.5, make_eviction("lru"), expert_bytes=10)
    found = replay(trace, plan, lambda: make_eviction("lru"), link=Link(100.0, 0.5))
    assert found.total("hits") + found.total("misses") == 50 * 4
    assert found.seconds == pytest.approx(found.total("loads") * 0.1 + 50 * 2 * 0.5)
    assert found.total("bytes_read") == found.total("loads") * 10
