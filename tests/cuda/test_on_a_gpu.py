"""On a real CUDA device: exact at every budget, copies in order whatever is delayed, nothing waits that need not."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import emoe
from emoe.config import ExpertMemory
from emoe.residency.devices import CudaDevice
from tests.families import make_checkpoint
from tests.model.test_exact import logits_of
from tests.residency import test_transfers as pools

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
_sleep: Any = torch.cuda._sleep
WAITED = "called a synchronizing CUDA operation"
"""What torch says of a call that waits; once in a process it also says that this is a prototype."""
NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def inputs_of(seed: int, batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def delayed(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Copies and computing start late, at random: up to a millisecond each."""
    dice, copy, used = random.Random(seed), CudaDevice.copy, CudaDevice.used

    def slow_copy(self: CudaDevice, *args: Any, ahead: bool) -> Any:
        with torch.cuda.stream(self._streams[ahead]):
            _sleep(dice.randrange(1_500_000))
        return copy(self, *args, ahead=ahead)

    def slow_used(self: CudaDevice, memories: Sequence[torch.Tensor]) -> Any:
        _sleep(dice.randrange(500_000))
        return used(self, memories)

    monkeypatch.setattr(CudaDevice, "copy", slow_copy)
    monkeypatch.setattr(CudaDevice, "used", slow_used)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_exact_is_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_checkpoint(name, tmp_path, seed=3, dtype=dtype)
    whole, _ = emoe.load(path, device_map="cuda")
    stats = emoe.stats(whole)
    floor, total = stats["floor_bytes"], stats["total_expert_bytes"]
    cases: list[tuple[float, Any, Any]] = [
        (0.0, 0, None),
        (0.2, "auto", None),
        (0.4, "50%", "next-gate"),
        (0.6, "auto", None),
    ]
    for at, host, prefetch in cases:
        budget = ExpertMemory("bytes", int(floor + at * (total - floor)))
        model, _ = emoe.load(path, device_map="cuda", expert_memory=budget, host_memory=host, prefetch=prefetch)
        for seed, (batch, length) in enumerate(((1, 40), (3, 9), (1, 1))):
            inputs = inputs_of(seed, batch, length)
            for ours, theirs in zip(logits_of(model, inputs, 8), logits_of(whole, inputs, 8), strict=True):
                assert torch.equal(ours, theirs)
        found = emoe.stats(model)
        assert found["devices"] == ["cuda:0"] and found["host"]["pinned"], found["host"]
        assert found["bytes_copied"] > 0
        emoe.close(model)
    emoe.close(whole)


