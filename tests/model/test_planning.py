"""The planner alone, with a runtime and pools that only pretend: whom it asks for, what it plans, what it is told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.model.asking import Spent, Task
from emoe.model.collecting import PassRoutes
from emoe.model.passes import Pass, Segment
from emoe.model.planning import Planner
from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.schedule import Adaptive, Every, Schedule
from emoe.prediction.worker import PredictorDiedError
from emoe.residency.worth import Worth

SHAPE = RoutingShape(layers=2, experts=6, top_k=2)
EXPERTS = {3: 6, 7: 5}
"""By layer; the second has one less than the model's widest."""

TASKS: tuple[Task, ...] = (None, "a", "b")
SHARES = {task: SHAPE.normalised(np.random.default_rng(n).random((2, 6)) ** 3) for n, task in enumerate(TASKS)}


class Answering:
    """A predictor that answers at once, or when it is let."""

    def __init__(self) -> None:
        self.told: list[tuple[Task, int]] = []
        self.asked: list[list[Task]] = []
        self.answer: dict[Task, Array] | None = None
        self.dies = self.slow = False

    def tell(self, task: Task, routes: Array) -> None:
        if self.dies:
            raise PredictorDiedError("it died")
        self.told.append((task, len(routes)))

    def ask(self, tasks: Sequence[Task]) -> None:
        self.asked.append(list(tasks))
        self.answer = {task: SHARES[task] for task in tasks}

    def poll(self) -> dict[Task, Array] | None:
        if self.slow:
            return None
        answer, self.answer = self.answer, None
        return answer

    def spent(self) -> Spent:
        return Spent()

    def close(self) -> None: ...


class Drive:
    """Feeds a planner prompts, one after another or packed, as a runtime does."""

    def __init__(
        self,
        schedule: Schedule,
        *,
        mode: str = "exact",
        quotas: Sequence[int] = (2, 3),
        outputs: float | None = None,
        sensitive: Any = None,
        popular: bool = False,
    ) -> None:
        self.plans: list[list[tuple[int, int]]] = []
        self.stops = 0
        table = SimpleNamespace(
            experts=EXPERTS, plan=SimpleNamespace(quotas=dict(zip(EXPERTS, quotas, strict=True)), slots=5)
        )
        prefetches = SimpleNamespace(plan=self.plans.append, stop=self._stop)
        self.pool = SimpleNamespace(table=table, prefetches=prefetches, load_wait_s=0.0)
        self.runtime = SimpleNamespace(layers=dict.fromkeys(EXPERTS), mode=mode, observing=False, prompts=0, tasks=())
        self.answers = Answering()
        self.worth = Worth()
        habits = SimpleNamespace(
            output_tokens=lambda task: outputs,
            sensitive=lambda task: sensitive,
            shares=lambda task: SHARES[task] if popular and task == "a" else None,
        )
        self.planner = Planner(
            cast(Any, self.runtime),
            cast(Any, [self.pool]),
            self.answers,
            schedule,
            SHAPE,
            cast(Any, habits),
            self.worth,
        )

    def _stop(self) -> None:
        self.stops += 1

    def start(self, now: Pass, tasks: Sequence[Task]) -> None:
        self.runtime.prompts += sum(part.new for part in now.segments) if now.announced else int(now.new_prompt)
        self.runtime.tasks = tuple(tasks)
        self.planner.start_pass(now)
        rows = np.concatenate([np.full(part.tokens, row) for row, part in enumerate(now.segments)])
        routes = np.stack([np.stack([[n % 6, (n + 1) % 6], [n % 5, (n + 2) % 5]]) for n in range(len(rows))])
        self.planner.collect(PassRoutes(now, rows, routes.astype(np.uint8), None, None))

    def prompt(self, task: Task, inputs: int, outputs: int = 0) -> None:
        """One prompt that is read and answered with so many tokens more."""
        self.start(Pass("prefill", 1, inputs, True), [task])
        for _ in range(outputs):
            self.start(Pass("decode", 1, 1, False), [task])


