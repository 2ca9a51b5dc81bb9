"""What the engine promises beside the text: bounds, ends, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

import emoe
from emoe.engine.engine import Engine
from emoe.engine.interface import (
    EngineSettings,
    EngineStoppedError,
    Event,
    FinishedEvent,
    QueueFullError,
    Sampling,
    TaskTargets,
    TooLongError,
)
from emoe.errors import UnsupportedModelError, UsageError
from emoe.tasks.keywords import OTHER
from emoe.tasks.labels import TASKS_AT_MOST
from tests.conftest import Checkpoints
from tests.engine.running import (
    ENDLESS,
    SMALL,
    Answer,
    alone,
    engine_of,
    nothing_left,
    prompt,
    send,
    wait_until,
)


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> Iterator[PreTrainedModel]:
    made, _ = emoe.load(checkpoints("mixtral", torch.float32), expert_memory="60%", dtype="float32")
    yield made
    emoe.close(made)


def test_a_report_of_times_and_targets(model: PreTrainedModel) -> None:
    targets: dict[str | None, TaskTargets] = {
        "maths": TaskTargets(ttft_slo_s=100.0, tpot_slo_s=1e-9),
        None: TaskTargets(ttft_slo_s=50.0),
    }
    with engine_of(model, dataclasses.replace(SMALL, targets=targets)) as engine:
        one = send(engine, prompt(1, 9), 5, task="maths", sampling=ENDLESS)[1].end.report
        other = send(engine, prompt(2, 9), 1, ttft_slo_s=1e-9)[1].end.report
        free = send(engine, prompt(3, 9), 2, sampling=ENDLESS)[1].end.report
    assert (one.task, one.task_source, one.input_tokens, one.output_tokens) == ("maths", "label", 9, 5)
    assert one.ttft_s is not None
    assert one.tpot_s is not None
    assert 0 <= one.queue_s <= one.ttft_s <= one.e2e_s
    assert one.ttft_s + 4 * one.tpot_s <= one.e2e_s
    assert (one.ttft_met, one.tpot_met, one.slo_met) == (True, False, False)
    assert (one.mode, one.lossy) == ("exact", False)
    assert (other.task, other.task_source) == (None, "none")
    assert (other.ttft_met, other.tpot_met, other.slo_met) == (False, None, False)
    assert (free.ttft_met, free.slo_met) == (True, True)


def test_ends(model: PreTrainedModel) -> None:
    """The end token ends an answer and is its last token; `ignore_end` goes on, as generate() without one."""
    found = next(p for p in (prompt(seed, 12) for seed in range(60)) if 0 < len(alone(model, p, 20)) < 20)
    expected = alone(model, found, 20)
    with engine_of(model) as engine:
        ended, going = send(engine, found, 20)[1], send(engine, found, 20, sampling=ENDLESS)[1]
        assert (ended.end.reason, going.end.reason) == ("stop", "length")
        exactly = send(engine, found, len(expected))[1]
        assert exactly.end.reason == "stop"
    assert ended.tokens == exactly.tokens == expected
    assert going.tokens == alone(model, found, 20, ends=False)


def test_the_queue_is_bounded(model: PreTrainedModel) -> None:
    few = dataclasses.replace(SMALL, max_running=1, max_batch_tokens=8, max_waiting=2)
    with engine_of(model, few) as engine:
        name, first = send(engine, prompt(1, 5), 200, sampling=ENDLESS)
        wait_until(lambda: engine.stats().running == 1)
        waiting = [send(engine, prompt(n, 5), 2) for n in (2, 3)]
        with pytest.raises(QueueFullError, match="2 requests wait already") as full:
            send(engine, prompt(4, 5))
        assert full.value.retry_after_s >= 1
        for number in range(TASKS_AT_MOST):  # labels of requests that are refused take no places
            with pytest.raises(QueueFullError):
                send(engine, prompt(4, 5), task=f"refused {number}")
        assert engine.labels("the first") == "the first"
        engine.cancel(waiting[0][0])
        assert waiting[0][1].end.reason == "cancelled"
        assert waiting[0][1].end.report.ttft_s is None
        last = send(engine, prompt(5, 5), 2)[1]
        engine.cancel(name)
        engine.cancel(name)
        assert first.end.reason == "cancelled"
        assert last.end.reason in ("stop", "length")
        engine.cancel(name)
        engine.cancel("no such request")


def test_a_deadline_ends_requests_that_run_and_that_wait(model: PreTrainedModel) -> None:
    with engine_of(model, dataclasses.replace(SMALL, max_running=1)) as engine:
        running = send(engine, prompt(1, 5), 240, deadline_s=0.15, sampling=ENDLESS)[1]
        waiting = send(engine, prompt(2, 5), 2, deadline_s=0.05)[1]
        assert waiting.end.reason == "timeout"
        assert not waiting.tokens
        assert running.end.reason == "timeout"
        assert running.end.report.output_tokens == len(running.tokens)
        assert engine.alive


def test_what_can_never_fit_is_refused(model: PreTrainedModel) -> None:
    with engine_of(model, dataclasses.replace(SMALL, kv_tokens=64)) as engine:
        assert engine.kv_tokens == 64
        with pytest.raises(TooLongError, match="KV memory holds 64"):
            send(engine, prompt(1, 60), 5)
        with pytest.raises(TooLongError, match="the 256 of the context"):
            send(engine, prompt(1, 250), 7)
        whole = send(engine, prompt(1, 60), 4, sampling=ENDLESS)[1]
        assert whole.end.reason == "length"
        for wrong, room in (([], 5), ([1000], 5), ([-1], 5), ([5], 0)):
            with pytest.raises(UsageError):
                send(engine, wrong, room)
        for sampling in (Sampling(temperature=-1), Sampling(top_p=0), Sampling(top_p=1.1), Sampling(top_k=0)):
            with pytest.raises(UsageError, match="temperature is 0 or more"):
                send(engine, prompt(1, 5), sampling=sampling)


@pytest.mark.parametrize(
    "wrong", [{"max_running": 0}, {"kv_tokens": 0}, {"max_batch_tokens": 4}, {"page_tokens": 1}, {"scheduler": "lifo"}]
)
def test_settings_that_cannot_be_meant(model: PreTrainedModel, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Engine(model, None, dataclasses.replace(SMALL, **wrong))  # type: ignore[arg-type]


def test_draining_finishes_what_is_there_and_takes_no_more(model: PreTrainedModel) -> None:
    with engine_of(model) as engine:
        answers = [send(engine, prompt(n, 6), 30, sampling=ENDLESS)[1] for n in range(12)]
        assert not engine.drain(0.001)
        with pytest.raises(EngineStoppedError):
            send(engine, prompt(1, 5))
        assert engine.drain(60)
        assert all(answer.end.reason == "length" for answer in answers)
        assert engine.alive


def test_stopping_ends_everything_and_the_model_goes_on(model: PreTrainedModel) -> None:
    before = alone(model, prompt(1, 8), 20)
    engine = Engine(model, None, SMALL)
    with pytest.raises(EngineStoppedError, match="not been started"):
        send(engine, prompt(1, 5))
    engine.start()
    with pytest.raises(EngineStoppedError, match="runs once"):
        engine.start()
    answers = [send(engine, prompt(n, 6), 200, sampling=ENDLESS)[1] for n in range(12)]
    wait_until(lambda: engine.stats().generation_tokens > 0)
    engine.stop()
    engine.stop()
    assert {answer.end.reason for answer in answers} == {"cancelled"}
    nothing_left(engine)
    assert (engine.alive, engine.failure) == (False, None)
    with pytest.raises(EngineStoppedError):
        send(engine, prompt(1, 5))
    assert model.config._attn_implementation == "sdpa"
    assert alone(model, prompt(1, 8), 20) == before
    with engine_of(model) as again:
        answer = send(again, prompt(1, 8), 20)[1]
        assert answer.end.reason in ("stop", "length")
        assert answer.tokens == before
    assert not any(thread.name == "emoe-engine" for thread in threading.enumerate())


def test_many_threads_submit_and_cancel(model: PreTrainedModel) -> None:
    answers: list[tuple[str, Answer]] = []

    def client(engine: Engine, number: int) -> None:
        for turn in range(4):
            name, answer = send(engine, prompt(number * 10 + turn, 4 + number), 6)
            answers.append((name, answer))
            if (number + turn) % 3 == 0:
                engine.cancel(name)

    with engine_of(model, dataclasses.replace(SMALL, kv_tokens=96)) as engine:
        threads = [threading.Thread(target=client, args=(engine, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.drain(60)
        reasons = [answer.end.reason for _, answer in answers]
    assert len(answers) == 32
    assert set(reasons) <= {"stop", "length", "cancelled"}


def test_a_callback_that_raises_loses_its_own_request_only(model: PreTrainedModel) -> None:
    def broken(event: object) -> None:
        raise ValueError("a client's defect")

    with engine_of(model) as engine:
        _, bad = send(engine, prompt(1, 5), 50, sampling=ENDLESS)
        bad.after = broken
        good = send(engine, prompt(2, 5), 20, sampling=ENDLESS)[1]
        assert good.end.reason == "length"
        wait_until(lambda: engine.stats().running == 0)
        assert isinstance(bad.events[-1], FinishedEvent)
        assert engine.alive


def test_models_that_the_paged_cache_cannot_hold_are_refused_at_start(checkpoints: Checkpoints) -> None:
    for name, why in (("deepseek_v3", "does not fit the paged cache"), ("qwen3_next", "linear_attention")):
        made, _ = emoe.load(checkpoints(name, torch.float32), expert_memory="60%", dtype="float32")
        attention = made.config._attn_implementation
        expected = alone(made, prompt(1, 8), 6)
        with pytest.raises(UnsupportedModelError, match=why):
            Engine(made, None, SMALL).start()
        assert made.config._attn_implementation == attention
        assert alone(made, prompt(1, 8), 6) == expected
        emoe.close(made)


def test_labels_without_end_cost_no_memory(model: PreTrainedModel) -> None:
    """What is counted by task stays bounded for a program that gives every request a label of its own."""
    settings = dataclasses.replace(SMALL, targets={"late": TaskTargets(ttft_slo_s=9.0)})
    with engine_of(model, settings) as engine:
        for at in range(0, TASKS_AT_MOST + 16, 8):
            answers = [send(engine, prompt(1, 4), 1, task=f"task {at + i}")[1] for i in range(8)]
            reports = [answer.end.report for answer in answers]
        assert {report.task for report in reports} == {OTHER}
        assert {report.task_source for report in reports} == {"label"}
        late = send(engine, prompt(1, 4), 1, task="late")[1].end.report
        assert (late.task, late.ttft_slo_s) == ("late", 9.0)
        stats = engine.stats()
    assert len(stats.routed_tokens) <= TASKS_AT_MOST and OTHER in stats.routed_tokens
    assert {task for task, _ in stats.hits} == set(stats.routed_tokens)
    assert len(engine._knowledge._answers) <= TASKS_AT_MOST + 1


def test_time_in_the_queue_is_told(model: PreTrainedModel) -> None:
    with engine_of(model, dataclasses.replace(SMALL, max_running=1)) as engine:
        send(engine, prompt(1, 5), 60, sampling=ENDLESS)
        start = time.perf_counter()
        report = send(engine, prompt(2, 5), 2)[1].end.report
    assert 0 < report.queue_s <= time.perf_counter() - start


def test_priorities(model: PreTrainedModel) -> None:
    order: list[str] = []

    def note(name: str, event: Event) -> None:
        if isinstance(event, FinishedEvent):
            order.append(name)

    with engine_of(model, dataclasses.replace(SMALL, max_running=1)) as engine:
        send(engine, prompt(1, 5), 60, sampling=ENDLESS)
        answers = []
        for name, priority in (("late", 5), ("usual", 0), ("urgent", -5)):
            answer = send(engine, prompt(2, 5), 1, priority=priority)[1]
            answer.after = partial(note, name)
            answers.append(answer)
        for answer in answers:
            assert answer.end.reason in ("stop", "length")
    assert order == ["urgent", "usual", "late"]


def test_default_settings_are_sound(model: PreTrainedModel) -> None:
    with engine_of(model, EngineSettings()) as engine:
        assert engine.scheduler_name == "affinity"
        assert engine.max_context == 256
        assert send(engine, prompt(1, 5), 3)[1].end.reason in ("stop", "length")
        assert engine.costs.steps > 0
