"""A machine's rates as numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.profiling.machine import EngineRates, Link, Machine, ModelRates, TokenTimes

numbers = st.floats(1.0, 1e13)
by_threads = st.dictionaries(st.integers(1, 64), numbers, max_size=3)


@given(by_threads, st.dictionaries(st.sampled_from(["float32", "int8"]), by_threads), st.none() | numbers)
def test_what_is_kept_is_what_was_measured(memory: dict[int, float], flops: dict, rate: float | None) -> None:  # type: ignore[type-arg]
    made = Machine({"cpu": "x"}, memory_bytes_per_s=memory, flops=flops, h2d_pinned_bytes_per_s=rate, notes=("a",))
    assert Machine.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    token = TokenTimes(0.1, 0.2, 0.3, 0.4)
    models = {
        "a": {2: ModelRates(1.0, None, 2.0)},
        "b": {1: ModelRates(1.0, 3.0, 2.0, token), 4: ModelRates(5.0, 6.0, 7.0)},
    }
    engine = {threads: EngineRates(rate, 2.0, 3.0, 4.0, 5.0, 6.0) for threads, rate in memory.items()}
    whole = replace(made, engine=engine, models=models, device="cuda", disk_direct_way={"threads": 4})
    assert Machine.from_dict(json.loads(json.dumps(whole.as_dict()))) == whole


def test_rates_are_the_best_of_up_to_so_many_threads() -> None:
    made = Machine({}, memory_bytes_per_s={2: 20.0, 8: 50.0}, flops={"float32": {1: 7.0}})
    assert [made.memory_rate(n) for n in (1, 2, 4, 8, 16)] == [20, 20, 20, 50, 50]
    assert Machine({}, memory_bytes_per_s={1: 30.0, 2: 20.0}).memory_rate(2) == 30
    assert made.compute_rate("bfloat16", 4) == 7.0
    with pytest.raises(UsageError, match="memory bandwidth was not measured"):
        Machine({}).memory_rate(1)


def test_what_older_measurements_do_not_have_is_empty() -> None:
    made = Machine({}, memory_bytes_per_s={1: 30.0}, flops={"float32": {1: 7.0}}, notes=("no disk",))
    values = made.as_dict()
    assert Machine.from_dict(values | {"engine": None, "models": None}) == made
    del values["engine"], values["models"]
    assert Machine.from_dict(values) == made


def test_rates_are_those_of_where_experts_run() -> None:
    rates: dict[str, Any] = {"memory_bytes_per_s": {1: 30.0}, "flops": {"float32": {1: 7.0}, "bfloat16": {1: 9.0}}}
    beside: dict[str, Any] = {"device_bytes_per_s": 300.0, "device_flops": {"float32": 70.0, "float16": 90.0}}
    cpu, gpu = Machine({}, **rates, **beside), Machine({}, device="cuda", **rates, **beside)
    assert (cpu.memory_rate(1), gpu.memory_rate(1)) == (30.0, 300.0)
    assert [cpu.compute_rate(dtype, 1) for dtype in ("float32", "bfloat16", "float16")] == [7.0, 9.0, 7.0]
    assert [gpu.compute_rate(dtype, 1) for dtype in ("float32", "bfloat16", "float16")] == [70.0, 70.0, 90.0]
    bare = Machine({}, device="cuda", **rates)  # its GPU was not measured
    assert (bare.memory_rate(1), bare.compute_rate("bfloat16", 1)) == (30.0, 9.0)
    with pytest.raises(UsageError, match="matrix rate of float32 was not measured"):
        Machine({}).compute_rate("float32", 1)


def test_each_link_has_a_rate_of_its_own_or_says_why_not() -> None:
    names = ("disk_direct", "disk_cached", "h2d_pinned", "h2d_pageable")
    links: tuple[Link, ...] = ("direct", "cached", "pinned", "pageable")
    rates: dict[str, Any] = {f"{name}_bytes_per_s": float(number) for number, name in enumerate(names)}
    made = Machine({}, **rates, notes=("no disk",))
    assert [made.link_rate(link) for link in links] == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(UsageError, match=r"'direct' loads was not measured on this machine \(no disk\)"):
        replace(made, disk_direct_bytes_per_s=None).link_rate("direct")
