"""Loading ahead: lossless in `exact` whatever is predicted, every prefetch accounted for, plans as Equation 2 says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe
from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.model.bind import binding_of, label_task
from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.registry import PREDICTORS
from tests.families import FAMILIES, NOT_ASKED, make_checkpoint
from tests.model.test_exact import batch_of, logits_of


class Adversary:
    """Predicts at random, or what the last prompt did not use at all; checks what it is told."""

    name = "adversary"

    def __init__(self, shape: RoutingShape, worst: bool, seed: int) -> None:
        self.shape = shape
        self.worst = worst
        self.random = np.random.default_rng(seed)
        self.last = np.zeros((shape.layers, shape.experts))
        self.prompts: list[tuple[str | None, Array]] = []

    def begin_prompt(self, task: str | None) -> None:
        self.prompts.append((task, np.zeros((0, self.shape.layers, self.shape.top_k))))

    def observe(self, routes: Array) -> None:
        self.prompts[-1] = (self.prompts[-1][0], routes)
        self.last = self.shape.counts(routes)

    def predict(self, task: str | None) -> Array:
        if self.worst:
            return self.shape.normalised((self.last == 0).astype(np.float64))
        return self.random.random((self.shape.layers, self.shape.experts))


def told(model: Any) -> Adversary:
    answers: Any = binding_of(model).ahead._answers
    found: Adversary = answers._predictor
    return found


def sound(model: Any) -> dict[str, Any]:
    """Invariants 2 and 3; returns the stats."""
    stats = emoe.stats(model)
    table_of = {layer: pool.table for pool in binding_of(model).pools for layer in pool.table.experts}
    index = binding_of(model).index
    for layer, entry in stats["layers"].items():
        assert entry["bytes_read"] == entry["loads"] * index.stored_nbytes(layer, 0)
        c = table_of[layer].counters[layer]
        held = sum(s.prefetched for s in table_of[layer].slots if s.key is not None and s.key[0] == layer)
        assert c.prefetches_waiting == held
    assert stats["peak_resident_bytes"] <= stats["budget_bytes"]
    ahead = stats["prefetch"]
    assert ahead["issued"] == ahead["used"] + ahead["unused"] + ahead["cancelled"] + ahead["waiting"]
    return stats


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "jamba", "mixtral"])
def test_no_predictor_changes_a_logit_in_exact(name: str, tmp_path: Path) -> None:
    path = make_checkpoint(name, tmp_path, seed=3)
    whole, _ = emoe.load(path)
    floor, total = emoe.stats(whole)["floor_bytes"], emoe.stats(whole)["total_expert_bytes"]

    @settings(max_examples=7)
    @given(
        at=st.one_of(st.just(0.0), st.floats(0, 0.95)),
        seed=st.integers(0, 10**6),
        worst=st.booleans(),
        p=st.integers(1, 2),
        batches=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 9)), min_size=2, max_size=4),
        rule=st.sampled_from(["lru", "least-stale"]),
        slow=st.booleans(),
    )
    def check(at: float, seed: int, worst: bool, p: int, batches: list[tuple[int, int]], rule: str, slow: bool) -> None:
        with PREDICTORS.meanwhile({"adversary": lambda shape: Adversary(shape, worst, seed)}):
            model, _ = emoe.load(
                path,
                expert_memory=ExpertMemory("bytes", int(floor + at * (total - floor))),
                predictor="adversary",
                replan_prompts=p,
                eviction=rule,
                max_read_bytes_per_s=2e7 if slow else None,
            )
        for number, (batch, length) in enumerate(batches):
            inputs = batch_of(seed + number, batch, length)
            for ours, theirs in zip(logits_of(model, inputs, 3), logits_of(whole, inputs, 3), strict=True):
                assert torch.equal(ours, theirs)
        sound(model)
        emoe.close(model)

    check()
    emoe.close(whole)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - NOT_ASKED))
def test_the_next_gate_changes_no_logit_and_is_used(name: str, tmp_path: Path) -> None:
    path = make_checkpoint(name, tmp_path, seed=5)
    whole, _ = emoe.load(path)
    model, _ = emoe.load(path, expert_memory="60%", prefetch="next-gate")
    for seed in range(2):
        inputs = batch_of(seed, 1, 5)
        for ours, theirs in zip(logits_of(model, inputs, 12), logits_of(whole, inputs, 12), strict=True):
            assert torch.equal(ours, theirs)
    stats = sound(model)
    assert stats["prefetch"]["issued"] > 0 or stats["misses"] == 0
    emoe.close(model)
    assert sound(model)["prefetch"]["failed"] == 0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3"), seed=5, num_experts=16, num_experts_per_tok=3)


def prompt(seed: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def test_the_predictor_is_told_every_prompt_whole_and_with_its_task(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emoe.model import label_task
    from emoe.routing.trace import Trace

    monkeypatch.setitem(PREDICTORS, "adversary", lambda shape: Adversary(shape, True, 0))
    model, _ = emoe.load(path, expert_memory="50%", predictor="adversary", trace=tmp_path / "t.npz", task="a")
    inputs = batch_of(1, 2, 6)
    model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    label_task(model, "b")
    model.generate(prompt(3, 5), max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model(prompt(4, 5))
    found = told(model).prompts
    emoe.close(model)
    trace = Trace.read(tmp_path / "t.npz")
    assert [task for task, _ in found] == ["a", "a", "b"]
    for number, (_, routes) in enumerate(found):
        assert np.array_equal(routes, trace.experts[trace.offsets[number] : trace.offsets[number + 1]])


def test_a_plan_is_loaded_while_layers_run_and_replaces_what_was_resident(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode `resident`: after some passes exactly the planned experts are there, and nothing waited for them."""
    shares = np.zeros((3, 16))
    shares[:, 4:12] = np.arange(8, 0, -1) / 12

    class Fixed(Adversary):
        def predict(self, task: str | None) -> Array:
            return shares

    monkeypatch.setitem(PREDICTORS, "adversary", lambda shape: Fixed(shape, True, 0))
    model, _ = emoe.load(
        path, mode="resident", expert_memory="6/layer", predictor="adversary", replan_prompts=3, task="a"
    )
    quotas = [entry["slots"] for entry in emoe.stats(model)["layers"].values()]
    with torch.no_grad():
        model(prompt(0, 9))
        waited = emoe.stats(model)["load_wait_s"]
        model.generate(prompt(1, 9), max_new_tokens=24, min_new_tokens=24, do_sample=False)
        planned = {layer: entry["resident"] for layer, entry in emoe.stats(model)["layers"].items()}
        model(prompt(2, 9))
        assert planned == {layer: entry["resident"] for layer, entry in emoe.stats(model)["layers"].items()}
    stats = sound(model)
    assert stats["plans"] == 1 and stats["load_wait_s"] == waited
    for quota, entry in zip(quotas, stats["layers"].values(), strict=True):
        assert set(range(4, 4 + quota)) <= set(entry["resident"])
    assert stats["prefetch"]["cancelled"] == 0 and stats["prefetch"]["issued"] > 0
    emoe.close(model)


