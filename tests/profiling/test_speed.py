"""Predictions: parts add up while decoding and overlap in a prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.planner import facts_of
from emoe.profiling.kept import layout_of
from emoe.profiling.machine import PROMPT_TOKENS, EngineRates, Machine, ModelRates, TokenTimes
from emoe.profiling.measuring import with_engine, with_model
from emoe.profiling.roofline import ModelWork
from emoe.profiling.speed import PROMPT_OVERLAP, expected
from tests.conftest import Checkpoints

ENGINE = EngineRates(2e9, 1e9, 1e11, 1e11, 1e-3, 2e-3)
MACHINE = Machine({}, memory_bytes_per_s={1: 4e9}, disk_direct_bytes_per_s=1e8, flops={"float32": {1: 1e12}})


def test_parts_of_a_token_add_up_and_those_of_a_prompt_overlap(checkpoints: Checkpoints) -> None:
    _, facts = facts_of(checkpoints("qwen3_moe"))
    work = ModelWork(facts)

    def speed(miss_rate: float, missed: float) -> tuple[float, float]:
        found = expected(facts, MACHINE, ENGINE, miss_rate=miss_rate, prompt_tokens=64, prompt_missed_bytes=missed)
        assert found.token_s == pytest.approx(found.memory_s + found.load_s - found.overlap_s + found.overhead_s)
        assert 0 <= found.overlap_s <= found.load_s
        assert found.tokens_per_s == 1 / found.token_s
        return found.token_s + found.overlap_s, found.first_token_s

    resident, half = speed(0, 0), speed(0.5, 1e9)
    assert half[0] - resident[0] == pytest.approx(work.routed_bytes / 2 / 1e8)
    compute_s = resident[1] - len(facts.cache_layers) * 1e-3 - 2e-3
    assert half[1] == pytest.approx(resident[1] + 10 - PROMPT_OVERLAP * min(compute_s, 10))


def test_what_is_measured_predicts_the_embedded_model() -> None:
    made = with_engine(replace(MACHINE, disk_direct_bytes_per_s=None), [1])
    engine = made.engine[1]
    assert all(value >= 0 for value in engine.as_dict().values())
    assert EngineRates.from_dict(engine.as_dict()) == engine
    assert Machine.from_dict(made.as_dict() | {"engine": {"1": engine.as_dict()}}) == made
    _, facts = facts_of(None)
    found = expected(facts, made, engine, miss_rate=0, prompt_tokens=8, prompt_missed_bytes=0)
    assert 0 < found.token_s < 1
    with pytest.raises(UsageError, match="was not measured"):
        expected(facts, made, engine, miss_rate=0.1, prompt_tokens=8, prompt_missed_bytes=0)


def test_a_gpus_kernels_are_not_timed() -> None:
    with pytest.raises(UsageError, match="on the CPU only"):
        with_engine(replace(MACHINE, device="cuda"), [1])
    with pytest.raises(UsageError, match="damaged rates"):
        EngineRates.from_dict({})


def test_a_models_own_rates_stand_before_the_machines(checkpoints: Checkpoints) -> None:
    folder = checkpoints("gpt_oss")
    made = with_model(MACHINE, folder, 1)
    rates = made.models[layout_of(folder)][1]
    assert rates.expert_flops > 0
    assert rates.token is not None
    assert rates.token.dtype == facts_of(folder)[1].dtype
    assert rates.token.dense_s > 0
    assert rates.token.experts_s > 0
    assert rates.one_bytes_per_s is None or rates.one_bytes_per_s > 0
    assert Machine.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    _, facts = facts_of(folder)
    work = ModelWork(facts)
    own = ModelRates(one_bytes_per_s=5e8, stream_bytes_per_s=1e9, expert_flops=1e3)
    common: dict[str, Any] = {"miss_rate": 0.5, "prompt_tokens": 64, "prompt_missed_bytes": 1e9}
    found = expected(facts, MACHINE, ENGINE, model=own, **common)
    assert found.load_s == pytest.approx(work.routed_bytes / 2 / 5e8)
    assert found.prompt_load_s == pytest.approx(1.0)
    assert found.prompt_compute_s > expected(facts, MACHINE, ENGINE, **common).prompt_compute_s
    with pytest.raises(UsageError, match="damaged rates of a model"):
        ModelRates.from_dict({"one_bytes_per_s": None, "stream_bytes_per_s": None, "expert_flops": None})


def test_all_but_the_last_expert_to_come_are_computed_meanwhile(checkpoints: Checkpoints) -> None:
    _, facts = facts_of(checkpoints("qwen3_moe"))
    common: dict[str, Any] = {"miss_rate": 0.5, "prompt_tokens": 8, "prompt_missed_bytes": 0}
    experts_s = ModelWork(facts).routed_bytes / ENGINE.expert_bytes_per_s
    half = expected(facts, MACHINE, ENGINE, waiting=0.5, **common)
    assert half.overlap_s == pytest.approx(0.5 * (facts.top_k - 1) / facts.top_k * experts_s)
    chance = expected(facts, MACHINE, ENGINE, **common)
    assert chance.overlap_s == pytest.approx((1 - 0.5**facts.top_k) * (facts.top_k - 1) / facts.top_k * experts_s)
    assert expected(facts, MACHINE, ENGINE, waiting=0.5, **common | {"miss_rate": 0.0}).overlap_s == 0


@given(miss_rate=st.floats(0.0, 1.0), share=st.floats(0.0, 1.0))
def test_a_token_of_timed_layers_is_linear_in_first_and_further_misses(miss_rate: float, share: float) -> None:
    _, facts = facts_of()
    times = TokenTimes(dense_s=0.1, experts_s=0.02, first_miss_s=0.03, more_miss_s=0.01)
    own = ModelRates(one_bytes_per_s=5e8, stream_bytes_per_s=1e9, expert_flops=1e11, token=times)
    routed, top_k = len(facts.expert_layers), facts.top_k
    waiting = min(miss_rate * top_k, 1.0) * share  # some miss in at most as many layers as there are misses
    common: dict[str, Any] = {"prompt_tokens": 8, "prompt_missed_bytes": 0, "context": PROMPT_TOKENS}
    found = expected(facts, MACHINE, ENGINE, miss_rate=miss_rate, waiting=waiting, model=own, **common)
    waits, misses = waiting * routed, miss_rate * routed * top_k
    wanted = 0.1 + routed * 0.02 + waits * 0.03 + (misses - waits) * 0.01 + ENGINE.token_s
    assert found.token_s == pytest.approx(wanted)
    assert found.load_s == pytest.approx(ModelWork(facts).routed_bytes * miss_rate / 5e8)
    # Of another type of numbers, or through the page cache, nothing was timed.
    for other, link in ((replace(own, token=replace(times, dtype="float64")), "direct"), (own, "cached")):
        machine = replace(MACHINE, disk_cached_bytes_per_s=1e9)
        rest = expected(facts, machine, ENGINE, miss_rate=miss_rate, waiting=waiting, model=other, link=link, **common)  # type: ignore[arg-type]
        assert 0 <= rest.overlap_s <= rest.load_s


def test_measurements_of_before_layers_were_timed_are_read() -> None:
    old = {"one_bytes_per_s": 1.0, "stream_bytes_per_s": None, "expert_flops": 2.0}
    assert ModelRates.from_dict(old) == ModelRates(1.0, None, 2.0)
    with pytest.raises(UsageError, match="damaged rates of a model"):
        ModelRates.from_dict(old | {"token": {"dense_s": 1.0}})
