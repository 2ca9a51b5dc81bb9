"""The cost model finds what steps really take, whatever it was told at first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.prediction.protocol import RoutingShape
from emoe.scheduling.costs import FORGET, MOST_TASKS, Array, CostModel, Step
from tests.scheduling.situations import request

SHAPE = RoutingShape(2, 4, 1)
TRUE = {"step_s": 0.006, "token_s": 0.0012, "prefill_token_s": 0.0002, "expert_load_s": 0.004}


def model(resident: Array | None = None, shares: Array | None = None, **times: float) -> CostModel:
    given_times = {"token_s": 0.01, "prefill_token_s": 0.0004, "expert_load_s": 0.001} | times
    return CostModel(SHAPE, lambda task: shares, lambda: resident, **given_times)


def steps(count: int, *, noise: float = 0.0, outliers: float = 0.0, fixed_batch: bool = False) -> list[Step]:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        decode = 4 if fixed_batch else int(rng.integers(1, 16))
        prefill = 100 if fixed_batch else int(rng.integers(1, 400)) * int(rng.random() < 0.3)
        loads = 20 if fixed_batch else int(rng.integers(0, 40))
        computing = TRUE["step_s"] + decode * TRUE["token_s"] + prefill * TRUE["prefill_token_s"]
        waiting = loads * TRUE["expert_load_s"]
        computing *= float(rng.lognormal(0, noise))
        waiting *= float(rng.lognormal(0, noise))
        if rng.random() < outliers:
            computing *= 30
        found.append(Step(decode, prefill, 0, loads, computing + waiting, waiting))
    return found


@pytest.mark.parametrize(("noise", "outliers", "within"), [(0.0, 0.0, 0.02), (0.1, 0.0, 0.1), (0.1, 0.03, 0.15)])
def test_it_converges_to_what_steps_take(noise: float, outliers: float, within: float) -> None:
    costs = model()
    for step in steps(1200, noise=noise, outliers=outliers):
        costs.observe(step)
    found = costs.as_dict()
    for decode, prefill in ((1, 0), (4, 0), (15, 0), (8, 200)):
        true = TRUE["step_s"] + decode * TRUE["token_s"] + prefill * TRUE["prefill_token_s"]
        assert costs.compute_s(decode, prefill) == pytest.approx(true, rel=within)
    assert found["expert_load_s"] == pytest.approx(TRUE["expert_load_s"], rel=within)
    assert costs.steps == 1200


def test_where_data_tells_nothing_apart_the_sum_is_right_and_nothing_is_negative() -> None:
    costs = model()
    for step in steps(300, fixed_batch=True):
        costs.observe(step)
    true = TRUE["step_s"] + 4 * TRUE["token_s"] + 100 * TRUE["prefill_token_s"]
    assert costs.compute_s(4, 100) == pytest.approx(true, rel=0.02)
    assert min(costs.as_dict().values()) >= 0


def test_it_follows_a_store_that_slows_down() -> None:
    costs = model()
    for seconds in itertools.chain([0.001] * 300, [0.01] * 900):
        costs.observe(Step(1, 0, 0, 5, 0.01 + 5 * seconds, 5 * seconds))
    assert costs.expert_load_s == pytest.approx(0.01, rel=0.1)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 64),
            st.integers(0, 4096),
            st.integers(0, 10**6),
            st.integers(0, 500),
            st.floats(0, 1e4),
            st.floats(-1, 1e5),
        ),
        max_size=60,
    )
)
@settings(max_examples=100, deadline=None)
def test_no_series_of_steps_breaks_it(series: list[tuple[int, int, int, int, float, float]]) -> None:
    costs = model()
    for values in series:
        costs.observe(Step(*values))
        found = costs.as_dict()
        assert all(np.isfinite(value) and value >= 0 for value in found.values())
    assert np.isfinite(costs.step_s([request(1)]))


def test_expected_loads_are_those_of_independent_tokens() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(4), size=2)
    resident = np.array([[True, False, False, True], [False, False, True, False]])
    costs = model(resident, shares)
    drawn = np.stack(
        [[rng.choice(4, p=row, size=3) for row in shares] for _ in range(4000)]
    )  # [trials, layers, tokens]
    loads = [sum(len({e for e in trial[i] if not resident[i, e]}) for i in range(2)) for trial in drawn]
    assert costs.loads([("a", 2), (None, 1)]) == pytest.approx(np.mean(loads), rel=0.03)


def test_what_is_resident_or_used_anyway_costs_nothing() -> None:
    shares = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    there = np.zeros((2, 4), dtype=bool)
    costs = model(there, shares)
    one = request(1, task="a")
    assert costs.load_s(one, []) == pytest.approx(2 * costs.expert_load_s)
    assert costs.load_s(one, [request(2, task="a")]) == pytest.approx(0.0, abs=1e-9)
    there[0, 0] = True
    assert costs.load_s(one, []) == pytest.approx(costs.expert_load_s)
    assert model(None, shares).load_s(one, []) == 0.0


def test_a_step_of_nobody_takes_nothing_and_each_request_adds_to_it() -> None:
    costs = model(np.zeros((2, 4), dtype=bool))
    assert costs.step_s([]) == 0.0
    times = [costs.step_s([request(n) for n in range(count)]) for count in range(1, 9)]
    assert times == sorted(times)
    assert times[1] - times[0] > times[7] - times[6]  # the more run, the more of a newcomer's experts are there


def test_admissions_are_averaged() -> None:
    costs = model()
    for load_s in (1.0, 3.0) * 400:
        costs.observe_admission(load_s)
    assert costs.admission_load_s == pytest.approx(2.0, rel=0.05)
    none = model()
    none.observe_admission(-1.0)  # fewer loads than expected without it
    none.observe_admission(0.0)
    assert none.admission_load_s == 0.0
    first = model()
    first.observe_admission(2.0)  # beside a prior of 0 that counts as one value, a little faded
    assert first.admission_load_s == pytest.approx(2.0 / (1 + FORGET))


def test_without_a_shape_loads_are_expected_to_stay_what_they_were() -> None:
    costs = CostModel(None, lambda task: None, lambda: None, token_s=0.01, prefill_token_s=0.001, expert_load_s=0.1)
    for _ in range(500):
        costs.observe(Step(1, 0, 0, 7, 0.75, 0.7))
    assert costs.loads([]) == pytest.approx(7, rel=0.1)


def test_what_reading_kv_memory_takes_is_found_apart_from_tokens() -> None:
    costs = model()
    rng = np.random.default_rng(2)
    for _ in range(900):
        decode, kv = int(rng.integers(1, 9)), int(rng.integers(0, 20_000))
        costs.observe(Step(decode, 0, kv, 0, 0.006 + 0.0012 * decode + 2e-7 * kv))
    assert costs.as_dict()["kv_token_s"] == pytest.approx(2e-7, rel=0.05)
    assert costs.compute_s(2, 0, 10_000) - costs.compute_s(2) == pytest.approx(0.002, rel=0.05)
    long, short = request(1, tokens=9000, output_tokens=1000), request(2, tokens=1)
    assert costs.step_s([long]) - costs.step_s([short]) == pytest.approx(9999 * 2e-7, rel=0.05)


def test_a_tokens_share_of_a_step_is_that_of_the_usual_batch() -> None:
    costs = model(step_s=0.008)
    assert costs.token_s == pytest.approx(0.01 + 0.008)
    for _ in range(1500):
        costs.observe(Step(4, 0, 0, 0, 0.048))
    assert costs.as_dict()["mean_batch"] == pytest.approx(4, rel=0.01)
    for _ in range(9):
        costs.observe(Step(0, 64, 0, 0, 0.05))  # nobody decodes: that says nothing of the batch
    found = costs.as_dict()
    assert found["mean_batch"] == pytest.approx(4, rel=0.01)
    assert costs.token_s == pytest.approx(found["token_s"] + found["step_s"] / 4, rel=0.01)
    assert costs.token_s == pytest.approx(0.012, rel=0.05)


def test_input_tokens_cost_what_they_are_said_to() -> None:
    assert model().prefill_s(50) == pytest.approx(0.02)
    assert model().compute_s(0, 50) == pytest.approx(0.02)
    assert model().compute_s(0) == 0.0


@pytest.mark.parametrize("step", [Step(0, 0, 9, 3, 1.0), Step(1, 0, 0, 0, 0.0), Step(1, 0, 0, 0, float("nan"))])
def test_a_step_that_did_nothing_is_ignored(step: Step) -> None:
    costs = model()
    before = costs.as_dict()
    costs.observe(step)
    assert costs.as_dict() == before


def test_waiting_is_part_of_a_step_and_no_more() -> None:
    """Clocks that disagree about a step's end must not make computing negative or loads free."""
    inside, beyond, below = model(), model(), model()
    for _ in range(50):
        inside.observe(Step(1, 0, 0, 2, 0.1, 0.1))
        beyond.observe(Step(1, 0, 0, 2, 0.1, 7.0))
        below.observe(Step(1, 0, 0, 0, 0.1, -7.0))
    assert inside.as_dict() == beyond.as_dict()
    assert below.compute_s(1) == pytest.approx(0.1, rel=0.05)


def test_a_tasks_shares_are_asked_for_once_and_bounded_in_number() -> None:
    asked: list[str | None] = []

    def shares(task: str | None) -> Array | None:
        asked.append(task)
        return None

    costs = CostModel(SHAPE, shares, lambda: None, token_s=0.01, prefill_token_s=0.001, expert_load_s=0.1)
    for _ in range(2):
        costs.untouched([("a", 1), (None, 2)])
    assert asked == ["a", None]
    for number in range(MOST_TASKS):
        costs.untouched([(f"task {number}", 1)])
    costs.untouched([("a", 1)])
    assert asked.count("a") == 2  # labels are the clients' to choose: what is known of them was let go
    assert len(costs._untouched) <= MOST_TASKS


def test_tokens_leave_a_key_untouched_independently() -> None:
    costs = model(shares=np.array([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]))
    left = costs.untouched([("a", 3)])
    assert left[0].tolist() == pytest.approx([0.125, 0.125, 1, 1])
    assert left[1].tolist() == pytest.approx([0, 1, 1, 1])
    unknown = CostModel(None, lambda task: None, lambda: None, token_s=1, prefill_token_s=1, expert_load_s=1)
    with pytest.raises(ValueError, match="no expert keys"):
        unknown.untouched([])