def best(demands: dict[Task, tuple[list[int], float]], sensitive: Any, quotas: Sequence[int]) -> list[tuple[int, int]]:
    """Equation 2 by hand, and the most expected of each layer (all quotas 0: of five slots that they share)."""
    found: dict[tuple[int, int], float] = {}
    for rank, (layer, experts) in enumerate(EXPERTS.items()):
        for expert in range(experts):
            if sensitive is None or sensitive[rank]:
                tokens = {task: sum(inputs) + len(inputs) * output for task, (inputs, output) in demands.items()}
                found[layer, expert] = sum(tokens[task] * SHARES[task][rank, expert] for task in demands)
    ranked = [key for key in sorted(found, key=lambda key: (-found[key], key)) if found[key] > 0]
    if not any(quotas):
        return sorted(ranked[:5], key=lambda key: (key[0], ranked.index(key)))
    return [
        key
        for layer, quota in zip(EXPERTS, quotas, strict=True)
        for key in [key for key in ranked if key[0] == layer][:quota]
    ]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    every=st.integers(1, 4),
    outputs=st.sampled_from([None, 7.0]),
    sensitive=st.sampled_from([None, np.array([True, False]), np.array([False, True])]),
    quotas=st.sampled_from([(2, 3), (0, 0)]),
)
def test_a_plan_is_for_the_prompt_that_begins_and_for_those_expected_until_the_next(
    seed: int, every: int, outputs: float | None, sensitive: Any, quotas: tuple[int, int]
) -> None:
    draw = random.Random(seed)
    drive = Drive(Every(every), outputs=outputs, sensitive=sensitive, quotas=quotas)
    ended: list[tuple[Task, int, int]] = []
    for number in range(9):
        task, inputs, answered = draw.choice(TASKS), draw.randint(1, 9), draw.randint(0, 4)
        asked, plans = len(drive.answers.asked), len(drive.plans)
        drive.prompt(task, inputs, answered)
        due = number == 1 or (number > 1 and number % every == 0)
        assert len(drive.answers.asked) == asked + due and len(drive.plans) == plans + due == drive.planner.plans
        if due:
            lately = ended[-(every - 1) :] if every > 1 else []
            known = [(task, inputs), *[(name, tokens) for name, tokens, _ in lately]]
            mean = sum(tokens for _, tokens in known) // len(known)
            expected = known + [(None, mean)] * (every - 1 - len(lately))
            names = list(dict.fromkeys(name for name, _ in expected))
            assert drive.answers.asked[-1] == names
            usual = sum(tokens for _, _, tokens in ended) / len(ended)
            of = {
                name: ([tokens for each, tokens in expected if each == name], usual if outputs is None else outputs)
                for name in names
            }
            wanted = best(of, sensitive, quotas)
            assert drive.plans[-1] == wanted
            assert drive.planner.planned is not None
            ranks = {layer: rank for rank, layer in enumerate(EXPERTS)}
            marked = {(int(rank), int(expert)) for rank, expert in np.argwhere(drive.planner.planned)}
            assert marked == {(ranks[layer], expert) for layer, expert in wanted}
        ended.append((task, inputs, answered))
    assert drive.answers.told == [(task, inputs + answered) for task, inputs, answered in ended[:-1]]


def packed(*parts: tuple[int, int, bool, Task, int, int], ended: Sequence[int] = ()) -> Pass:
    """An announced pass of (sequence, tokens, new, task, position, prompt tokens)."""
    segments, start = [], 0
    for sequence, tokens, new, task, position, whole in parts:
        segments.append(Segment(sequence, start, start + tokens, "prefill", new, task, position, whole))
        start += tokens
    return Pass("prefill", 1, start, any(p.new for p in segments), segments=tuple(segments), announced=True,
                ended=frozenset(ended))  # fmt: skip


def test_where_requests_are_announced_every_new_one_gets_a_plan_for_those_that_run() -> None:
    drive = Drive(Every(3), outputs=2.0, popular=True)

    def run(now: Pass) -> None:
        drive.start(now, [part.task for part in now.segments])

    run(packed((1, 4, True, "b", 0, 9)))
    assert drive.answers.asked == [] and drive.plans == [], "nothing is known of b, and nothing was read before"
    run(packed((1, 5, False, "b", 4, 9), (2, 3, True, "a", 0, 3)))
    assert drive.answers.asked == [["b", "a"]]
    first = best({"b": ([9], 2.0), "a": ([3], 2.0)}, None, (2, 3))
    assert drive.plans == [first], "with what its whole prompt has, however it is cut"
    run(packed((1, 1, False, "b", 9, 9), (2, 1, False, "a", 3, 3)))
    assert len(drive.plans) == 1
    # Number 2 of three: not asked for, and planned by the last answer.
    run(packed((2, 1, False, "a", 4, 3), (3, 6, True, "a", 0, 6), ended=[1]))
    assert drive.answers.told == [("b", 10)] and len(drive.answers.asked) == 1
    assert drive.plans[1:] == [best({"a": ([3, 6], 2.0)}, None, (2, 3))]
    # 3 was preempted, and is read again: its tokens count once.
    run(packed((3, 7, False, "a", 0, 6)))
    run(packed((2, 1, False, "a", 5, 3), ended=[3]))
    assert drive.answers.told[-1] == ("a", 7)


