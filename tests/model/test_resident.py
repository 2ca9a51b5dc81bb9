"""Mode `resident`: nothing waits after the prompt, only residents run, and it says that it is lossy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import emoe
from emoe.errors import BudgetError, UnsupportedModelError, UsageError
from emoe.model.bind import binding_of
from emoe.routing.rules import registry
from tests.families import make_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3"), seed=5, num_experts=16)


def prompt(seed: int, length: int = 12, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_with_every_expert_resident_it_is_the_exact_model(path: Path) -> None:
    exact, _ = emoe.load(path)
    resident, _ = emoe.load(path, mode="resident")
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(exact(prompt(seed)).logits, resident(prompt(seed)).logits)
    report = emoe.stats(resident)
    assert report["lossy"] is True
    assert report["rerouted_tokens"] == 0
    assert report["hit_rate"] == 1.0


@settings(max_examples=15)
@given(st.integers(4, 15), st.integers(0, 1000), st.integers(1, 3), st.integers(2, 20))
def test_decode_never_reads_and_runs_only_residents(path: Path, per_layer: int, seed: int, batch: int, n: int) -> None:
    model, _ = emoe.load(path, mode="resident", expert_memory=f"{per_layer}/layer")
    routes: list[tuple[int, list[int]]] = []
    for layer in binding_of(model).runtime.layers.values():
        pool = layer.pool
        original = pool._start

        def start(number: int, expert: int, slot: int, original: Any = original, **more: Any) -> object:
            routes.append((number, [expert]))
            return original(number, expert, slot, **more)

        pool._start = start  # type: ignore[assignment,method-assign]
        break
    with torch.no_grad():
        out = model(prompt(seed, n, batch), use_cache=True)
        read = emoe.stats(model)["bytes_read"]
        loads = len(routes)
        for _ in range(4):
            step = out.logits[:, -1:].argmax(-1)
            out = model(step, past_key_values=out.past_key_values, use_cache=True)
            assert not out.logits.isnan().any()
    report = emoe.stats(model)
    assert report["bytes_read"] == read and len(routes) == loads
    assert report["peak_resident_bytes"] <= report["budget_bytes"]
    emoe.close(model)


@settings(max_examples=15)
@given(st.integers(4, 15), st.integers(0, 1000))
@example(9, 197)  # a resident that was to make room was routed to later in the same chunk
def test_a_planning_prompt_runs_its_own_routes_and_leaves_what_it_routed_most(
    path: Path, per_layer: int, seed: int
) -> None:
    exact, _ = emoe.load(path)
    model, _ = emoe.load(path, mode="resident", expert_memory=f"{per_layer}/layer")
    counts: dict[int, torch.Tensor] = {}

    def count(now: object, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        counts[layer] = torch.bincount(ids.reshape(-1), minlength=16)

    binding_of(model).runtime.observers.append(count)
    with torch.no_grad():
        for k in range(3):  # the second and third find other prompts' experts there
            tokens = prompt(seed + k, 20)
            assert torch.equal(model(tokens).logits, exact(tokens).logits)
            for layer, entry in emoe.stats(model)["layers"].items():
                used = [e for e in counts[layer].argsort(descending=True, stable=True).tolist() if counts[layer][e]]
                assert set(used[: entry["slots"]]) <= set(entry["resident"])
    assert emoe.stats(model)["rerouted_tokens"] == 0
    emoe.close(model)


def test_prompts_between_two_plans_read_nothing(path: Path) -> None:
    model, _ = emoe.load(path, mode="resident", expert_memory="6/layer", replan_prompts=3)
    read = []
    with torch.no_grad():
        for seed in range(7):
            model(prompt(seed, 16))
            read.append(emoe.stats(model)["bytes_read"])
    grew = [after > before for before, after in zip([0, *read], read, strict=False)]
    assert grew == [True, False, False, True, False, False, True]
    assert emoe.stats(model)["rerouted_tokens"] > 0


def test_a_family_without_a_rule_is_refused_and_works_in_exact(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.ENTRIES, "qwen3_moe.Qwen3MoeTopKRouter")
    with pytest.raises(UnsupportedModelError, match="exact"):
        emoe.load(path, mode="resident", expert_memory="50%")
    model, _ = emoe.load(path, expert_memory="50%")
    assert emoe.stats(model)["mode"] == "exact"


def test_a_budget_that_cannot_hold_one_token_per_layer_is_refused_with_the_least(path: Path) -> None:
    expert = emoe.stats(emoe.load(path)[0])["total_expert_bytes"] // 48
    least = (3 * 3 + 1) * expert  # 3 layers of top-3, and one to read a planning prompt through
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        emoe.load(path, mode="resident", expert_memory=least - 1)
    emoe.load(path, mode="resident", expert_memory=least)


def test_arguments_that_cannot_be_meant_are_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="no mode is called 'fast'"):
        emoe.load(path, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no eviction rule is called 'fifo'"):
        emoe.load(path, eviction="fifo")
    with pytest.raises(UsageError, match="replan_prompts is 0"):
        emoe.load(path, replan_prompts=0)
    with pytest.raises(UsageError, match="quantization_config"):
        emoe.load(path, quantization_config={})
