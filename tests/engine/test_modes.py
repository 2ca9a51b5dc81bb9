"""Plans follow admissions, and the lossy modes work, labelled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emoe
from emoe import nano
from emoe.engine.interface import EngineSettings
from emoe.model.bind import binding_of
from emoe.model.passes import Pass
from emoe.residency.plans import TaskDemand, expected_tokens
from emoe.routing.trace import Trace
from emoe.tasks.profile import Profile
from tests.conftest import Checkpoints
from tests.engine.running import ENDLESS, SMALL, engine_of, prompt, send, wait_until

TEXTS = [each["prompt"] for each in nano.prompts()[:64:7]]


@pytest.fixture(scope="module")
def prompts() -> Iterator[list[list[int]]]:
    _, tokenizer = emoe.load(expert_memory="40%")
    assert tokenizer is not None
    yield [tokenizer(text)["input_ids"] for text in TEXTS]


def test_tasks_are_read_off_prompts(prompts: list[list[int]]) -> None:
    model, tokenizer = emoe.load(expert_memory="40%")
    profile = Profile.read(nano.profile_path())
    with engine_of(model, EngineSettings(), tokenizer) as engine:
        reports = [send(engine, each, 2)[1].end.report for each in prompts]
        labelled = send(engine, prompts[0], 2, task="my own")[1].end.report
    for text, report in zip(TEXTS, reports, strict=True):
        task = profile.task_of(text)
        assert (report.task, report.task_source) == ((None, "none") if task == "other" else (task, "keywords"))
    assert (labelled.task, labelled.task_source) == ("my own", "label")
    assert {report.task for report in reports} - {None}
    emoe.close(model)


def test_plans_follow_admissions(prompts: list[list[int]]) -> None:
    """Every admission evaluates Equation 2 over the running requests of each task; the predictor is asked every p."""
    model, tokenizer = emoe.load(
        expert_memory="40%", predictor="task-popularity", replan_prompts=5, profile=nano.profile_path()
    )
    binding = binding_of(model)
    planner = binding.ahead.planner
    assert planner is not None
    seen: list[tuple[int, int, Any, Any]] = []

    def look(now: Pass) -> None:
        demand = [
            TaskDemand(
                [p.inputs for p in planner._prompts.values() if p.task == task],
                planner._habits.output_tokens(task) or 0,
                shares,
                planner._habits.sensitive(task),
            )
            for task in dict.fromkeys(p.task for p in planner._prompts.values())
            if (shares := planner._answered.get(task, planner._habits.shares(task))) is not None
        ]
        new = sum(segment.new for segment in now.segments)
        planned = None if planner.planned is None else planner.planned.copy()
        seen.append((new, planner.plans, planned, expected_tokens(demand) if demand else None))

    binding.runtime.at_pass_start.append(look)
    with engine_of(model, EngineSettings(scheduler="fifo", max_running=3), tokenizer) as engine:
        answers = [send(engine, each, 10, sampling=ENDLESS)[1] for each in prompts[:8]]
        for answer in answers:
            assert answer.end.reason == "length"
        stats = engine.stats()
    plans = [plan for _, plan, _, _ in seen]
    for (_, before, _, _), (new, after, planned, tokens) in pairwise(seen):
        if new:
            assert after == before + 1  # one plan for all that are admitted together
            for rank in range(len(planned)):
                inside, outside = tokens[rank][planned[rank]], tokens[rank][~planned[rank]]
                assert inside.min() >= outside.max() - 1e-9
    assert stats.plans == plans[-1] == planner.plans > 2
    assert 0 < stats.predictor_calls <= 2 * 3  # at the first chance and at prompt 5, for the tasks that run
    assert stats.predictor_hit_rate is not None
    assert 0 < stats.predictor_hit_rate < 1
    emoe.close(model)


@pytest.mark.parametrize("mode", ["resident", "balanced"])
@pytest.mark.parametrize("predictor", [None, "task-popularity"])
def test_lossy_modes(prompts: list[list[int]], mode: str, predictor: str | None) -> None:
    about: dict[str, Any] = {"mode": mode, "expert_memory": "40%", "profile": nano.profile_path()}
    if predictor is not None:
        about |= {"predictor": predictor, "replan_prompts": 2}
    model, tokenizer = emoe.load(sensitivity_threshold=0.0, **about)
    runtime = binding_of(model).runtime
    first: list[Pass] = []
    runtime.at_pass_start.append(lambda now: first.append(now) if not first else None)
    with engine_of(model, EngineSettings(scheduler="fifo"), tokenizer) as engine:
        assert (engine.mode, engine.lossy) == (mode, True)
        answers = [send(engine, each, 12, task="maths", sampling=ENDLESS)[1] for each in prompts]
        reports = [answer.end.report for answer in answers]
        stats = engine.stats()
    assert all(report.lossy and report.mode == mode for report in reports)
    assert all(len(answer.tokens) == 12 for answer in answers)
    assert sum(stats.rerouted_tokens.values()) > 0
    assert len(first[0].segments) == 1  # the first prompt is read with its own routes, alone
    assert runtime.prompts == len(prompts)
    emoe.close(model)


def test_quantised_experts_are_lossy_in_exact_mode_too(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints("qwen3_moe", torch.float32)
    model, _ = emoe.load(path, expert_memory="60%", expert_dtype="int8", trace=tmp_path / "served.npz")
    nbytes = emoe.stats(model)["total_expert_bytes"]
    with engine_of(model, SMALL) as engine:
        assert (engine.mode, engine.lossy, engine.expert_dtype) == ("exact", True, "int8")
        report = send(engine, prompt(1, 9), 6, sampling=ENDLESS)[1].end.report
    emoe.close(model)
    assert (report.mode, report.lossy) == ("exact", True)
    keys = len(binding_of(model).index.keys())
    assert report.bytes_loaded == report.experts_loaded * nbytes // keys
    # What a simulator takes for the cost of a load.
    assert Trace.read(tmp_path / "served.npz").source["expert_bytes"] == nbytes // keys


def test_a_trace_of_what_was_served(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Packed, chunked and preempted: the trace holds each prompt's tokens, in order."""
    path = checkpoints("mixtral", torch.float32)
    model, _ = emoe.load(path, expert_memory="60%", dtype="float32", trace=tmp_path / "served.npz")
    asked = [prompt(n, 5 + 7 * n) for n in range(4)]
    with engine_of(model, SMALL) as engine:
        answers = [send(engine, each, 6, task=f"t{n}", sampling=ENDLESS)[1] for n, each in enumerate(asked)]
        for answer in answers:
            assert answer.end.reason == "length"
    emoe.close(model)
    trace = Trace.read(tmp_path / "served.npz")
    assert len(trace.offsets) == 5
    assert [trace.tasks[i] for i in trace.task] == ["t0", "t1", "t2", "t3"]
    alone, _ = emoe.load(path, expert_memory="60%", dtype="float32", trace=tmp_path / "alone.npz")
    with torch.no_grad():
        for each, answer in zip(asked, answers, strict=True):
            alone(torch.tensor([[*each, *answer.tokens[:-1]]]))
    emoe.close(alone)
    expected = Trace.read(tmp_path / "alone.npz")
    assert trace.token_ids is not None
    assert expected.token_ids is not None
    assert np.array_equal(trace.token_ids, expected.token_ids)
    assert np.array_equal(trace.experts, expected.experts)
    assert trace.phase.sum() == 4 * 5


