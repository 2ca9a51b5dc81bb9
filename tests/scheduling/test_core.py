"""What holds for every scheduler: limits, who goes first by right, and that nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.scheduling import core
from emoe.scheduling.affinity import OWED, OWED_EVERY
from emoe.scheduling.core import PATIENCE_S, admit, kv_need
from emoe.scheduling.protocol import Request, Scheduler, Situation
from emoe.scheduling.registry import SCHEDULERS, make_scheduler
from tests.scheduling.situations import request, situation

NAMES = sorted(SCHEDULERS)


@st.composite
def requests(draw: Any, number: int) -> Request:
    made = request(
        number,
        draw(st.floats(0, 100)),
        draw(st.integers(1, 100)),
        task=draw(st.sampled_from([None, "a", "b"])),
        priority=draw(st.sampled_from([-1, 0, 0, 0, 3])),
        ttft_slo_s=draw(st.none() | st.floats(0.1, 100)),
        tpot_slo_s=draw(st.none() | st.floats(0.01, 10)),
    )
    made.resumed = draw(st.sampled_from([False, False, False, True]))
    if made.resumed:
        made.output_tokens = draw(st.integers(1, 20))
    return made


@st.composite
def situations(draw: Any) -> Situation:
    waiting = [draw(requests(n)) for n in range(draw(st.integers(0, 10)))]
    waiting.sort(key=lambda each: (not each.resumed, each.arrived_s))
    running = [draw(requests(100 + n)) for n in range(draw(st.integers(0, 4)))]
    for each in running:
        each.resumed, each.admitted_s = False, each.arrived_s
    return situation(
        waiting,
        running,
        now_s=draw(st.sampled_from([100.0, 100.0, PATIENCE_S + 50])),
        max_running=draw(st.integers(1, 8)),
        max_input_tokens=draw(st.integers(1, 400)),
        free_kv_tokens=draw(st.integers(0, 600)),
    )


@pytest.mark.parametrize("name", NAMES)
@given(now=situations())
@settings(max_examples=300, deadline=None)
def test_no_limit_is_exceeded_and_rights_are_kept(name: str, now: Situation) -> None:
    taken = admit(make_scheduler(name), now)
    assert len({each.id for each in taken}) == len(taken)
    assert all(any(each is other for other in now.waiting) for each in taken)
    running = [*now.running, *taken]
    if taken:
        assert len(running) <= now.max_running
        assert sum(map(kv_need, taken)) <= now.free_kv_tokens
        assert len(running) == 1 or sum(each.input_tokens for each in running) <= now.max_input_tokens
    resumed = [each for each in now.waiting if each.resumed]
    assert [each for each in taken if each.resumed] == taken[: sum(each.resumed for each in taken)]
    if len(taken) > sum(each.resumed for each in taken):
        assert all(each in taken for each in resumed)
    fresh = [each.priority for each in taken if not each.resumed]
    assert fresh == sorted(fresh)
    first = resumed[0] if resumed else min(now.waiting, key=lambda each: each.priority, default=None)
    if not now.running and first is not None and kv_need(first) <= now.free_kv_tokens:
        assert taken


@pytest.mark.parametrize("name", NAMES)
def test_a_lower_priority_number_goes_first(name: str) -> None:
    waiting = [request(1, 0.0), request(2, 1.0, priority=-5), request(3, 2.0, priority=7)]
    assert admit(make_scheduler(name), situation(waiting, max_running=1)) == [waiting[1]]


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_keeps_lower_classes_waiting_for_the_higher(name: str) -> None:
    large, small = request(1, 0.0, 500, priority=0), request(2, 0.0, 5, priority=1)
    running = request(9, admitted_s=0.0)
    assert admit(make_scheduler(name), situation([large, small], [running], free_kv_tokens=100)) == []


@pytest.mark.parametrize("name", NAMES)
def test_who_was_preempted_goes_on_first_and_keeps_its_room(name: str) -> None:
    again = request(1, 50.0, 90, resumed=True, output_tokens=10)
    waiting = [again, request(2, 0.0, 5)]
    assert admit(make_scheduler(name), situation(waiting, max_running=1)) == [again]
    running = request(9, admitted_s=0.0)
    assert admit(make_scheduler(name), situation(waiting, [running], free_kv_tokens=100)) == []
    assert admit(make_scheduler(name), situation(waiting, [running], free_kv_tokens=101)) == [again]


@pytest.mark.parametrize("name", NAMES)
def test_who_has_waited_too_long_goes_first_and_keeps_its_room(name: str) -> None:
    now_s = PATIENCE_S + 50
    old, young = request(1, 50.0, 90), request(2, now_s - 1, 5, ttft_slo_s=1.5, tpot_slo_s=50.0)
    running = request(9, admitted_s=now_s)
    assert admit(make_scheduler(name), situation([old, young], [running], now_s=now_s, free_kv_tokens=90)) == []
    taken = admit(make_scheduler(name), situation([old, young], [running], now_s=now_s, free_kv_tokens=1000))
    assert taken[:1] == [old]


def test_those_who_have_not_waited_too_long_are_the_schedulers_to_choose() -> None:
    now_s = PATIENCE_S + 50
    old, young, last = request(1, 50.0), request(2, 51.0, ttft_slo_s=1e6), request(3, now_s, ttft_slo_s=1.0)
    waiting = [old, young, last]
    assert admit(make_scheduler("edf"), situation(waiting, now_s=now_s)) == [old, last, young]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_above_the_limit_runs_alone(name: str) -> None:
    large = request(1, tokens=500)
    assert admit(make_scheduler(name), situation([large], max_input_tokens=100)) == [large]
    assert admit(make_scheduler(name), situation([large], [request(2, admitted_s=0.0)], max_input_tokens=100)) == []


def serve_stream(name: str, victim: Request, stream: Any, turns: int, per_turn: int = 2) -> tuple[int, int] | None:
    """Admissions before the victim's, and the turn of it, in an endless stream; every turn one ends."""
    scheduler = make_scheduler(name)
    waiting, running = [victim], [request(10**6, 0.0, admitted_s=0.0, first_token_s=0.0, output_tokens=1)]
    admissions = 0
    for turn in range(turns):
        now_s = turn * 1.0
        waiting += [stream(turn * per_turn + n, now_s) for n in range(per_turn)]
        running = running[1:]
        for each in running:
            each.output_tokens += 1
        taken = admit(scheduler, situation(waiting, running, now_s=now_s, max_running=2))
        for each in taken:
            if each is victim:
                return admissions, turn
            each.admitted_s = each.first_token_s = now_s
            admissions += 1
        gone = {id(each) for each in taken}
        waiting = [each for each in waiting if id(each) not in gone]
        running += taken
    return None