def test_before_the_first_answer_popularity_counts() -> None:
    drive = Drive(Every(3), outputs=2.0, popular=True)
    drive.answers.slow = True
    drive.start(packed((1, 4, True, "a", 0, 4)), ["a"])
    drive.start(packed((1, 1, False, "a", 4, 4), (2, 5, True, "b", 0, 5)), ["a", "b"])
    assert len(drive.answers.asked) == 1, "it is asked, and has not answered"
    assert drive.plans == [best({"a": ([4], 2.0)}, None, (2, 3))]
    drive.answers.slow = False
    drive.start(packed((1, 1, False, "a", 5, 4), (2, 1, False, "b", 5, 5)), ["a", "b"])
    assert drive.plans[1:] == [best({"a": ([4], 2.0), "b": ([5], 2.0)}, None, (2, 3))]


def test_an_answer_is_taken_whenever_it_comes_and_padding_counts_for_nothing() -> None:
    drive = Drive(Every(2), outputs=0.0)
    drive.prompt("a", 4)
    drive.answers.slow = True
    mask = torch.tensor([False, False, True, True, True])
    drive.start(Pass("prefill", 1, 5, True, mask=mask), ["b"])
    drive.start(Pass("decode", 1, 1, False), ["b"])
    assert drive.answers.asked == [["b", "a"]] and drive.plans == []
    drive.answers.slow = False
    drive.start(Pass("decode", 1, 1, False), ["b"])
    drive.start(Pass("decode", 1, 1, False), ["b"])
    assert drive.plans == [best({"b": ([3], 0.0), "a": ([4], 0.0)}, None, (2, 3))]


def test_what_is_not_worth_it_is_stopped_and_prompts_are_read_as_without_it() -> None:
    drive = Drive(Every(2), mode="resident")
    reads = drive.planner.reads_own_routes
    assert reads(0) and not reads(1) and not reads(2)
    drive.prompt("a", 4)
    drive.worth.active = False
    assert reads(1)
    drive.prompt("a", 4)
    assert not reads(3) and reads(4)
    assert drive.answers.asked == [] and drive.stops == 1 and drive.answers.told == [("a", 4)]
    drive.worth.active = True
    drive.prompt("a", 4)
    assert len(drive.answers.asked) == 1 and drive.stops == 1
    drive.answers.dies = True
    drive.prompt("a", 4)
    assert not drive.worth.usable and drive.worth.reason == "it died" and drive.stops == 2
    drive.answers.dies = False
    drive.prompt("a", 4)
    assert len(drive.answers.told) == 2 and len(drive.answers.asked) == 1, "what broke down is left alone"


@pytest.mark.parametrize("mode", ["exact", "resident"])
def test_a_mode_that_reroutes_is_spared_what_reading_a_prompt_itself_takes(mode: str) -> None:
    drive = Drive(Every(1), mode=mode)
    drive.pool.load_wait_s = 5.0
    drive.runtime.observing = True
    drive.prompt("a", 4)
    drive.pool.load_wait_s = 8.0  # three seconds while the first prompt was read with its own routes
    drive.runtime.observing = False
    drive.prompt("a", 4)
    drive.pool.load_wait_s = 20.0
    drive.prompt("a", 4)
    assert drive.worth.hidden_s == (0.0 if mode == "exact" else 6.0)
    assert drive.worth.overhead_s > 0


def test_a_plan_that_no_longer_fits_what_is_routed_is_made_anew() -> None:
    drive = Drive(Adaptive(0.1))
    for task in ("a", "a", "a"):
        drive.prompt(task, 200)
    # What the first prompt routed to was expected; the plan's shares are far from it.
    assert len(drive.answers.asked) == 2
    drive.prompt("a", 100)
    assert len(drive.answers.asked) == 3, "of the tokens since the last answer alone"
    drive.prompt("a", 1)
    assert len(drive.answers.asked) == 3, "too few since then"
