"""The share of the least time that each engine reaches, against sums by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emoe.bench.peers.entries import Entry, MemoryLimit
from emoe.bench.peers.limits import facts_of_entry, limits_of
from emoe.bench.peers.results import Row
from emoe.bench.settings import Contender
from emoe.errors import UsageError
from emoe.planner import facts_of
from emoe.planner.facts import Facts
from emoe.profiling.machine import Machine
from emoe.profiling.roofline import ModelWork
from tests.bench.peers.checkpoints import HIDDEN, INNER, save

PROMPT, STEPS = 8, 4
EXPERT = 3 * HIDDEN * INNER * 4
MACHINE = Machine(
    {},
    memory_bytes_per_s={1: 1e6, 2: 2e6},
    disk_direct_bytes_per_s=1e4,
    disk_cached_bytes_per_s=1e5,
    flops={"float32": {1: 1e12}},
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("model")
    save("olmoe", folder)
    return facts_of(folder)[1]


def row(peer: str, sample: dict[str, Any], threads: int = 1, precision: str = "native", mode: Any = "exact") -> Row:
    contender = Contender("emoe", mode=mode) if peer == "emoe" else None
    return Row(Entry(peer, "x", precision, threads, "", contender), MemoryLimit("40%", 9), samples={0: sample})


def sample(step_s: float, read: float, storage: float, counts: bool) -> dict[str, Any]:
    def phase(experts: int) -> dict[str, float]:
        return {"hits": experts - 1.0, "misses": 1.0, "bytes_read": read} if counts else {}

    return {
        "first_token_s": 10.0,
        "step_s": [step_s] * STEPS,
        "prefill_storage_bytes": storage,
        "decode_storage_bytes": storage,
        "prefill": phase(6),
        "decode": phase(4 * STEPS),
    }


def test_memory_bounds_what_misses_nothing(facts: Facts) -> None:
    one, two = (row("emoe", sample(0.5, 0, 0, True), threads) for threads in (1, 2))
    limits_of([one, two], {"native": facts}, MACHINE, PROMPT)
    dense = ModelWork(facts).dense_read_bytes() + facts.cache_bytes(PROMPT + STEPS // 2, 1)
    least = (dense + 4 * EXPERT) / 1e6
    assert one.limits["decode"].floor.bound_by == "memory"
    assert one.limits["decode"].floor.seconds == pytest.approx(least)
    assert one.limits["decode"].share == pytest.approx(least / 0.5)
    assert two.limits["decode"].share == pytest.approx(least / 2 / 0.5)


@pytest.mark.parametrize(("storage", "rate"), [(8 * EXPERT, 1e4), (0, 1e5)])
def test_emoe_is_bound_by_the_bytes_that_it_counts_over_the_way_they_came(
    facts: Facts, storage: float, rate: float
) -> None:
    found = row("emoe", sample(20, 8 * EXPERT, storage, True))
    limits_of([found], {"native": facts}, MACHINE, PROMPT)
    assert found.limits["decode"].floor.bound_by == "link"
    assert found.limits["decode"].share == pytest.approx(8 * EXPERT / STEPS / rate / 20)
    assert found.limits["prefill"].share == pytest.approx(8 * EXPERT / rate / 10)


def test_others_are_bound_by_what_storage_gave_them(facts: Facts) -> None:
    """Whatever it was: an engine that reads a file twice has twice the work."""
    emoe, other = row("emoe", sample(1, 0, 0, True)), row("llama.cpp", sample(100, 0, 40 * EXPERT, False))
    limits_of([emoe, other], {"native": facts}, MACHINE, PROMPT)
    assert other.limits["decode"].floor.link_s == pytest.approx(10 * EXPERT / 1e4)
    assert other.limits["decode"].share == pytest.approx(10 * EXPERT / 1e4 / 100)
    assert other.limits["prefill"].floor.link_s == pytest.approx(40 * EXPERT / 1e4)
    # The same tokens, so the same experts.
    assert other.limits["prefill"].floor.memory_s == emoe.limits["prefill"].floor.memory_s
    assert other.limits["decode"].floor.memory_s == emoe.limits["decode"].floor.memory_s


def test_nobody_knows_what_a_prompt_routes_to_unless_emoe_counted_it(facts: Facts) -> None:
    lossy, other = row("emoe", sample(1, 0, 0, True), mode="resident"), row("llama.cpp", sample(9, 0, 0, False))
    limits_of([lossy, other], {"native": facts}, MACHINE, PROMPT)
    assert lossy.limits.keys() == {"decode", "prefill"}
    assert other.limits.keys() == {"decode"}


def test_quantised_experts_have_their_own_bytes(facts: Facts) -> None:
    def bytes_of(peer: str, precision: str) -> int:
        return facts_of_entry(Entry(peer, "", precision, 1, ""), facts).expert_layers[0].expert_nbytes

    assert bytes_of("llama.cpp", "native") == bytes_of("emoe", "int8") == EXPERT
    assert bytes_of("llama.cpp", "int8") == EXPERT // 4 * 34 // 32
    assert bytes_of("llama.cpp", "int4") == EXPERT // 4 * 18 // 32


def test_the_gguf_package_says_the_same_of_its_blocks(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from emoe.bench.peers.entries import LLAMA_EXPERT_BYTES, LLAMA_PRECISIONS

    for dtype, weight in LLAMA_EXPERT_BYTES.items():
        elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[LLAMA_PRECISIONS[dtype].upper()]]
        assert nbytes / elements == weight


def test_a_rate_that_is_not_known_is_told(facts: Facts) -> None:
    no_disk = Machine({}, memory_bytes_per_s={1: 1e6}, flops={"float32": {1: 1e12}})
    with pytest.raises(UsageError, match="'direct' loads was not measured"):
        limits_of([row("emoe", sample(1, 5, 5, True))], {"native": facts}, no_disk, PROMPT)