def test_a_prefetch_that_cannot_be_read_ends_no_request(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os
    import threading

    monkeypatch.setitem(PREDICTORS, "adversary", lambda shape: Adversary(shape, False, 0))
    model, _ = emoe.load(path, mode="resident", expert_memory="6/layer", predictor="adversary")
    with torch.no_grad():
        model(prompt(0, 9))
        main = threading.get_ident()

        def faulty(descriptor: int, buffers: Any, offset: int) -> int:
            if threading.get_ident() != main:
                raise OSError(errno.EIO, "Input/output error")
            return os.preadv(descriptor, buffers, offset)

        binding_of(model).reader._pread = faulty
        model.generate(prompt(1, 9), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    ahead = sound(model)["prefetch"]
    assert ahead["failed"] > 0 and ahead["failed"] <= ahead["cancelled"]
    assert "Input/output error" in ahead["last_error"]
    emoe.close(model)


def test_nothing_looks_ahead_when_everything_is_resident(path: Path) -> None:
    model, _ = emoe.load(path, predictor="static", eviction="lru")
    runtime = binding_of(model).runtime
    assert not runtime.observers and not runtime.at_pass_start and runtime.after_take is None
    ahead = emoe.stats(model)["prefetch"]
    assert (ahead["active"], ahead["reason"]) == (False, "every expert is resident")


def test_settings_that_contradict_each_other_are_refused(path: Path) -> None:
    for settings_, text in (
        ({"predictor": "oracle"}, "no predictor is called 'oracle': choose one of"),
        ({"prefetch": "plan"}, "name one with predictor="),
        ({"prefetch": "hope"}, "no prefetch is called 'hope'"),
        ({"prefetch": "next-gate", "predictor": "static"}, "choose one"),
        ({"prefetch": "next-gate", "mode": "resident"}, "works in mode 'exact'"),
        ({"layer_split": "fair"}, "no layer_split is called 'fair'"),
        ({"layer_split": "expected-misses"}, "needs a profile"),
        ({"mode": "balanced"}, "needs a profile"),
        ({"sensitivity_threshold": float("nan")}, "at least 0"),
    ):
        with pytest.raises(UsageError, match=text):
            emoe.load(path, expert_memory="50%", **settings_)


def test_an_adaptive_schedule_asks_when_the_routes_have_drifted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PREDICTORS, "adversary", lambda shape: Adversary(shape, True, 0))
    plans = {}
    for schedule in ("adaptive:1", "adaptive:0"):  # nothing drifts that far; everything drifts
        model, _ = emoe.load(path, expert_memory="50%", predictor="adversary", replan_prompts=schedule)
        with torch.no_grad():
            for seed in range(4):
                model(prompt(seed, 200))
        plans[schedule] = emoe.stats(model)["plans"]
        emoe.close(model)
    assert plans == {"adaptive:1": 1, "adaptive:0": 3}  # the first is always made
    with pytest.raises(UsageError, match="name a predictor"):
        emoe.load(path, expert_memory="50%", replan_prompts="adaptive")
    with pytest.raises(UsageError, match="no schedule is called 'often'"):
        emoe.load(path, expert_memory="50%", replan_prompts="often")


def test_a_plan_for_many_prompts_counts_those_that_ended_lately_and_those_unknown(path: Path) -> None:
    """With p = 4: the running prompt, up to three that ended, and prompts of no known task until there are three."""
    model, _ = emoe.load(path, mode="resident", expert_memory="6/layer", predictor="task-popularity", replan_prompts=4)
    planner = binding_of(model).ahead.planner
    assert planner is not None
    seen = []
    with torch.no_grad():
        for number, task in enumerate("abcde"):
            label_task(model, task)
            model(prompt(number, 5 + number))
            seen.append(planner._expected())
    emoe.close(model)
    assert seen[0] == [("a", 5), (None, 5), (None, 5), (None, 5)]
    assert seen[1] == [("b", 6), ("a", 5), (None, 5), (None, 5)]
    assert seen[4] == [("e", 9), ("b", 6), ("c", 7), ("d", 8)]
