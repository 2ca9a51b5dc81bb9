"""The limit: bytes over bandwidth, operations over rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.planner import facts_of
from emoe.profiling.machine import Machine
from emoe.profiling.roofline import ModelWork, Work, floor
from tests.conftest import Checkpoints

MACHINE = Machine(
    {},
    memory_bytes_per_s={1: 10e9},
    disk_direct_bytes_per_s=1e9,
    disk_cached_bytes_per_s=5e9,
    flops={"float32": {1: 50e9}},
)
amounts = st.floats(0, 1e15)


def test_each_part_can_bound() -> None:
    token = floor(Work(1e9, 1e9, 1e8, 1e9, "bfloat16"), MACHINE, 1)
    assert (token.seconds, token.bound_by) == (0.2, "memory")
    assert (token.link_s, token.compute_s) == (0.1, 0.02)
    assert floor(Work(0, 1e9, 2e8, 0, "bfloat16"), MACHINE, 1).bound_by == "link"
    assert floor(Work(0, 1e9, 2e8, 0, "bfloat16"), MACHINE, 1, "cached").bound_by == "memory"
    assert floor(Work(0, 1e9, 0, 1e12, "bfloat16"), MACHINE, 1).bound_by == "compute"
    assert token.share(0.4) == 0.5
    with pytest.raises(UsageError, match="positive"):
        token.share(0.0)


@given(amounts, amounts, amounts, amounts, st.integers(1, 64))
def test_the_floor_is_its_longest_part_and_never_falls_with_more_work(
    dense: float, expert: float, missed: float, flops: float, threads: int
) -> None:
    found = floor(Work(dense, expert, missed, flops, "float32"), MACHINE, threads)
    assert found.seconds == max(found.memory_s, found.link_s, found.compute_s)
    more = floor(Work(dense, expert, 2 * missed + 1, flops, "float32"), MACHINE, threads)
    assert more.seconds >= found.seconds


def test_what_is_not_needed_need_not_be_measured() -> None:
    blind = Machine({}, memory_bytes_per_s={1: 1e9})
    assert floor(Work(1e9, 0, 0, 0, "bfloat16"), blind, 1).seconds == 1
    with pytest.raises(UsageError, match="was not measured"):
        floor(Work(1e9, 0, 1, 0, "bfloat16"), blind, 1)


@pytest.mark.parametrize("name", ["dense_bytes", "expert_bytes", "missed_bytes", "flops"])
def test_less_than_nothing_is_refused(name: str) -> None:
    values = {"dense_bytes": 1.0, "expert_bytes": 1.0, "missed_bytes": 1.0, "flops": 1.0} | {name: -1.0}
    with pytest.raises(UsageError, match=name):
        Work(**values, dtype="float32")


def test_a_token_reads_the_model_but_for_the_experts_it_does_not_take(checkpoints: Checkpoints) -> None:
    _, facts = facts_of(checkpoints("qwen3_moe"))
    work = ModelWork(facts)
    token = work.token(0.25)
    layers = len(facts.expert_layers)
    assert work.routed_experts == layers * facts.top_k
    assert token.expert_bytes == layers * facts.top_k * facts.expert_layers[0].expert_nbytes
    assert token.missed_bytes == token.expert_bytes / 4
    assert facts.lookup_bytes == 0 or token.dense_bytes < facts.dense_bytes
    assert work.token(0, context=8).dense_bytes == token.dense_bytes + facts.cache_bytes(8, 1)
    # One token's prompt takes what a token takes.
    prompt = work.prompt(1, work.uniform_distinct(1), 0.25)
    assert prompt.expert_bytes == pytest.approx(token.expert_bytes)
    assert prompt.missed_bytes == pytest.approx(token.missed_bytes)
    assert prompt.flops == pytest.approx(token.flops, rel=0.05)


def test_a_prompt_takes_each_expert_once(checkpoints: Checkpoints) -> None:
    _, facts = facts_of(checkpoints("mixtral"))
    work = ModelWork(facts)
    long = work.prompt(100_000, work.uniform_distinct(100_000), 1.0)
    last = facts.expert_layers[-1]
    unused = (last.experts - facts.top_k) * last.expert_nbytes  # the last layer runs the last token's experts alone
    assert long.expert_bytes == pytest.approx(facts.expert_bytes - unused)
    assert long.missed_bytes == long.expert_bytes
    with pytest.raises(UsageError, match="MoE layers"):
        work.prompt(4, [1.0], 0.0)
    with pytest.raises(UsageError, match="between 0 and 1"):
        work.token(1.5)
