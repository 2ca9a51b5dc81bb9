"""What looks ahead, put in place by the settings: who is called when, and what is taken from a profile."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.model import foresight
from emoe.model.asking import AnswersHere, Spent
from emoe.model.foresight import Ahead
from emoe.model.passes import Pass
from emoe.policies.foresight import Foresight
from emoe.prediction.live import LiveScored
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import make_predictor, make_scorer
from emoe.residency.budget import LayerNeed
from emoe.residency.eviction import LRU
from emoe.tasks.sensitivity import Sensitivity
from tests.prediction.histories import random_routes, trace_of

SHAPE = RoutingShape(layers=2, experts=6, top_k=2)
NEEDS = [LayerNeed(7, 5, 1, 64), LayerNeed(3, 6, 2, 64)]
"""Not in order, and not equally wide."""

POPULAR = np.arange(12, dtype=float).reshape(2, 6)


class Known:
    """As much of a profile as is asked."""

    def __init__(self, **predictors: Any) -> None:
        self.predictors = {name.replace("_", "-"): state for name, state in predictors.items()}
        self.sensitivity = Sensitivity("agreement", {"agreement": {"a": np.array([1.0, 0.5])}}, 2, 0.8)

    def popularity_of(self, task: str | None) -> Any:
        assert task is None
        return POPULAR


class Gate:
    """In place of the next gate: it would ask real routers."""

    def __init__(self, *of: Any) -> None:
        self.handles = ["a hook"]

    def after_take(self, *of: Any) -> None: ...


def attached(
    settings: Foresight, profile: Known | None = None, fits: bool = False
) -> tuple[Ahead, Any, Any, list[Any]]:
    """What was made, the runtime and the pool that it is wired to, and what has to be removed."""
    runtime = SimpleNamespace(
        layers={3: SimpleNamespace(waits=None), 7: SimpleNamespace(waits=None)},
        mode=settings.mode,
        observers=[],
        at_pass_start=[],
        tasks_of="as before",
        after_take=None,
        reads_own_routes=None,
        prompts=0,
        tasks=("a",),
        observing=False,
        end_tokens=frozenset(),
        task="label",
    )
    pool = SimpleNamespace(table=SimpleNamespace(all_fit=fits), prefetches=SimpleNamespace(worth=None), load_wait_s=0.0)
    ahead = Ahead(settings, cast(Any, runtime), cast(Any, SimpleNamespace(layers=[])), NEEDS, profile)
    handles = ahead.attach(cast(Any, None), cast(Any, [pool]), None)
    return ahead, runtime, pool, handles


def called(runtime: Any) -> set[str]:
    """What is called at the start of a pass, by name."""
    return {f"{type(each.__self__).__name__}.{each.__name__}" for each in runtime.at_pass_start}


COLLECTS, PLANS, ENDS = "RouteCollector._start", "Planner.start_pass", "Ahead._end_pass"


def test_what_was_not_asked_for_is_not_there() -> None:
    ahead, runtime, pool, handles = attached(Foresight())
    assert not called(runtime) and not runtime.observers and not handles and ahead.idle == ""
    assert pool.prefetches.worth is ahead.worth and runtime.tasks_of == "as before"
    assert ahead.planner is None and ahead.gate is None and ahead.scores is None
    assert isinstance(attached(Foresight(eviction="lru"))[0].rule({3: 6}, {3: 2}), LRU)
    assert ahead.spent().calls == 0 and not ahead.lossy
    ahead.close()


def test_a_predictor_is_told_asked_and_obeyed() -> None:
    ahead, runtime, _, handles = attached(Foresight(predictor="static"))
    assert called(runtime) == {COLLECTS, PLANS, ENDS} and len(runtime.observers) == 1 and not handles
    assert ahead.planner is not None and runtime.reads_own_routes == ahead.planner.reads_own_routes
    collector = next(each.__self__ for each in runtime.at_pass_start if each.__name__ == "_start")
    assert collector.consumers == [ahead.planner.collect] and not collector._with_weights
    assert [each.__name__ for each in runtime.at_pass_start].index("_start") == 0, "routes come before the next pass"


def test_a_scorer_sees_every_pass_and_layer_and_rules() -> None:
    ahead, runtime, pool, _ = attached(Foresight(eviction="decayed"))
    assert called(runtime) == {COLLECTS, "Scores.start_pass"} and ahead.scores is not None
    assert ahead.scores.pools == [pool] and len(runtime.observers) == 2
    assert runtime.observers[-1] == ahead.scores.route and ahead.scores.live.active
    collector = runtime.at_pass_start[0].__self__
    assert collector.consumers == [ahead.scores.collect] and collector._with_weights
    rule = ahead.rule({7: 5, 3: 6}, {3: 2, 7: 1})
    assert isinstance(rule, LiveScored) and rule._ranks == [0, 1] and len(rule.values) == 11
    ahead, runtime, _, _ = attached(Foresight(eviction="decayed", mode="resident"))
    assert not called(runtime) and ahead.scores is not None and not ahead.scores.live.active
    assert "resident" in ahead.scores.idle and ahead.lossy


def test_where_every_expert_is_resident_only_tasks_are_read() -> None:
    settings = Foresight(predictor="static", eviction="decayed", profiled=True)
    ahead, runtime, pool, handles = attached(settings, Known(), fits=True)
    assert not called(runtime) and not runtime.observers and not handles and pool.prefetches.worth is None
    assert ahead.idle == "every expert is resident"
    assert runtime.tasks_of(Pass(batch=2)) == ["label", "label"]


def test_balanced_layers_wait_where_the_task_is_sensitive() -> None:
    settings = Foresight(mode="balanced", profiled=True)
    ahead, runtime, _, _ = attached(settings, Known())
    assert called(runtime) == {"Balance.start_pass"} and ahead.lossy
    for start in runtime.at_pass_start:
        start(Pass())
    assert [layer.waits for layer in runtime.layers.values()] == [False, True]


def test_the_next_gate_is_asked_after_every_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "NextGate", Gate)
    ahead, runtime, _, handles = attached(Foresight(prefetch="next-gate"))
    assert ahead.gate is not None and runtime.after_take == ahead.gate.after_take
    assert handles == ["a hook"] and called(runtime) == {ENDS}


def test_the_split_asks_for_popularity_only_where_it_uses_it() -> None:
    split = Foresight(layer_split="expected-misses", profiled=True)
    assert attached(split, Known())[0].popularity() == {3: [0, 1, 2, 3, 4, 5], 7: [6, 7, 8, 9, 10]}
    assert attached(Foresight(profiled=True), Known())[0].popularity() is None
    assert attached(split)[0].popularity() is None


def test_what_a_profile_learned_is_taken_up() -> None:
    rng = np.random.default_rng(1)
    history = trace_of(SHAPE, [random_routes(rng, SHAPE, 140) for _ in range(4)], ["a", "b"] * 2)
    taught: Any = make_predictor("task-popularity", SHAPE)
    taught.fit(history)
    scorer: Any = make_scorer("next-use", SHAPE)
    scorer.fit(history)
    profile = Known(task_popularity=taught.state(), next_use=scorer.state())
    settings = Foresight(predictor="task-popularity", eviction="next-use", profiled=True)
    ahead, *_ = attached(settings, profile)
    assert isinstance(ahead._answers, AnswersHere) and ahead.scores is not None
    ahead._answers.ask(["a"])
    answer = ahead._answers.poll()
    assert answer is not None and np.array_equal(answer["a"], taught.predict("a"))
    assert np.array_equal(ahead.scores.live.scorer.scores(), scorer.scores())
    plain, *_ = attached(settings, Known())
    assert plain.scores is not None and not np.array_equal(plain.scores.live.scorer.scores(), scorer.scores())


def test_a_network_needs_its_weights_and_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []
    closed: list[int] = []

    def start(*of: Any) -> Any:
        started.append(of)
        return of

    monkeypatch.setattr(foresight, "PredictorProcess", start)
    aside = SimpleNamespace(close=lambda: closed.append(1), spent=lambda: Spent(3, 0.5))
    monkeypatch.setattr(foresight, "AnswersAside", lambda process: aside)
    settings = Foresight(predictor="emoe-a", profiled=True)
    for profile in (None, Known(other=1)):
        with pytest.raises(UsageError, match=r"'emoe-a' is a network .*`emoe profile --predictors emoe-a`"):
            attached(settings, profile)
    ahead, runtime, _, _ = attached(settings, Known(emoe_a="weights"))
    assert started == [("emoe-a", SHAPE, "weights")] and PLANS in called(runtime)
    assert ahead.spent() == Spent(3, 0.5)
    ahead.close()
    assert closed == [1]


def test_a_pass_takes_from_its_start_to_the_next_unless_a_prompt_came_between(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, *_ = attached(Foresight(predictor="static"))
    told: list[float] = []
    monkeypatch.setattr(ahead.worth, "end_pass", told.append, raising=False)
    clock = iter([100.0, 103.0, 110.0, 112.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for new in (True, False, True, False):
        ahead._end_pass(Pass(new_prompt=new))
    assert told == [0.0, 3.0, 0.0, 2.0]