def favourite(number: int, now_s: float) -> Request:
    """Short, urgent, and comes just in time to be preferred by any scheduler that looks at more than the arrival."""
    return request(
        number, now_s, 1, expected_tokens=1.0, ttft_slo_s=5.0 + random.Random(number).random(), tpot_slo_s=50.0
    )


@pytest.mark.parametrize("name", NAMES)
def test_nobody_starves_beside_an_endless_stream_of_favourites(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "PATIENCE_S", 300.0)  # the core's bound holds for all; an hour of turns takes a while
    victim = request(-1, 0.0, 60, expected_tokens=900.0, ttft_slo_s=0.01, tpot_slo_s=1e-6)
    assert serve_stream(name, victim, favourite, turns=310) is not None


def test_affinity_keeps_its_bound() -> None:
    victim = request(-1, 0.0, 60, expected_tokens=900.0, ttft_slo_s=2.0, tpot_slo_s=1e-6)
    found = serve_stream("affinity", victim, favourite, turns=300)
    assert found is not None
    admissions, turn = found
    owed_from = int(OWED * 2.0)
    assert turn >= 2  # it did step back
    assert turn <= owed_from + OWED_EVERY + 1  # a turn admits one or two
    assert admissions <= 2 * owed_from + OWED_EVERY


class Whims:
    """Chooses any of the waiting, or nobody, in any order; remembers what it was asked and what it said."""

    name = "whims"

    def __init__(self, random: random.Random) -> None:
        self.random = random
        self.asked: list[tuple[Situation, list[Request]]] = []

    def admit(self, now: Situation) -> list[Request]:
        chosen = self.random.sample(list(now.waiting), self.random.choice((0, 0, 1, len(now.waiting))))
        self.asked.append((now, chosen))
        return chosen


