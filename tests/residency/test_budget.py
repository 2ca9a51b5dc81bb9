"""Budget arithmetic: what is promised in bytes is kept in slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.config import ExpertMemory
from emoe.errors import BudgetError
from emoe.residency.budget import LayerNeed, floor_bytes, plan_slots, total_bytes, uniform_quotas


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
    if any(quotas.values()):
        assert sum(quotas.values()) == slots
        open_layers = [quotas[n.layer] for n in needs if quotas[n.layer] < n.experts]
        assert not open_layers or max(open_layers) - min(open_layers) <= 1
