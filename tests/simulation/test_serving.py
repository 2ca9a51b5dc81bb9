"""Simulated serving: nothing is lost, limits hold, the same seed gives the same result, and a case by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.cli.simulate import add_parser
from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.residency.budget import PoolPlan
from emoe.scheduling.arrivals import Arrival, poisson_arrivals
from emoe.scheduling.registry import SCHEDULERS
from emoe.simulation import serving
from emoe.simulation.serving import SimulationSettings, simulate_serving
from emoe.simulation.serving_presets import preset
from emoe.simulation.serving_targets import alone, read_targets, targets_from
from emoe.simulation.serving_traffic import Call, Routes, Targets, make_calls
from emoe.tasks.lengths import Lengths
from tests.simulation.stand_ins import make_trace

SHAPE = RoutingShape(3, 8, 2)
NAMES = sorted(SCHEDULERS)
COSTS = {"step_s": 0.01, "token_s": 0.001, "prefill_token_s": 0.0005, "expert_load_s": 0.004}
LENGTHS = {"short": Lengths.of([2, 3, 4]), "long": Lengths.of([10, 20, 60])}


def routes(seed: int = 0) -> Routes:
    rng = np.random.default_rng(seed)
    shares = {task: np.minimum(rng.dirichlet(np.full(8, 0.5), size=3) * 2, 1.0) for task in LENGTHS}
    return Routes.drawn(SHAPE, shares, seed)


ROUTES = routes()
BANK = PoolPlan(0, 12, 1, dict.fromkeys(range(3), 4))
SMALL = SimulationSettings(max_running=4, max_batch_tokens=32, kv_tokens=512, page_tokens=16, costs=COSTS, bank=BANK)


def calls_of(count: int, rate: float = 5.0, seed: int = 0, **options: Any) -> list[Call]:
    targets = options.pop("targets", Targets(0.5, 0.05))
    arrivals = [
        dataclasses.replace(each, input_tokens=20 + 7 * n % 90)
        for n, each in enumerate(poisson_arrivals(rate, count, seed))
    ]
    return make_calls(arrivals, ROUTES, LENGTHS, lambda task: targets, seed=seed, **options)


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.5, 5.0, 100.0]),
    running=st.integers(1, 6),
    pages=st.integers(13, 40),
    batch=st.integers(1, 64),
)
@settings(max_examples=15, deadline=None)
def test_every_request_ends_and_nothing_is_lost(
    name: str, seed: int, rate: float, running: int, pages: int, batch: int
) -> None:
    calls = calls_of(15, rate, seed)
    limits = dataclasses.replace(
        SMALL, scheduler=name, max_running=running, kv_tokens=16 * pages, max_batch_tokens=batch
    )
    simulation = serving._Simulation(calls, ROUTES, limits, None)
    seen: list[tuple[int, float]] = []
    step = simulation._step

    def watched() -> int:
        assert len(simulation.running) <= running
        held = sum(job.pages for job in simulation.running)
        assert held + simulation.free_pages == pages
        before = simulation.now
        done = step()
        seen.append((len(simulation.running), simulation.now - before))
        return done

    run = simulation._run

    def within_the_batch(decoding: list[Any], reading: list[tuple[Any, int]]) -> int:
        jobs = [*decoding, *(job for job, _ in reading)]
        tokens = len(decoding) + sum(chunk for _, chunk in reading)
        assert 0 < tokens <= batch and len({id(job) for job in jobs}) == len(jobs)
        assert all(0 < chunk <= job.to_read - job.read for job, chunk in reading)
        assert all(any(job is other for other in simulation.running) for job in jobs)
        assert simulation._counts(decoding, reading).sum() == tokens * SHAPE.layers * SHAPE.top_k
        return run(decoding, reading)

    simulation._step = watched  # type: ignore[method-assign]
    simulation._run = within_the_batch  # type: ignore[method-assign]
    results = simulation.run(None)
    assert simulation.free_pages == pages
    assert not simulation.running and not simulation.waiting
    assert results.summary().requests == 15
    assert simulation.decoded == results.summary().output_tokens == sum(call.output_tokens for call in calls)
    for call, served in zip(calls, results.served, strict=True):
        assert call.at_s <= served.admitted_s < served.first_token_s <= served.ended_s
    assert results.busy_s <= results.seconds + 1e-9
    assert results.wait_s == pytest.approx(results.loads * COSTS["expert_load_s"])
    assert all(took > 0 for _, took in seen)
    assert results.busy_s == pytest.approx(sum(took for _, took in seen))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_result(name: str) -> None:
    limits = dataclasses.replace(SMALL, scheduler=name)
    first, second = (simulate_serving(calls_of(40, 20.0, 3), ROUTES, limits).as_dict() for _ in range(2))
    assert first == second


def test_fifo_by_hand() -> None:
    """Two requests, one at a time, everything resident: input 4 and 2 tokens, answers 2 and 1."""
    calls = [
        Call(at_s=1.0, input_tokens=4, output_tokens=2, task="short", label="short", expected_tokens=2.0),
        Call(at_s=1.001, input_tokens=2, output_tokens=1, task="long", label="long", expected_tokens=2.0),
    ]
    limits = dataclasses.replace(SMALL, scheduler="fifo", max_running=1, bank=None)
    results = simulate_serving(calls, ROUTES, limits)
    first, second = results.served
    reading = COSTS["step_s"] + 4 * COSTS["prefill_token_s"]
    assert first.first_token_s == pytest.approx(1.0 + reading)
    assert first.ended_s == pytest.approx(1.0 + reading + COSTS["step_s"] + COSTS["token_s"])
    assert second.admitted_s == first.ended_s
    assert second.ended_s == pytest.approx(first.ended_s + COSTS["step_s"] + 2 * COSTS["prefill_token_s"])
    assert results.steps == 3 and results.loads == 0
    assert results.tpot_s(0) == pytest.approx(COSTS["step_s"] + COSTS["token_s"])
    assert results.tpot_s(1) is None


def test_long_inputs_are_read_in_chunks_beside_decoding() -> None:
    calls = [
        Call(at_s=0.0, input_tokens=1, output_tokens=50, task="short", label=None, expected_tokens=9.0),
        Call(at_s=0.0001, input_tokens=100, output_tokens=1, task="long", label=None, expected_tokens=9.0),
    ]
    results = simulate_serving(calls, ROUTES, dataclasses.replace(SMALL, scheduler="fifo", bank=None))
    # 31 input tokens beside one decoded token: 4 steps for 100
    step_s = COSTS["step_s"] + COSTS["token_s"]
    reading = 4 * step_s + 100 * COSTS["prefill_token_s"]
    assert results.served[1].ended_s - results.served[1].admitted_s == pytest.approx(reading)


def test_preempted_requests_go_on_and_end() -> None:
    calls = [
        Call(at_s=0.0, input_tokens=60, output_tokens=100, task="long", label=None, expected_tokens=9.0)
        for _ in range(4)
    ]
    results = simulate_serving(calls, ROUTES, dataclasses.replace(SMALL, scheduler="fifo", kv_tokens=256))
    assert sum(each.preemptions for each in results.served) > 0
    assert all(each.ended_s > 0 for each in results.served)


def test_what_can_never_fit_is_refused_before_anything_runs() -> None:
    call = Call(at_s=0.0, input_tokens=600, output_tokens=1, task="long", label=None, expected_tokens=9.0)
    with pytest.raises(UsageError, match=r"600 \+ 1 tokens of KV memory and there are 512"):
        simulate_serving([call], ROUTES, SMALL)
    with pytest.raises(UsageError, match="no routes"):
        simulate_serving([dataclasses.replace(call, task="none", input_tokens=1)], ROUTES, SMALL)


def test_goodput_counts_every_request() -> None:
    results = simulate_serving(calls_of(30, 50.0, targets=Targets(1e-9, None)), ROUTES, SMALL)
    assert results.summary().met == 0 and results.summary().requests == 30
    results = simulate_serving(calls_of(30, 50.0, targets=Targets(None, None)), ROUTES, SMALL)
    assert results.summary().met_share == 1.0
    assert sum(each.met for each in results.by_task().values()) == 30


def test_wrong_labels_change_what_schedulers_see_and_nothing_else() -> None:
    right, wrong = calls_of(60, seed=4), calls_of(60, seed=4, wrong_labels=1.0)
    assert [call.task for call in right] == [call.task for call in wrong]
    assert all(call.label == call.task for call in right)
    assert all(call.label != call.task for call in wrong)
    assert [call.output_tokens for call in right] == [call.output_tokens for call in wrong]


def test_arrivals_that_bring_lengths_get_tasks_whose_answers_are_as_long() -> None:
    arrivals = [Arrival(n, 10, 3 if n % 2 else 400) for n in range(400)]
    calls = make_calls(arrivals, ROUTES, LENGTHS, lambda task: Targets(None, None), seed=1)
    assert [call.output_tokens for call in calls] == [each.output_tokens for each in arrivals]
    long = [call.output_tokens == 400 for call in calls if call.task == "long"]
    assert np.mean(long) > 0.8


def test_recorded_prompts_are_replayed() -> None:
    experts = np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]], [[3, 2], [1, 0]]], dtype=np.uint8)
    found = Routes.of_trace(make_trace(experts, [1, 2], 4))
    assert sum(len(prompts) for prompts in found.prompts.values()) == 2
    assert found.rows.tolist() == [[0, 1, 6, 7], [1, 2, 4, 7], [3, 2, 5, 4]]


def test_targets_are_multiples_of_what_requests_take_alone() -> None:
    times = alone(ROUTES, LENGTHS, SMALL)
    targets = targets_from(times, 5.0, 3.0)
    for task, (ttft, _) in times.items():
        assert targets[task].ttft_s == pytest.approx(5 * ttft)
    assert len({each.tpot_s for each in targets.values()}) == 1


def test_targets_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "slo.json"
    file.write_text(json.dumps({"short": {"ttft_s": 0.5}, "*": {"tpot_s": 0.1}}))
    assert read_targets(file, LENGTHS) == {"short": Targets(0.5, None), "long": Targets(None, 0.1)}
    for text in ('{"other": {"ttft_s": 1}}', '{"short": {"ttft_s": -1}}', "[]", "{"):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"slo\.json"):
            read_targets(file, LENGTHS)


def test_presets() -> None:
    shares = preset("mixtral").shares(["a", "b"])
    assert shares["a"].shape == (32, 8)
    assert np.allclose(shares["a"].sum(axis=1), 2.0, atol=0.01)
    assert not np.allclose(shares["a"], shares["b"])
    with pytest.raises(UsageError, match="'gpt': choose one of mixtral"):
        preset("gpt")


def run_cli(*words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["simulate", *words])
    return int(args.run(args))


def test_the_command_prints_a_row_for_each_scheduler(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--poisson", "0.5", "--requests", "12", "--seeds", "1,2") == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["scheduler", "fifo", "edf", "emoe", "affinity"]
    assert "targets of classify" in err and "drawn token by token" in err


def test_the_command_reads_arrivals_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "arrivals.csv"
    rows = [f"2023-11-16 18:15:{n:02d}.0,{50 + n},{5 + n}" for n in range(12)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    words = ["--arrivals", str(file), "--schedulers", "fifo,affinity", "--wrong-labels", "0.5", "--json"]
    assert run_cli(*words, "--rate-scale", "2", "--expert-memory", "50%", "--load-time", "0.001") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["scheduler"] for each in found] == ["fifo", "affinity"]
    assert found[0]["requests"] == 12
    assert sum(task["requests"] for task in found[0]["tasks"].values()) == 12


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--poisson", "1", "--schedulers", "lifo"), "lifo"),
        (("--poisson", "1", "--wrong-labels", "2"), "between 0 and 1"),
        (("--poisson", "1", "--task-mix", "nonsense=1"), "nonsense"),
        (("--poisson", "1", "--task-mix", "qa"), "qa"),
        (("--poisson", "1", "--costs", "nowhere.json"), "nowhere.json"),
        (("--poisson", "1", "--arrivals", "x.csv"), "give one of them"),
        (("--arrivals", "nowhere.csv"), "nowhere.csv"),
        (("--poisson", "1", "--schedulers", ","), "names none"),
        (("--poisson", "1", "--policy", "lru"), "--policy means nothing"),
        (("trace.npz", "--max-running", "3"), "--max-running is for requests that arrive"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run_cli(*words)
