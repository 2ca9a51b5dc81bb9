"""What loses is switched off, what wins stays on: on a virtual clock, with a link that carries one load at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest

from emoe.residency.budget import LayerNeed, PoolPlan, uniform_quotas
from emoe.residency.eviction import make_eviction
from emoe.residency.loader import Load
from emoe.residency.prefetches import Prefetches
from emoe.residency.table import Key, ResidencyTable
from emoe.residency.worth import FIRST_REST, LONGEST_REST, MARGIN, WINDOW_PASSES, Worth

LOAD_S = 0.01


@dataclass
class Link:
    """Carries one load at a time, in the order they were asked for; demand loads wait for what is under way."""

    now: float = 0.0
    free_at: float = 0.0
    under_way: list[tuple[float, Load]] = field(default_factory=list)

    def submit(self, key: Key, slot: int, priority: int) -> Load:
        load = Load(lambda: 1, str(key), claimed=True, nbytes=64, seconds=LOAD_S)
        self.free_at = max(self.free_at, self.now) + LOAD_S
        self.under_way.append((self.free_at, load))
        return load

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for at, load in self.under_way:
            if at <= self.now:
                load.done.set()
        self.under_way = [(at, load) for at, load in self.under_way if at > self.now]

    def wait(self, load: Load) -> float:
        """Seconds until the load is there."""
        at = next((at for at, other in self.under_way if other is load), self.now)
        waited = at - self.now
        self.advance(waited)
        return waited


def decode(
    guess: Callable[[int], list[Key]], passes: int, compute_s: float, wants: Callable[[int], list[Key]]
) -> tuple[ResidencyTable, Prefetches, float]:
    """One layer of 64 experts in 8 slots; each pass wants some keys, and `guess` is asked for before it computes."""
    needs = [LayerNeed(0, 64, 2, 64)]
    table = ResidencyTable(PoolPlan(0, 8, 64, uniform_quotas(8, needs)), {0: 64}, make_eviction("lru"))
    link = Link()
    prefetches = Prefetches(table, cast(Any, None), link.submit)
    for number in range(passes):
        table.begin_pass()
        table.visit(0)
        prefetches.worth.end_pass()
        prefetches.poll()
        for key in wants(number):
            slot = table.find(key)
            beside = prefetches.flying
            if slot is None:
                slot = table.reserve(key, protect=frozenset(wants(number)))
                assert slot is not None
                load = link.submit(key, slot, 0)
                waited = link.wait(load)
                table.commit(slot, 64)
                prefetches.demanded([key], waited, beside=beside, prefill=False)
            elif (flight := prefetches.claim(key)) is not None:
                waited = link.wait(flight.load)
                table.commit(slot, 64)
                prefetches.landed(flight, waited)
            elif table.slots[slot].prefetched:
                prefetches.used(key)
            table.use(key, keep=True)
        if prefetches.worth.active:
            prefetches.ask(guess(number), 2)
        link.advance(compute_s)
    return table, prefetches, link.now


def walk(number: int) -> list[Key]:
    """New experts at every pass: without prefetching, every one is waited for."""
    return [(0, (2 * number) % 64), (0, (2 * number + 1) % 64)]


def test_useful_prefetches_stay_on_and_hide_the_load_time() -> None:
    table, prefetches, seconds = decode(lambda n: walk(n + 1), 400, 3 * LOAD_S, walk)
    assert prefetches.worth.active and not prefetches.worth.reason
    _, _, without = decode(lambda n: [], 400, 3 * LOAD_S, walk)
    hidden = prefetches.worth.hidden_s
    assert seconds + hidden == pytest.approx(without, rel=0.02) and hidden > 0.9 * 800 * LOAD_S
    assert table.counters[0].prefetches_used == pytest.approx(798, abs=2)


def test_useless_prefetches_on_a_busy_link_are_switched_off() -> None:
    _, prefetches, seconds = decode(lambda n: [(0, 63), (0, (7 * n + 33) % 64)][n % 2 :], 2000, 0.0, walk_low)
    worth = prefetches.worth
    assert "switched off" in worth.reason
    assert worth.delayed_s > worth.hidden_s
    _, _, without = decode(lambda n: [], 2000, 0.0, walk_low)
    assert seconds < 1.15 * without  # most of the time it was off


def walk_low(number: int) -> list[Key]:
    """New experts at every pass, of the lower half only."""
    return [(0, (2 * number) % 32), (0, (2 * number + 1) % 32)]


def windows(worth: Worth, count: int, saved: float, lost: float) -> list[bool]:
    """Whether it is on after each window in which, while it is on, so much is saved and lost."""
    states = []
    for _ in range(count):
        for _ in range(WINDOW_PASSES):
            if worth.active:
                worth.hide(saved / WINDOW_PASSES)
                worth.delay(lost / WINDOW_PASSES)
            worth.end_pass()
        states.append(worth.active)
    return states


def test_it_rests_longer_after_every_trial_that_fails() -> None:
    worth = Worth()
    states = windows(worth, 1000, 0.1, 1.0)
    trials = [n for n, on in enumerate(states) if on]
    rests = [b - a for a, b in pairwise(trials)]
    assert states[0] is False and rests[0] == 2 * FIRST_REST + 1
    assert rests == sorted(rests) and rests[-1] == LONGEST_REST + 1
    assert sum(states) / len(states) < 0.02


def test_it_comes_back_when_it_pays_again_and_does_not_flap_at_break_even() -> None:
    worth = Worth()
    windows(worth, 1, 0.0, 1.0)
    assert not worth.active
    assert windows(worth, 3 * FIRST_REST, 1.0, 0.1)[-1] and "on again" in worth.reason
    assert all(windows(worth, 50, 1.0, MARGIN * 0.99))
    assert all(windows(Worth(), 50, 0.0, 0.0))


def test_a_trial_that_saves_nothing_goes_on() -> None:
    """Also where loads waited less than they do alone: nothing was loaded ahead, so there is nothing to say of it."""
    worth = Worth()
    windows(worth, 1, 0.0, 1.0)
    while not worth.active:
        windows(worth, 1, 0.0, 0.0)
    reason = worth.reason
    assert reason.startswith("on trial after it was switched off")
    assert windows(worth, 1, 0.0, -1.0) == [True] and worth.reason == reason
    assert windows(worth, 1, 9.0, 0.0) == [True] and worth.reason.startswith("on again")


def test_a_small_loss_is_noise() -> None:
    """Below a millisecond, or a hundredth of the window's time, it stays on, however much more is lost than saved."""
    assert windows(Worth(), 1, 0.9e-3, 1.8e-3) == [True]
    assert windows(Worth(), 1, 0.9e-3, 2.1e-3) == [False]
    for lost, on in ((0.009, True), (0.011, False)):
        worth = Worth()
        worth.delay(lost)
        for _ in range(WINDOW_PASSES):
            worth.end_pass(1.0 / WINDOW_PASSES)
        assert worth.active is on
    worth = Worth()
    for lost in (0.0, 0.0015):  # a window's time is its own, not that of the one before
        worth.delay(lost)
        for _ in range(WINDOW_PASSES):
            worth.end_pass(10.0 / WINDOW_PASSES if not lost else 0.01 / WINDOW_PASSES)
    assert not worth.active


