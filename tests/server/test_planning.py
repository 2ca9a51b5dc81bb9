"""A server's memory: KV and experts out of one plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emoe.config import ExpertMemory
from emoe.errors import BudgetError, UsageError
from emoe.planner import Facts, facts_of
from emoe.server.planning import PADDING_PAGES, ServingPlan, plan_serving

MIB = 1 << 20


@pytest.fixture(scope="module")
def facts() -> Facts:
    return facts_of(None)[1]


def planned(facts: Facts, **options: Any) -> ServingPlan:
    base = {"model": "m", "memory_bytes": None, "max_running": 32, "max_batch_tokens": 512, "page_tokens": 32}
    return plan_serving(facts, **base | options)


def test_defaults(facts: Facts) -> None:
    plan = planned(facts)
    assert (plan.context, plan.kv_tokens, plan.expert_memory) == (1024, 16384, None)
    assert plan.kv_bytes == (16384 + PADDING_PAGES * 32) * plan.kv_token_bytes
    few = planned(facts, max_running=2)
    assert few.kv_tokens == 2048  # what two full contexts take
    assert planned(facts, context=50, max_running=3).kv_tokens == 160  # whole pages


def test_experts_get_what_kv_memory_and_the_rest_leave(facts: Facts) -> None:
    rest = planned(facts).memory.rest_bytes
    plan = planned(facts, memory_bytes=rest + 10 * MIB, memory_source="allowed")
    assert plan.memory.fit == "some"
    assert plan.expert_memory == ExpertMemory("bytes", plan.memory.budget_bytes)
    assert 9 * MIB < plan.memory.budget_bytes <= 10 * MIB
    assert plan.memory.total_bytes <= rest + 10 * MIB
    plan.check()
    less = planned(facts, memory_bytes=rest + 10 * MIB, kv_memory_bytes=plan.kv_bytes + 2 * MIB)
    assert less.memory.budget_bytes < plan.memory.budget_bytes - MIB


def test_expert_memory_as_asked(facts: Facts) -> None:
    plan = planned(facts, expert_memory=ExpertMemory.parse("40%"), memory_bytes=1 << 40)
    assert plan.expert_memory == ExpertMemory.parse("40%")
    assert plan.as_dict()["kv_tokens"] == 16384


def test_what_does_not_fit_is_refused_with_what_would_help(facts: Facts) -> None:
    small = planned(facts, memory_bytes=100 * MIB, memory_source="allowed")
    with pytest.raises(BudgetError, match=r"needs .* 96\.38 MiB of KV memory .* allowed are 100\.00 MiB.*--kv-memory"):
        small.check()
    rest = planned(facts).memory.rest_bytes
    experts = ExpertMemory("bytes", 20 * MIB)
    with pytest.raises(BudgetError, match="--expert-memory"):
        planned(facts, memory_bytes=rest + 10 * MIB, expert_memory=experts).check()
    planned(facts, memory_bytes=rest + 20 * MIB, expert_memory=experts).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 2048}, "made for 1024 tokens, and --max-model-len is 2048"),
        ({"kv_memory_bytes": 1000}, "KV memory of 1000 B is less than one page"),
        ({"kv_memory_bytes": 3 * 32 * 6144 - 1}, "less than one page"),
    ],
)
def test_numbers_that_cannot_be_meant(facts: Facts, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(facts, **options)


def test_kv_memory_is_what_the_engine_takes(facts: Facts, nano_engine: Any) -> None:
    plan = planned(facts, kv_memory_bytes=(nano_engine.kv_tokens + PADDING_PAGES * 32) * 6144)
    assert plan.kv_tokens == nano_engine.kv_tokens
    kept = nano_engine._loop.batcher._cache.__dict__.values()
    tensors = [each for value in kept for each in (value if isinstance(value, list) else [value])]
    storages = {
        storage.data_ptr(): storage.nbytes()
        for each in tensors
        if isinstance(each, torch.Tensor) and (storage := each.untyped_storage()).nbytes() > MIB
    }
    assert 0.95 * plan.kv_bytes <= sum(storages.values()) <= plan.kv_bytes


def test_on_a_device_kv_memory_and_experts_share_the_devices_memory(facts: Facts) -> None:
    options: dict[str, Any] = {"device": "cuda", "process_limit_bytes": 600 * MIB, "process_source": "allowed"}
    rest = planned(facts, **options).memory.rest_bytes
    plan = planned(facts, memory_bytes=rest + 10 * MIB, memory_source="allowed", **options)
    assert 9 * MIB < plan.memory.budget_bytes <= 10 * MIB
    assert plan.memory.total_bytes <= rest + 10 * MIB and plan.kv_bytes < plan.memory.total_bytes
    assert plan.memory.process_bytes == plan.memory.import_bytes + plan.memory.runtime_bytes + (
        plan.memory.buffer_bytes + plan.memory.host_bytes
    )
    plan.check()
    with pytest.raises(BudgetError, match=r"of the machine's memory to be served on cuda.*--host-memory"):
        planned(facts, **options | {"process_limit_bytes": 100 * MIB}).check()