@pytest.mark.parametrize("host", [0, "30%", "100%"])
def test_delays_change_nothing(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint("mixtral", tmp_path, seed=4, dtype=torch.bfloat16)
    whole, _ = emoe.load(path, device_map="cuda")
    expected = [logits_of(whole, inputs_of(seed, 1 + seed % 2, 12), 8) for seed in range(4)]
    delayed(monkeypatch, seed=1)
    model, _ = emoe.load(path, device_map="cuda", expert_memory="30%", host_memory=host, prefetch="next-gate")
    for seed, logits in enumerate(expected):
        for ours, theirs in zip(logits_of(model, inputs_of(seed, 1 + seed % 2, 12), 8), logits, strict=True):
            assert torch.equal(ours, theirs)
    emoe.close(model)
    emoe.close(whole)


@pytest.mark.parametrize("seed", range(3))
def test_every_slot_holds_its_expert_under_delays(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compute sees of a slot, gathered on the device without waiting and looked at in the end."""
    delayed(monkeypatch, seed)
    pool, _ = pools.make_on(CudaDevice(torch.device("cuda")), 4, 6, threads=2)
    rng, seen = random.Random(seed), []
    for _ in range(60):
        pool.table.begin_pass()
        layer = rng.randrange(2)
        pool.prefetches.poll()
        pool.prefetches.ask([(1 - layer, rng.randrange(8))], 2)
        if rng.random() < 0.5:
            experts = rng.sample(range(8), 2)
            slots = pool.take(layer, experts)
            seen += [
                (pool.bank.views[slot]["w"] == pools.number((layer, e))).all()
                for slot, e in zip(slots, experts, strict=True)
            ]
            pool.release(slots)
        else:
            for wave in pool.stream(layer, rng.sample(range(8), 5), prefill=True, together=rng.random() < 0.5):
                seen += [(pool.bank.views[slot]["w"] == pools.number((layer, e))).all() for e, slot in wave]
    assert all(torch.stack(seen).tolist())
    pool.prefetches.cancel()
    pool.close()


def test_memory_that_cannot_be_pinned_is_said_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint("mixtral", tmp_path, seed=4, dtype=torch.bfloat16)
    whole, _ = emoe.load(path, device_map="cuda")
    monkeypatch.setattr(CudaDevice, "_register", lambda self, memory: "refused by the test")
    model, _ = emoe.load(path, device_map="cuda", expert_memory="30%")
    for ours, theirs in zip(
        logits_of(model, inputs_of(0, 1, 9), 4), logits_of(whole, inputs_of(0, 1, 9), 4), strict=True
    ):
        assert torch.equal(ours, theirs)
    host = emoe.stats(model)["host"]
    assert not host["pinned"] and "refused by the test" in host["notice"]
    emoe.close(model)
    emoe.close(whole)


def test_a_refused_registration_leaves_no_error_behind() -> None:
    device = CudaDevice(torch.device("cuda"))
    held = device.host(1 << 20)
    assert held.pinned
    assert device._register(held.memory[:4096]) is not None  # registered already
    torch.ones(8, device="cuda").sum().item()
    device.free_host(held)
    again = device.host(1 << 20)
    assert again.pinned
    device.free_host(again)


def waits_of_a_token(model: Any) -> int:
    """How often torch waits for the device in one decode step of a warm model."""
    with torch.inference_mode():
        for seed in range(12):
            model(**inputs_of(seed, 1, 24))
        out = model(**inputs_of(0, 1, 24), use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return sum(WAITED in str(each.message) for each in caught)


def test_where_the_host_has_everything_a_budget_adds_no_waits(tmp_path: Path) -> None:
    """What waits is each layer's route, which the host has to know; loads and kernels are issued blindly."""
    path = make_checkpoint("mixtral", tmp_path, seed=4, dtype=torch.bfloat16)
    whole, _ = emoe.load(path, device_map="cuda")
    model, _ = emoe.load(path, device_map="cuda", expert_memory="30%", host_memory="100%")
    waits_of_a_token(model)
    before = emoe.stats(model)
    assert waits_of_a_token(model) <= waits_of_a_token(whole)
    after = emoe.stats(model)
    assert after["bytes_copied"] > before["bytes_copied"] and after["bytes_read"] == before["bytes_read"]
    assert after["synchronisations"] == before["synchronisations"]
    emoe.close(model)
    emoe.close(whole)


def test_a_captured_graph_sees_what_the_slots_hold_now() -> None:
    """Banks never move, so a graph may keep their addresses while experts come and go."""
    pool, _ = pools.make_on(CudaDevice(torch.device("cuda")), 2, 6)
    slots = pool.take(0, [0, 1])
    views = [pool.bank.views[slot]["w"] for slot in slots]
    total = sum(view.sum() for view in views)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        total = sum(view.sum() for view in views)
    pool.release(slots)
    for experts in ([2, 3], [4, 5], [0, 7]):
        slots = pool.take(0, experts)
        graph.replay()
        expected = sum(pools.number((0, e)) for e in experts) * views[0].numel()
        assert isinstance(total, torch.Tensor) and float(total) == expected
        pool.release(slots)
    pool.close()


def test_hybrid_is_close_to_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emoe.model import placement
    from emoe.model.hybrid import Costs

    path = make_checkpoint("qwen3_moe", tmp_path, seed=4)
    monkeypatch.setattr(placement, "measure", lambda *args: Costs(1.0, 0.0, 0.0))
    model, _ = emoe.load(path, device_map="cuda", expert_memory="30%", host_memory="100%", on_miss="hybrid")
    whole, _ = emoe.load(path, device_map="cuda")
    for ours, theirs in zip(
        logits_of(model, inputs_of(0, 1, 9), 8), logits_of(whole, inputs_of(0, 1, 9), 8), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert emoe.stats(model)["hybrid"]["computed"] > 0
    emoe.close(model)
    emoe.close(whole)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_spread_over_gpus(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path, seed=4, dtype=torch.bfloat16)
    places = {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 1, "model.rotary_emb": 0}
    places |= {f"model.layers.{layer}": layer % 2 for layer in range(3)}
    whole, _ = emoe.load(path, device_map="cuda")
    model, _ = emoe.load(path, device_map=places, expert_memory="60%")
    assert emoe.stats(model)["devices"] == ["cuda:0", "cuda:1"]
    for ours, theirs in zip(
        logits_of(model, inputs_of(0, 2, 9), 4), logits_of(whole, inputs_of(0, 2, 9), 4), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs.cpu())
    emoe.close(model)
    emoe.close(whole)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_experts_of_a_layer_spread_over_gpus(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path, seed=4, dtype=torch.bfloat16)
    whole, _ = emoe.load(path, device_map="cuda:0")
    names = ("cuda:0", "cuda:1")
    model, _ = emoe.load(
        path, device_map="cuda:0", expert_devices=names, spread="always", expert_memory="60%", host_memory="100%"
    )
    assert emoe.stats(model)["devices"] == list(names)
    for seed, (batch, length) in enumerate(((2, 9), (1, 40), (1, 1))):
        inputs = inputs_of(seed, batch, length)
        for ours, theirs in zip(logits_of(model, inputs, 4), logits_of(whole, inputs, 4), strict=True):
            assert torch.equal(ours, theirs)
    emoe.close(model)
    emoe.close(whole)
