"""Budget arithmetic: what is promised in bytes is kept in slots."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.config import ExpertMemory
from emoe.errors import BudgetError
from emoe.residency.budget import (
    MIN_PASSING,
    PASSING_BYTES,
    LayerNeed,
    PoolPlan,
    floor_bytes,
    plan_slots,
    popular_quotas,
    total_bytes,
    uniform_quotas,
)


@st.composite
def models(draw: st.DrawFn) -> list[LayerNeed]:
    """Layers of one or two groups, each group with its own slot size."""
    groups = draw(st.integers(1, 2))
    sizes = [64 * draw(st.integers(1, 50)) for _ in range(groups)]
    needs = []
    for layer in range(draw(st.integers(groups, 8))):
        experts = draw(st.integers(2, 16))
        group = layer % groups
        needs.append(LayerNeed(layer, experts, draw(st.integers(1, min(4, experts))), sizes[group], group))
    return needs


@given(models(), st.floats(0, 1))
def test_slots_never_exceed_the_budget_and_the_floor_always_works(needs: list[LayerNeed], at: float) -> None:
    floor, total = floor_bytes(needs), total_bytes(needs)
    budget = int(floor + at * (total - floor))
    plan = plan_slots(ExpertMemory("bytes", budget), needs)
    assert plan.resident_bytes <= budget
    for need in needs:
        pool = next(pool for pool in plan.pools if pool.group == need.group)
        assert pool.slots >= need.top_k
        assert pool.quotas[need.layer] == 0 or pool.quotas[need.layer] >= need.top_k
        assert sum(pool.quotas.values()) in (0, pool.slots)
    assert plan_slots(ExpertMemory("bytes", total), needs).all_resident
    assert plan_slots(None, needs).all_resident


@given(models())
def test_below_the_floor_is_refused_with_the_smallest_budget_that_works(needs: list[LayerNeed]) -> None:
    floor = floor_bytes(needs)
    with pytest.raises(BudgetError, match=f"smallest budget that works is {floor} bytes"):
        plan_slots(ExpertMemory("bytes", floor - 1), needs)


@given(models(), st.integers(1, 16))
def test_experts_per_layer_are_given_to_every_layer(needs: list[LayerNeed], count: int) -> None:
    memory = ExpertMemory("per_layer", count)
    wanted = sum(min(count, need.experts) * need.slot_nbytes for need in needs)
    if wanted < floor_bytes(needs):
        with pytest.raises(BudgetError):
            plan_slots(memory, needs)
        return
    try:
        plan = plan_slots(memory, needs)
    except BudgetError:  # one group's floor may not be met although the sum is
        return
    assert plan.resident_bytes == wanted


@given(models(), st.integers(0, 200))
def test_uniform_quotas_are_even(needs: list[LayerNeed], slots: int) -> None:
    slots = min(slots, sum(need.experts for need in needs))
    quotas = uniform_quotas(slots, needs)
    if all(need.top_k <= slots // len(needs) for need in needs):
        assert all(quotas.values())  # an even share holds one token's experts
    if any(quotas.values()):
        assert all(quotas[need.layer] >= need.top_k for need in needs)
        assert sum(quotas.values()) == slots
        open_layers = [quotas[n.layer] for n in needs if quotas[n.layer] < n.experts]
        assert not open_layers or max(open_layers) - min(open_layers) <= 1


@given(st.integers(1, 2000), st.integers(0, 10**9))
def test_what_passes_through_is_bounded_in_slots_and_in_bytes(slots: int, slot_nbytes: int) -> None:
    passing = PoolPlan(0, slots, slot_nbytes, {}).passing
    assert passing >= MIN_PASSING
    if passing > MIN_PASSING:
        assert 4 * passing <= slots and passing * slot_nbytes <= PASSING_BYTES
    assert 4 * (passing + 1) > slots or (passing + 1) * slot_nbytes > PASSING_BYTES


@given(models(), st.floats(0.1, 0.9), st.floats(1, 4))
def test_one_pool_replaces_quotas_from_where_the_rule_asks_for_it(
    needs: list[LayerNeed], share: float, shared_from: float
) -> None:
    budget = max(floor_bytes(needs), int(share * total_bytes(needs)))
    with_quotas = plan_slots(ExpertMemory("bytes", budget), needs)
    pooled = plan_slots(ExpertMemory("bytes", budget), needs, shared_from=shared_from)
    for before, after in zip(with_quotas.pools, pooled.pools, strict=True):
        assert after.slots == before.slots
        members = [need for need in needs if need.group == after.group]
        enough = all(before.quotas[need.layer] >= shared_from * need.top_k for need in members)
        partial = before.slots < sum(need.experts for need in members)
        assert after.quotas == (dict.fromkeys(before.quotas, 0) if enough and partial else before.quotas)


@given(models(), st.floats(0.2, 1))
def test_a_lane_is_outside_the_quotas(needs: list[LayerNeed], share: float) -> None:
    budget = max(floor_bytes(needs), int(share * total_bytes(needs)))
    plan = plan_slots(ExpertMemory("bytes", budget), needs, lane=True, shared_from=1)
    for pool in plan.pools:
        members = [need for need in needs if need.group == pool.group]
        everything = pool.slots == sum(need.experts for need in members)
        assert (pool.lane == 0) == everything
        assert sum(pool.quotas.values()) in (0, pool.slots - pool.lane)


@st.composite
def popular(draw: st.DrawFn, needs: list[LayerNeed]) -> dict[int, list[float]]:
    """Shares per expert, in eighths so that sums are exact and ties happen."""
    return {
        need.layer: [n / 8 for n in draw(st.lists(st.integers(0, 8), min_size=need.experts, max_size=need.experts))]
        for need in needs
    }


def expected_misses(quotas: dict[int, int], popularity: dict[int, list[float]]) -> float:
    return sum(sum(sorted(shares, reverse=True)[quotas[layer] :]) for layer, shares in popularity.items())


@given(st.data(), st.integers(1, 3), st.integers(1, 4))
def test_no_other_split_of_the_same_slots_expects_fewer_misses(data: st.DataObject, layers: int, experts: int) -> None:
    """Against every split there is."""
    top_k = data.draw(st.integers(1, experts))
    needs = [LayerNeed(layer, experts, top_k, 64) for layer in range(layers)]
    popularity = data.draw(popular(needs))
    slots = data.draw(st.integers(0, layers * experts))
    quotas = popular_quotas(slots, needs, popularity)
    if slots < layers * top_k:
        assert set(quotas.values()) == {0}
        return
    assert sum(quotas.values()) == slots
    assert all(top_k <= quota <= experts for quota in quotas.values())
    splits = itertools.product(range(top_k, experts + 1), repeat=layers)
    best = min(expected_misses(dict(enumerate(split)), popularity) for split in splits if sum(split) == slots)
    assert expected_misses(quotas, popularity) == best


@given(models(), st.floats(0, 1), st.booleans(), st.data())
def test_a_split_by_popularity_stays_in_the_budget_and_gives_every_layer_a_token(
    needs: list[LayerNeed], at: float, lane: bool, data: st.DataObject
) -> None:
    floor, total = floor_bytes(needs), total_bytes(needs)
    budget = int(floor + at * (total - floor))
    popularity = data.draw(popular(needs))
    plan = plan_slots(ExpertMemory("bytes", budget), needs, lane=lane, popularity=popularity)
    assert plan.resident_bytes <= budget
    assert plan.slots == plan_slots(ExpertMemory("bytes", budget), needs, lane=lane).slots
    for pool in plan.pools:
        own = [need for need in needs if need.group == pool.group]
        quotas = {need.layer: pool.quotas[need.layer] for need in own}
        assert sum(quotas.values()) in (0, pool.slots - pool.lane)
        assert not any(quotas.values()) or all(need.top_k <= quotas[need.layer] <= need.experts for need in own)


def test_a_popularity_of_another_model_is_refused() -> None:
    needs = [LayerNeed(layer, 4, 2, 64) for layer in (1, 2)]
    with pytest.raises(BudgetError, match="layer 2 is known for 0 of its 4 experts"):
        popular_quotas(6, needs, {1: [1.0] * 4})
    with pytest.raises(BudgetError, match="layer 1 is known for 5"):
        plan_slots(ExpertMemory("share", 0.5), needs, popularity={1: [1.0] * 5, 2: [1.0] * 4})