@given(now=situations(), seed=st.integers(0, 10**6), loose=st.booleans(), alone=st.booleans())
@settings(max_examples=120, deadline=None)
def test_a_scheduler_sees_what_it_may_choose_from_and_is_obeyed(
    now: Situation, seed: int, loose: bool, alone: bool
) -> None:
    whims = Whims(random.Random(seed))
    if loose:
        now = replace(now, max_running=20, max_input_tokens=10**6, free_kv_tokens=10**6)
    if alone:
        now = replace(now, running=[])
    taken = admit(whims, now)
    old = {each.id for each in now.waiting if now.now_s - each.arrived_s >= PATIENCE_S}
    chosen: list[Request] = []
    for asked, said in whims.asked:
        before = taken[: len(asked.running) - len(now.running)]
        assert list(asked.running) == [*now.running, *before]
        assert asked.free_kv_tokens == now.free_kv_tokens - sum(map(kv_need, before))
        assert len({each.priority for each in asked.waiting}) == 1
        mine = [each for each in now.waiting if each.priority == asked.waiting[0].priority and not each.resumed]
        assert list(asked.waiting) == [each for each in mine if each.id not in old]
        chosen += said
    at_will = [each for each in taken if not each.resumed and each.id not in old]
    if at_will != chosen[: len(at_will)]:  # else nobody would run: the first in line does
        line = sorted(now.waiting, key=lambda each: (not each.resumed, not each.resumed and each.priority))
        assert not now.running and taken == line[:1]
        assert not chosen or kv_need(chosen[0]) > now.free_kv_tokens


def test_where_a_scheduler_takes_nobody_the_first_in_line_runs_if_nobody_else_does() -> None:
    class Nobody:
        name = "nobody"

        def admit(self, now: Situation) -> list[Request]:
            return []

    waiting = [request(1, 0.0, priority=1), request(2, 1.0), request(3, 2.0)]
    assert admit(Nobody(), situation(waiting)) == [waiting[1]]
    assert admit(Nobody(), situation(waiting, [request(9, admitted_s=0.0)])) == []


def test_a_scheduler_that_names_strangers_is_a_defect() -> None:
    class Broken:
        name = "broken"

        def admit(self, now: Situation) -> list[Request]:
            return [request(77)]

    scheduler: Scheduler = Broken()
    with pytest.raises(RuntimeError, match="'broken'"):
        admit(scheduler, situation([request(1)]))


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"'lifo': choose one of fifo, edf, emoe, affinity"):
        make_scheduler("lifo")


def test_fifo_and_edf_order() -> None:
    waiting = [request(1, 0.0, ttft_slo_s=50.0), request(2, 1.0, ttft_slo_s=5.0), request(3, 2.0)]
    assert [each.id for each in admit(make_scheduler("fifo"), situation(waiting))] == ["1", "2", "3"]
    assert [each.id for each in admit(make_scheduler("edf"), situation(waiting))] == ["2", "1", "3"]


def test_affinity_forgets_who_is_gone() -> None:
    """Ids and labels come from outside: neither may pile up."""
    scheduler = make_scheduler("affinity")
    for turn in range(3000):
        one = request(turn, 100.0, task=f"task {turn}")
        assert admit(scheduler, situation([one])) == [one]
    line = scheduler._line  # type: ignore[attr-defined]
    assert len(line._rows) < 100 and len(line._tasks) < 100 and len(line._table) <= 128
