"""Rows: policies x capacities x splits, and traces routed at random."""

from __future__ import annotations

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.simulation.clock import Link
from emoe.simulation.generate import PROMPT_TOKENS, parse_random, random_trace
from emoe.simulation.runs import Task, halves, simulate, without

SHAPE = RoutingShape(3, 8, 2)
TRACE = random_trace(SHAPE, 2 * PROMPT_TOKENS + 50, seed=1)


def test_random_routes_are_even_distinct_and_seeded() -> None:
    assert TRACE.num_prompts == 3 and len(TRACE) == 450
    assert (TRACE.experts[:, :, 0] != TRACE.experts[:, :, 1]).all()
    counts = TRACE.counts().sum(axis=0)
    expected = 450 * 2 / 8
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert np.array_equal(TRACE.experts, random_trace(SHAPE, 450, seed=1).experts)
    assert not np.array_equal(TRACE.experts, random_trace(SHAPE, 450, seed=2).experts)
    assert parse_random("3x8x2:450") == (SHAPE, 450)
    for text in ("3x8x2", "3x8:450", "3x8x2:0", "axbxc:1", "3x8x2:4.5"):
        with pytest.raises(UsageError, match="LAYERSxEXPERTSxK:TOKENS"):
            parse_random(text)


def test_on_random_routes_every_rule_without_a_future_does_alike() -> None:
    rows = simulate([(TRACE, None)], Task(["lru", "lfu", "random"], [0.5]))
    rates = [row.hit_rate for row in rows]
    assert max(rates) - min(rates) < 0.04
    # Of 4 slots, those of the 2 experts just used are as likely to be used again as any: 4 of 8.
    assert rates[0] == pytest.approx(0.5, abs=0.03)


def test_rows_sum_over_splits_and_average_ratios() -> None:
    runs = [(TRACE.select([0, 1]), None), (TRACE.select([2]), None)]
    single = [simulate([run], Task(["lru"], [0.5])) for run in runs]
    [row] = simulate(runs, Task(["lru"], [0.5]))
    assert row.lookups == sum(each.lookups for [each] in single) == 450 * 6
    assert row.misses == sum(each.misses for [each] in single)
    assert row.ratios == [each.belady_ratio for [each] in single]
    assert row.belady_ratio == pytest.approx(sum(row.ratios) / 2)
    values = row.as_dict(1000)
    assert values["bytes_loaded"] == row.loads * 1000 and values["wasted_prefetch_bytes"] == 0
    assert row.as_dict(None)["bytes_loaded"] is None


def test_beladys_own_ratio_is_one_on_either_bank() -> None:
    rows = simulate([(TRACE.select([2]), None)], Task(["belady", "belady@pool", "lru@pool"], [0.5]))
    assert [row.belady_ratio for row in rows[:2]] == [1.0, 1.0]
    assert rows[1].loads <= rows[0].loads
    assert rows[2].belady_ratio == rows[2].loads / rows[1].loads


def test_a_replay_of_single_tokens_is_a_bank_for_each_layer() -> None:
    rows = simulate([(TRACE, None)], Task(["lru", "lru@engine"], [0.5, 1.0]))
    assert rows[0].misses == rows[2].misses and rows[0].lookups == rows[2].lookups
    assert (rows[2].belady_ratio, rows[2].slots) == (None, 4)
    assert (rows[3].misses, rows[3].loads) == (0, 3 * 8), "where all fits the engine loads all before it starts"


def test_times_come_with_a_link() -> None:
    task = Task(["lru"], [0.5], expert_bytes=1000, link=Link(1e6, 0.002))
    [row] = simulate([(TRACE, None)], task)
    values = row.as_dict(1000)
    assert values["token_mean_s"] == pytest.approx(3 * 0.002 + row.loads / 450 * 0.001)
    assert values["token_p50_s"] <= values["token_p95_s"]
    with pytest.raises(UsageError, match="give --expert-bytes"):
        simulate([(TRACE, None)], Task(["lru"], [0.5], link=Link(1e6)))


def test_halves_are_random_seeded_and_in_order() -> None:
    learned, scored = halves(11, 0)
    assert sorted(learned + scored) == list(range(11))
    assert (len(learned), len(scored)) == (5, 6)
    assert learned == sorted(learned) and scored == sorted(scored)
    assert halves(11, 0) == (learned, scored) != halves(11, 1)
    with pytest.raises(UsageError, match="cannot be split"):
        halves(1, 0)


def test_labels_and_ids_can_be_hidden() -> None:
    from tests.simulation.stand_ins import make_trace

    trace = make_trace(np.zeros((2, 1, 1), int), [1, 1], 2, tasks=[0, 1])
    hidden = without(trace, tasks=True, token_ids=True)
    assert (hidden.task_of(0), hidden.tasks, hidden.token_ids) == (None, (), None)
    assert without(trace).task_of(1) == "task 1"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(["fifo"], [0.5]), "no policy is called 'fifo'"),
        (Task([], [0.5]), "at least one policy"),
        (Task(["static@pool"], [0.5]), "leave @pool out"),
        (Task(["lru"], [1.5]), "at most 100 %"),
        (Task(["belady@engine"], [0.5]), "the engine evicts by lru"),
        (Task(["lru@engine"], [0.5], interleave=2), "replays every pass as"),
    ],
)
def test_what_cannot_be_meant_is_refused(task: Task, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        simulate([(TRACE, None)], task)


def test_a_history_must_be_of_the_same_model() -> None:
    with pytest.raises(UsageError, match="different models"):
        simulate([(TRACE, random_trace(RoutingShape(3, 9, 2), 10))], Task(["lru"], [0.5]))