def test_time_spent_predicting_counts_as_lost() -> None:
    worth = Worth()
    for _ in range(WINDOW_PASSES):
        worth.spend(0.01)
        worth.end_pass()
    assert not worth.active and worth.overhead_s == pytest.approx(0.32)


def test_without_a_baseline_it_pauses_for_one_window() -> None:
    needs = [LayerNeed(0, 4, 1, 64)]
    table = ResidencyTable(PoolPlan(0, 2, 64, uniform_quotas(2, needs)), {0: 4}, make_eviction("lru"))
    prefetches = Prefetches(table, cast(Any, None), Link().submit)
    worth = prefetches.worth
    prefetches.demanded([(0, 1)], LOAD_S, beside=True, prefill=False)
    assert worth.delayed_s == 0
    assert windows(worth, 4, 1.0, 0.0) == [False, True, True, True]
    assert not worth.reason
    prefetches.demanded([(0, 2)], LOAD_S, beside=False, prefill=False)
    prefetches.demanded([(0, 3)], 3 * LOAD_S, beside=True, prefill=False)
    assert worth.delayed_s == pytest.approx(2 * LOAD_S)


def test_measuring_alone_never_switches_off() -> None:
    worth = Worth()
    worth.judging = False
    assert all(windows(worth, 20, 0.0, 1.0)) and worth.delayed_s == pytest.approx(20)


def test_a_load_waited_for_twice_is_counted_once() -> None:
    """A claimed prefetch leaves the list of those under way, so it cannot be committed a second time."""
    needs = [LayerNeed(0, 4, 1, 64)]
    table = ResidencyTable(PoolPlan(0, 2, 64, uniform_quotas(2, needs)), {0: 4}, make_eviction("lru"))
    link = Link()
    prefetches = Prefetches(table, cast(Any, None), link.submit)
    prefetches.ask([(0, 1)], 2)
    flight = prefetches.claim((0, 1))
    assert flight is not None and not prefetches.flying and isinstance(flight.load.done, threading.Event)
    link.advance(1)
    prefetches.poll()
    table.commit(flight.slot, 64)
    prefetches.landed(flight, LOAD_S)
    assert prefetches.worth.hidden_s == 0 and table.counters[0].prefetches_used == 1
