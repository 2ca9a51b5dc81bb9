"""The table's books against its slots, and what it evicts against the rule read plainly, after moves in any order."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.residency.budget import LayerNeed, PoolPlan, uniform_quotas
from emoe.residency.eviction import EVICTION_RULES, Now, Uses, make_eviction
from emoe.residency.table import Key, ResidencyTable, SlotState

EXPERTS = {0: 3, 2: 5, 5: 4}
"""Layers that do not follow each other, of unequal numbers of experts."""

KEYS = [(layer, expert) for layer, count in EXPERTS.items() for expert in range(count)]
RANK = {layer: rank for rank, layer in enumerate(EXPERTS)}


class Plain:
    """What was said to the table, kept the plain way, and the choice of a slot made by looking at every slot."""

    def __init__(self, table: ResidencyTable) -> None:
        self.table = table
        self.past = {key: [-1, -1, 0] for key in KEYS}
        self.layer = 0

    def use(self, key: Key) -> None:
        self.past[key] = [self.table.tick, self.table.pass_no, self.past[key][2] + 1]

    def held(self, *, transient: bool | None = None) -> list[Key]:
        slots = [slot for slot in self.table.slots if transient is None or slot.transient is transient]
        return sorted(slot.key for slot in slots if slot.key is not None)

    def first(self, candidates: list[Key]) -> Key:
        """What the rule evicts first: one that passes through if any does, of equal scores the lowest key."""
        passing = set(self.held(transient=True))
        candidates = [key for key in candidates if key in passing] or candidates
        now = Now(self.table.tick, self.table.pass_no, RANK[self.layer], len(EXPERTS))

        def score(key: Key) -> float:
            entry = np.array([[*self.past[key], RANK[key[0]], KEYS.index(key)]], dtype=np.int64)
            return float(self.table.eviction.score(Uses(*entry.T), now)[0])

        return min(candidates, key=lambda key: (score(key), key))

    def evicted(self, key: Key, transient: bool, protect: frozenset[Key]) -> tuple[bool, Key | None]:
        """Whether `key` gets a slot, and which key goes for it."""
        table, plan = self.table, self.table.plan
        free = len(self.held()) < plan.slots
        if plan.slots >= len(KEYS):
            return free, None
        passing = set(self.held(transient=True))
        ready = [slot.key for slot in table.slots if slot.key is not None and slot.state is SlotState.READY]
        ready = [held for held in ready if held not in protect]
        kept = {layer: sum(k[0] == layer for k in self.held(transient=False)) for layer in EXPERTS}
        quota = plan.quotas[key[0]]
        own = [held for held in ready if held[0] == key[0]]
        if transient:
            if reused := [held for held in ready if held in passing]:
                return True, self.first(reused)
            if len(passing) >= table.max_transient:
                return False, None
        elif quota and kept[key[0]] >= quota:
            own = [held for held in own if not (plan.lane and held in passing)]
            return (True, self.first(own)) if own else (False, None)
        if free:
            return True, None
        over = [held for held in ready if kept[held[0]] > plan.quotas[held[0]] > 0]
        mine = own if quota and kept[key[0]] >= quota else []
        candidates = mine or over or ready
        return (True, self.first(candidates)) if candidates else (False, None)

    def check(self) -> None:
        """Everything that the table counts is what its slots hold."""
        table = self.table
        filled = {number: slot for number, slot in enumerate(table.slots) if slot.key is not None}
        assert len(table.slots) == table.plan.slots
        assert all((slot.state is SlotState.EMPTY) == (slot.key is None) for slot in table.slots)
        assert all(not slot.transient and not slot.prefetched for slot in table.slots if slot.key is None)
        assert {slot.key: number for number, slot in filled.items()} == table._where
        assert sorted(table._free) == [number for number in range(len(table.slots)) if number not in filled]
        assert table.occupied == len(filled)
        assert table._passing == {number for number, slot in filled.items() if slot.transient}
        by_key = {slot.key: slot for slot in filled.values()}
        for layer, experts in EXPERTS.items():
            states = [by_key[layer, e].state if (layer, e) in by_key else None for e in range(experts)]
            runs = [state in (SlotState.READY, SlotState.PINNED) for state in states]
            assert table.ready(layer).tolist() == [state is SlotState.READY for state in states]
            assert [table.is_resident((layer, e)) for e in range(experts)] == runs
            assert table.resident(layer) == [e for e in range(experts) if runs[e]]
            kept = sum(key[0] == layer for key in self.held(transient=False))
            assert table._kept[layer] == kept
            quota = table.plan.quotas[layer]
            assert table.staying(layer) == (quota or kept)
            share = quota or max(1, table.plan.slots // len(EXPERTS))
            assert table.below_quota(layer) == (len(filled) < len(table.slots) and kept < share)


@st.composite
def tables(draw: st.DrawFn) -> ResidencyTable:
    lane = draw(st.sampled_from([0, 0, 1, 2]))
    slots = draw(st.integers(4, len(KEYS)))
    needs = [LayerNeed(layer, count, 1, 64) for layer, count in EXPERTS.items()]
    shared = draw(st.booleans())
    quotas = dict.fromkeys(EXPERTS, 0) if shared else uniform_quotas(max(3, slots - lane), needs)
    plan = PoolPlan(0, slots, 64, quotas, lane)
    rule = make_eviction(draw(st.sampled_from(sorted(EVICTION_RULES))))
    given = draw(st.integers(0, 3))
    table = ResidencyTable(plan, EXPERTS, rule, given)
    assert table.max_transient == min(lane or given or plan.passing, slots)
    return table


@given(
    tables(), st.randoms(use_true_random=False), st.lists(st.sampled_from("uuurrrrtttpcaxm"), min_size=20, max_size=80)
)
@settings(max_examples=80)
def test_the_books_agree_with_the_slots_and_the_rule_is_followed(
    table: ResidencyTable, random: Random, moves: list[str]
) -> None:
    plain = Plain(table)
    for move in moves:
        if random.random() < 0.4:
            plain.layer = list(EXPERTS)[(RANK[plain.layer] + 1) % len(EXPERTS)]
            if plain.layer == 0:
                table.begin_pass()
            table.visit(plain.layer)
        key = random.choice(KEYS)
        protect = frozenset(random.sample(KEYS, random.choice((0, 0, 1, 4))))
        slot = table.find(key)
        if move == "u":
            table.use(key, keep=random.random() < 0.5)
            plain.use(key)
        elif move in "rt" and slot is None:
            room, gone = plain.evicted(key, move == "t", protect)
            prefetch = random.random() < 0.3
            slot = table.reserve(key, transient=move == "t", protect=protect, prefetch=prefetch)
            assert (slot is not None) == room
            if slot is not None:
                assert table.evicted == gone
                assert table.slots[slot].key == key and table.slots[slot].state is SlotState.LOADING
                assert table.slots[slot].transient == (move == "t") and table.slots[slot].prefetched == prefetch
                if random.random() < 0.8:
                    table.commit(slot, 64)
        elif move == "m":
            make_way(table, plain, key[0], random.randint(0, 3), frozenset(random.sample(range(6), 2)))
        elif slot is not None:
            state = table.slots[slot].state
            if state is SlotState.LOADING:
                if move == "c":
                    table.abort(slot)
                else:
                    table.commit(slot, 64)
            elif state is SlotState.PINNED and move != "a":
                table.unpin(slot)
            elif move == "p":
                table.pin(slot)
            elif move == "x":
                table.evict(slot)
            elif move == "a":
                adopt(table, plain, key, protect)
        plain.check()


def adopt(table: ResidencyTable, plain: Plain, key: Key, protect: frozenset[Key]) -> None:
    """`key` stays if it passed through and its layer has room or one to give up: the first that `protect` spares."""
    before = set(plain.held(transient=True))
    own = [held for held in plain.held(transient=False) if held[0] == key[0]]
    spared = [held for held in own if held not in protect]
    after = set(before)
    if key in before:
        if len(own) < table.plan.quotas[key[0]]:
            after.discard(key)
        elif spared:
            after = (before - {key}) | {plain.first(spared)}
    table.adopt(key, protect)
    assert set(plain.held(transient=True)) == after


def make_way(table: ResidencyTable, plain: Plain, layer: int, coming: int, wanted: frozenset[int]) -> None:
    """As many of `layer` as come beyond its quota begin to pass through, what the rule evicts first before others."""
    stay = plain.held(transient=False)
    own = [key for key in stay if key[0] == layer]
    gone: list[Key] = []
    for _ in range(coming - max(0, table.plan.quotas[layer] - len(own))):
        left = [key for key in own if key[1] not in wanted and key not in gone]
        gone += [plain.first(left)] if left else []
    table.make_way(layer, coming, wanted)
    assert plain.held(transient=False) == [key for key in stay if key not in gone]
