"""Algorithm 1 and Equation 3, against a literal and slow version."""

from __future__ import annotations

import math
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.scheduling.emoe import Emoe
from emoe.scheduling.protocol import Request, Situation
from tests.scheduling.situations import PlainCosts, request, situation


def expected_latency(i: Request, admitted: Request, running: list[Request], now: Situation) -> float:
    """Equation 3: t_i = dE + (W + n_i * G_i) * c + r_i."""
    later = sum(1 for other in running if other is not i and other.remaining_tokens > i.remaining_tokens)
    ran_s = 0.0 if i.admitted_s is None else now.now_s - i.admitted_s
    costs = now.costs
    return costs.admission_load_s + (admitted.input_tokens + later * i.remaining_tokens) * costs.token_s + ran_s


def algorithm_1(now: Situation) -> list[Request]:
    """As printed, line by line (with R for S)."""
    running = list(now.running)
    total = sum(each.input_tokens for each in running)
    admitted = []

    def due(each: Request) -> float:
        return each.deadline_s if each.deadline_s < math.inf else each.arrived_s + 60.0

    for candidate in sorted(now.waiting, key=due):
        if len(running) >= now.max_running:
            break
        with_it = [*running, candidate]
        if candidate.input_tokens + total < now.max_input_tokens and all(
            expected_latency(each, candidate, with_it, now) < each.slo_s for each in with_it
        ):
            admitted.append(candidate)
            running.append(candidate)
            total += candidate.input_tokens
    return admitted


quarters = st.integers(0, 400).map(
    lambda n: n / 4
)  # sums and products of quarters are exact: no rounding to argue about


@st.composite
def requests(draw: Any, number: int, running: bool) -> Request:
    arrived = draw(quarters)
    made = request(
        number,
        arrived,
        draw(st.integers(1, 60)),
        expected_tokens=float(draw(st.sampled_from([1, 2, 4, 20, 40]))),
        ttft_slo_s=draw(st.none() | st.integers(1, 2000).map(float)),
        tpot_slo_s=draw(st.none() | st.integers(1, 200).map(lambda n: n / 4)),
    )
    if running:
        made.admitted_s = arrived
        made.output_tokens = draw(st.integers(0, 45))
    return made


@st.composite
def situations(draw: Any) -> Situation:
    waiting = [draw(requests(n, False)) for n in range(draw(st.integers(0, 8)))]
    running = [draw(requests(100 + n, True)) for n in range(draw(st.integers(0, 6)))]
    waiting.sort(key=lambda each: each.arrived_s)
    return situation(
        waiting,
        running,
        max_running=draw(st.integers(1, 12)),
        max_input_tokens=draw(st.integers(1, 500)),
        costs=PlainCosts(draw(st.sampled_from([0.25, 0.5, 2.0])), draw(st.sampled_from([0.0, 1.0, 30.0]))),
    )


@given(situations())
@settings(max_examples=600, deadline=None)
def test_it_admits_what_the_printed_algorithm_admits(now: Situation) -> None:
    fast = Emoe().admit(now)
    assert [each.id for each in fast] == [each.id for each in algorithm_1(now)]


def test_it_agrees_where_a_token_more_or_less_decides() -> None:
    """Targets about as long as what Equation 3 expects, many requests of equal length: ties, and one admission that
    decides the next."""
    draw = random.Random(1)
    for _ in range(4000):

        def made(number: int, draw: random.Random = draw) -> Request:
            expected = float(draw.randint(1, 4))
            within = draw.randint(4, 40) + expected * draw.randint(0, 8) - 0.25 * (expected - 1)
            return request(
                number, 100.0, draw.randint(1, 9), expected_tokens=expected, ttft_slo_s=within, tpot_slo_s=0.25
            )

        waiting, running = ([made(n) for n in range(draw.randint(low, 5))] for low in (1, 0))
        for each in running:
            each.admitted_s, each.output_tokens = 100.0 - draw.randint(0, 3), draw.randint(0, 3)
        now = situation(waiting, running, max_running=9, costs=PlainCosts(1.0, float(draw.randint(0, 2))))
        assert Emoe().admit(now) == algorithm_1(now)


def test_situations_in_which_it_admits_some_and_leaves_others_are_common() -> None:
    mixed = 0

    @given(situations())
    @settings(max_examples=300, deadline=None, database=None)
    def count(now: Situation) -> None:
        nonlocal mixed
        mixed += 0 < len(Emoe().admit(now)) < len(now.waiting)

    count()
    assert mixed > 20


def test_equation_3_by_hand() -> None:
    # i has run 10 s of 40 and has 4 tokens to come; the candidate has 8, so it finishes later: n = 1.
    # t = 1 + (W + 1 * 4) * 0.25 + 10 < 40  <=>  W < 112
    running = request(1, 90.0, expected_tokens=4.0, ttft_slo_s=37.0, tpot_slo_s=1.0, admitted_s=90.0)
    assert running.slo_s == 40.0
    fits, too_long = request(2, tokens=111), request(3, tokens=112)
    assert Emoe().admit(situation([fits], [running])) == [fits]
    assert Emoe().admit(situation([too_long], [running])) == []


def test_one_that_has_run_beyond_its_target_blocks_all() -> None:
    late = request(1, 0.0, ttft_slo_s=1.0, tpot_slo_s=1.0, admitted_s=0.0)
    assert Emoe().admit(situation([request(2)], [late])) == []
