"""The affinity scheduler against a literal and slow version of what its module's text says."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from emoe.scheduling.affinity import CROWD, HURRY, LATE, MARGIN, OWED, OWED_EVERY, STRETCH, TRIED, Affinity
from emoe.scheduling.core import kv_need
from emoe.scheduling.edf import UNHURRIED_S
from emoe.scheduling.protocol import Request, Situation
from tests.scheduling.situations import request, situation


@dataclass(frozen=True)
class TaskCosts:
    """A step loads what its tasks need, each once, and takes a little for each request."""

    task_s: float
    token_s: float
    input_s: float
    admission_load_s: float = 1.0

    def step_s(self, requests: Sequence[Request]) -> float:
        return len({each.task for each in requests}) * self.task_s + len(requests) * self.token_s

    def prefill_s(self, tokens: int) -> float:
        return tokens * self.input_s

    def load_s(self, request: Request, running: Sequence[Request]) -> float:
        return 0.0 if request.task in {each.task for each in running} else 3 * self.task_s


def target(each: Request) -> float:
    return UNHURRIED_S if each.ttft_slo_s is None else each.ttft_slo_s


def reading(each: Request, now: Situation) -> float:
    return now.costs.load_s(each, now.running) + each.input_tokens * now.costs.prefill_s(1)


def score(each: Request, now: Situation) -> float:
    """Arrival, aged by what it costs, and stepped back where its first token is late anyway."""
    step = now.costs.step_s(now.running)
    more = max(now.costs.step_s([*now.running, each]) - step, step / now.max_running)
    late = LATE * target(each) if now.now_s + reading(each, now) > each.deadline_s else 0.0
    return each.arrived_s + STRETCH * (reading(each, now) + each.remaining_tokens * more) + late


def can_still(each: Request, now: Situation) -> float | None:
    """What a running request has left for its pace, if it has one that it can still keep; seconds."""
    if each.tpot_slo_s is None or (now.now_s if each.first_token_s is None else each.first_token_s) > each.deadline_s:
        return None
    ran = 0.0 if each.first_token_s is None else now.now_s - each.first_token_s
    allowed = each.tpot_slo_s * (max(0, each.output_tokens - 1) + each.remaining_tokens) - ran
    return allowed if allowed >= each.remaining_tokens * now.costs.step_s(now.running) else None


def fits(each: Request, there: Sequence[Request], now: Situation) -> bool:
    kv = sum(kv_need(other) for other in there[len(now.running) :])
    inputs = sum(other.input_tokens for other in [*there, each])
    return kv + kv_need(each) <= now.free_kv_tokens and (not there or inputs <= now.max_input_tokens)


def literal(now: Situation) -> list[Request]:
    """What a scheduler that has decided nothing yet admits of `waiting`."""
    costs, eldest = now.costs, now.waiting[0]
    if len(now.running) >= now.max_running:
        return []
    owed = now.now_s - eldest.arrived_s >= OWED * target(eldest)
    most = OWED_EVERY - 1 if owed else now.max_running
    line = sorted(now.waiting, key=lambda each: score(each, now))[:TRIED]
    together = line[: now.max_running - len(now.running)]
    rate = len(now.running) / costs.step_s(now.running) if now.running else 1 / costs.step_s(line[:1])
    full = [*now.running, *together]
    crowded = len(together) > 1 and len(full) / costs.step_s(full) >= CROWD * rate
    paced = [(each, left) for each in now.running if (left := can_still(each, now)) is not None]
    pace = min((each.tpot_slo_s or math.inf for each, _ in paced), default=math.inf)
    there = list(now.running)
    dear: set[str | None] = set()
    stuck: list[Request] = []
    for each in line:
        if len(there) >= now.max_running:
            break
        if not fits(each, there, now):
            stuck = [each]  # the core keeps the rest waiting for it
            break
        inputs = sum(other.input_tokens for other in [*there[len(now.running) :], each])
        stall = costs.load_s(each, now.running) + costs.prefill_s(inputs)
        hurried = 0 <= each.deadline_s - now.now_s - stall < HURRY * stall
        if each.task in dear and not hurried:
            continue
        before, after = costs.step_s(there), costs.step_s([*there, each])
        if there:
            cheap = crowded or (after - before) * len(there) <= MARGIN * before
            dear |= set() if cheap else {each.task}
            keeps_pace = after <= min(pace, math.inf if each.tpot_slo_s is None else each.tpot_slo_s)
            broken = sum(left < other.remaining_tokens * after + stall for other, left in paced)
            if not (cheap or (hurried and keeps_pace)) or broken > (1 if hurried else 0):
                continue
        there.append(each)
    group = there[len(now.running) :][:most]
    return group if len(group) >= most else [*group, *stuck]


def drawn(draw: random.Random) -> Situation:
    """Targets about as long as what requests take, tasks that share a step or do not."""
    costs = TaskCosts(draw.choice([0.25, 1.0]), draw.choice([0.03125, 0.25]), draw.choice([0.0078125, 0.0625]))

    def made(number: int) -> Request:
        return request(
            number,
            100.0 - draw.choice([0, 1, 2, 4, 8, 16, 200]) - number / 64,
            draw.randint(1, 40),
            task=draw.choice("abc"),
            expected_tokens=float(draw.randint(1, 12)),
            ttft_slo_s=draw.choice([None, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]),
            tpot_slo_s=draw.choice([None, 0.25, 0.5, 1.0, 2.0, 4.0]),
        )

    running = [made(100 + n) for n in range(draw.choice([0, 1, 1, 2, 3]))]
    for each in running:
        each.admitted_s = each.arrived_s
        each.first_token_s = draw.choice([None, 99.0, 98.0, 99.5])
        each.output_tokens = 0 if each.first_token_s is None else draw.randint(1, 14)
    waiting = sorted((made(n) for n in range(draw.choice([1, 2, 3, 5, 16]))), key=lambda each: each.arrived_s)
    limits = {"max_running": draw.randint(1, 6), "max_input_tokens": draw.choice([60, 10**6])}
    return situation(waiting, running, costs=costs, free_kv_tokens=draw.choice([70, 10**6]), **limits)


def test_it_admits_what_its_text_says() -> None:
    draw = random.Random(2)
    some = 0
    for _ in range(3000):
        now = drawn(draw)
        expected = literal(now)
        assert Affinity().admit(now) == expected
        some += 0 < len(expected) < len(now.waiting)
    assert some > 500


def test_the_longest_waiting_has_its_turn_after_so_many_others() -> None:
    scheduler = Affinity()
    costs = TaskCosts(1.0, 0.25, 0.0625)
    dear = request(1, 100.0 - OWED * 2.0, 40, task="z", ttft_slo_s=2.0, tpot_slo_s=0.25)
    running = [request(9, 99.0, task="a", admitted_s=99.0, first_token_s=99.5, output_tokens=1)]
    turns = []
    for number in range(10, 18):
        cheap = request(number, 100.0, 1, task="a")
        turns += [each.id for each in scheduler.admit(situation([dear, cheap], running, costs=costs, max_running=2))]
        if turns[-1] == "1":  # it goes and comes back: counting begins anew
            assert len(turns) % OWED_EVERY == 0
    assert turns == ["10", "11", "12", "1", "14", "15", "16", "1"]
    dear.arrived_s += 0.5  # not yet so long
    for number in range(20, 30):
        cheap = request(number, 100.0, 1, task="a")
        taken = scheduler.admit(situation([dear, cheap], running, costs=costs, max_running=2))
        assert taken == [cheap]