def test_a_predictor_is_told_of_every_token_once(checkpoints: Checkpoints) -> None:
    """Also of requests that were preempted and read again."""
    model, _ = emoe.load(
        checkpoints("mixtral", torch.float32), expert_memory="60%", dtype="float32", predictor="task-popularity"
    )
    planner = binding_of(model).ahead.planner
    assert planner is not None
    told: list[int] = []
    tell = planner._answers.tell

    def listen(task: str | None, routes: Any) -> None:
        told.append(len(routes))
        tell(task, routes)

    planner._answers.tell = listen  # type: ignore[method-assign]
    tight = EngineSettings(scheduler="fifo", max_running=6, max_batch_tokens=16, kv_tokens=72, page_tokens=4)
    with engine_of(model, tight) as engine:
        answers = [send(engine, prompt(n, 8 + n), 20, sampling=ENDLESS)[1] for n in range(6)]
        assert sum(answer.end.report.preemptions for answer in answers) > 0
        assert send(engine, prompt(9, 5), 1)[1].end.report.output_tokens == 1  # its pass tells of those before
    assert sorted(told) == sorted(8 + n + 19 for n in range(6))
    emoe.close(model)


def test_a_first_prompt_that_is_cancelled_leaves_no_trace(checkpoints: Checkpoints) -> None:
    """Nobody else's tokens keep their own routes because of it."""
    model, _ = emoe.load(
        checkpoints("mixtral", torch.float32), expert_memory="4/layer", mode="resident", replan_prompts=100
    )
    runtime = binding_of(model).runtime
    names: list[str] = []
    observing: list[bool] = []

    def look(now: Pass) -> None:
        observing.append(runtime.observing)
        wait_until(lambda: bool(names))
        engine.cancel(names[0])

    runtime.at_pass_start.append(look)
    with engine_of(model, SMALL) as engine:
        name, first = send(engine, prompt(1, 200), 4)
        names.append(name)
        assert first.end.reason == "cancelled"
        assert send(engine, prompt(2, 20), 4, sampling=ENDLESS)[1].end.reason == "length"
    assert observing[0]
    assert not observing[-1]
    assert not runtime._reading
    emoe.close(model)


def test_the_first_prompt_is_alone_until_it_is_read(checkpoints: Checkpoints) -> None:
    model, _ = emoe.load(checkpoints("mixtral", torch.float32), expert_memory="4/layer", mode="resident")
    runtime = binding_of(model).runtime
    passes: list[tuple[int, bool]] = []
    runtime.at_pass_start.append(lambda now: passes.append((len(now.segments), runtime.observing)))
    with engine_of(model, SMALL) as engine:
        answers = [send(engine, prompt(n, 70), 4, sampling=ENDLESS)[1] for n in range(3)]
        wait_until(lambda: all(answer.ended.is_set() for answer in answers))
    assert passes[:3] == [(1, True)] * 3  # 70 tokens in chunks of 32
    assert passes[3][0] > 1
    emoe.close(model)
