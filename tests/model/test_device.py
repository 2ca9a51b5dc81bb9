"""Models on a device that is reached by copies: the same bits as on the CPU, for any budget, host tier and delay."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import emoe
from emoe.config import ExpertMemory
from emoe.errors import ReadError, UsageError
from emoe.model import placement
from emoe.model.bind import binding_of
from emoe.model.hybrid import Costs
from emoe.residency.virtual import VirtualDevice, Waits
from tests.families import NOT_ASKED, make_checkpoint
from tests.model.test_exact import batch_of, logits_of

LINK = 1e9


class Virtual:
    """Puts models on virtual devices, listed as they are made; `layers` names each layer's place, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices: list[VirtualDevice] = []
        self._monkeypatch = monkeypatch

    def load(self, path: Path, *, pinning: bool = True, places: int = 1, **options: Any) -> PreTrainedModel:
        """A model whose layers lie on `places` devices by turns."""
        turns = itertools.count()

        def make(place: torch.device) -> VirtualDevice:
            self.devices.append(VirtualDevice(LINK, latency_s=1e-5, pinning=pinning))
            return self.devices[-1]

        with self._monkeypatch.context() as patch:
            patch.setattr(placement, "device_at", make)
            patch.setattr(placement, "device_of", lambda module: torch.device("cpu", next(turns) % places))
            return emoe.load(path, device_map="cpu", **options)[0]


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Virtual:
    return Virtual(monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"), seed=2, dtype=torch.bfloat16)


def sound(model: PreTrainedModel) -> dict[str, Any]:
    """Invariants 2 and 3 on a device: what was read, and what went over the link, is the sum of the loads."""
    stats = emoe.stats(model)
    binding = binding_of(model)
    for layer, entry in stats["layers"].items():
        reads = entry["loads"] - entry["host_hits"]
        assert entry["bytes_read"] == reads * binding.index.stored_nbytes(layer, 0)
        pool = next(pool for pool in binding.pools if layer in pool.table.experts)
        assert entry["bytes_copied"] == entry["loads"] * pool.bank.slot_nbytes
    assert stats["peak_resident_bytes"] <= stats["budget_bytes"]
    for pool in binding.pools:
        assert pool.transfers is not None
        assert pool.transfers.host.reading == sum(
            slot.state.value == "loading" for slot in pool.transfers.host.table.slots
        )
    return stats


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "jamba"])
def test_exact_is_bit_identical_on_a_device(name: str, tmp_path: Path, virtual: Virtual) -> None:
    path = make_checkpoint(name, tmp_path, seed=3, dtype=torch.bfloat16)
    whole, _ = emoe.load(path)
    floor, total = emoe.stats(whole)["floor_bytes"], emoe.stats(whole)["total_expert_bytes"]

    @settings(max_examples=8)
    @given(
        at=st.one_of(st.just(0.0), st.floats(0, 1)),
        host=st.sampled_from([0, "auto", "20%", "60%"]),
        prefetch=st.sampled_from([None] if name in NOT_ASKED else [None, "next-gate"]),
        batch=st.integers(1, 3),
        length=st.integers(1, 12),
        seed=st.integers(0, 10**6),
        slow=st.booleans(),
    )
    def check(at: float, host: Any, prefetch: Any, batch: int, length: int, seed: int, slow: bool) -> None:
        model = virtual.load(
            path,
            expert_memory=ExpertMemory("bytes", int(floor + at * (total - floor))),
            host_memory=host,
            prefetch=prefetch,
            max_read_bytes_per_s=2e7 if slow else None,
        )
        for number in range(2):
            inputs = batch_of(seed + number, batch, length)
            for ours, theirs in zip(logits_of(model, inputs, 4), logits_of(whole, inputs, 4), strict=True):
                assert torch.equal(ours, theirs)
        sound(model)
        emoe.close(model)

    check()
    emoe.close(whole)


def test_the_whole_on_the_host_is_read_once(path: Path, virtual: Virtual) -> None:
    model = virtual.load(path, expert_memory="30%", host_memory="100%")
    with torch.no_grad():
        for seed in range(12):
            model(batch_of(seed, 1, 12)["input_ids"])
    stats = sound(model)
    index, keys = binding_of(model).index, binding_of(model).index.keys()
    assert stats["bytes_read"] == sum(index.stored_nbytes(*key) for key in keys)
    assert stats["host"]["hits"] > 0 and stats["host"]["misses"] == len(keys)
    assert stats["host"]["resident_bytes"] == stats["total_expert_bytes"]
    emoe.close(model)
    assert emoe.stats(model)["host"]["held_bytes"] == 0


def test_where_the_host_has_everything_nothing_waits_for_a_copy(path: Path, virtual: Virtual) -> None:
    model = virtual.load(path, expert_memory="30%", host_memory="100%")
    with torch.no_grad():
        for seed in range(12):
            model(batch_of(seed, 1, 12)["input_ids"])
        before = virtual.devices[0].synchronisations
        for seed in range(12):
            model(batch_of(seed, 1, 12)["input_ids"])
            model(batch_of(seed, 1, 1)["input_ids"])
    assert virtual.devices[0].synchronisations == before
    assert virtual.devices[0].copied_bytes > 0
    emoe.close(model)


def test_where_the_device_has_everything_nothing_is_copied_or_marked(path: Path, virtual: Virtual) -> None:
    model, (whole, _) = virtual.load(path), emoe.load(path)
    before, begun = emoe.stats(model), virtual.devices[0].compute_s
    assert before["bytes_copied"] == before["total_expert_bytes"] and before["host"]["slots"] < before["slots"]
    for seed in range(3):
        inputs = batch_of(seed, 2, 9)
        for ours, theirs in zip(logits_of(model, inputs, 4), logits_of(whole, inputs, 4), strict=True):
            assert torch.equal(ours, theirs)
    after = emoe.stats(model)
    assert after["bytes_copied"] == before["bytes_copied"] and after["misses"] == 0
    assert after["synchronisations"] == before["synchronisations"] and virtual.devices[0].compute_s == begun
    emoe.close(model)
    emoe.close(whole)


def test_banks_never_move(path: Path, virtual: Virtual) -> None:
    """So that a captured graph may keep their addresses."""
    model = virtual.load(path, expert_memory="30%")
    bank = binding_of(model).pools[0].bank
    before = [view.data_ptr() for views in bank.views for view in views.values()]
    with torch.no_grad():
        for seed in range(5):
            model(batch_of(seed, 2, 9)["input_ids"])
    assert before == [view.data_ptr() for views in bank.views for view in views.values()]
    emoe.close(model)


def test_memory_that_cannot_be_pinned_is_said(path: Path, virtual: Virtual) -> None:
    model = virtual.load(path, expert_memory="30%", pinning=False)
    with torch.no_grad():
        model(batch_of(0, 1, 4)["input_ids"])
    host = emoe.stats(model)["host"]
    assert not host["pinned"] and "cannot pin" in host["notice"]
    emoe.close(model)


def test_a_read_error_ends_the_request_and_the_next_one_works(path: Path, virtual: Virtual) -> None:
    model = virtual.load(path, expert_memory="30%", host_memory=0)
    whole, _ = emoe.load(path)
    reader: Any = binding_of(model).reader
    working = reader._pread
    dice = random.Random(0)

    def faulty(descriptor: int, buffers: Any, offset: int) -> int:
        if dice.random() < 0.05:
            raise OSError(5, "Input/output error")
        return int(working(descriptor, buffers, offset))

    failures = 0
    with torch.no_grad():
        for seed in range(20):
            reader._pread = faulty
            try:
                model(batch_of(seed, 1, 1 + seed % 9)["input_ids"])
            except ReadError:
                failures += 1
            reader._pread = working
            ids = batch_of(seed, 1, 5)["input_ids"]
            assert torch.equal(model(ids).logits, whole(ids).logits)
    assert failures > 0
    sound(model)
    emoe.close(model)
    emoe.close(whole)


def test_host_memory_is_refused_on_the_cpu(path: Path) -> None:
    with pytest.raises(UsageError, match="run on the CPU"):
        emoe.load(path, host_memory="1GiB")
    with pytest.raises(UsageError, match="run on the CPU"):
        emoe.load(path, host_memory="auto", device_map="cpu")
    with pytest.raises(UsageError, match="as host memory"):
        emoe.load(path, host_memory="much")
    model, _ = emoe.load(path, host_memory=0)
    assert emoe.stats(model)["host"] is None
    emoe.close(model)


def test_a_device_that_is_not_there_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    placement.check_device_map("cuda:0")
    with pytest.raises(UsageError, match=r"there is no device 'cuda:1': .* finds 1 CUDA devices"):
        emoe.load(path, device_map="cuda:1")
    with pytest.raises(UsageError, match="no device is called 'gpu': choose cpu"):
        emoe.load(path, device_map="gpu")
    for known in ("auto", "cpu", {"": "cuda:7"}, None):
        placement.check_device_map(known)
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    placement.check_device_map(None)
    with pytest.raises(UsageError, match="pip install accelerate"):
        placement.check_device_map("cpu")


def test_layers_spread_over_devices(path: Path, virtual: Virtual) -> None:
    """Each layer's experts live where the layer does; the budget is split, and nothing changes in the result."""
    model = virtual.load(path, expert_memory="60%", host_memory="50%", places=2)
    whole, _ = emoe.load(path)
    pools = binding_of(model).pools
    assert len(pools) == len(virtual.devices) == 2
    assert [sorted(pool.table.experts) for pool in pools] == [[0, 2], [1]]
    assert sum(pool.bank.nbytes for pool in pools) <= emoe.stats(model)["budget_bytes"]
    for seed in range(3):
        inputs = batch_of(seed, 2, 9)
        for ours, theirs in zip(logits_of(model, inputs, 4), logits_of(whole, inputs, 4), strict=True):
            assert torch.equal(ours, theirs)
    sound(model)
    assert all(device.copied_bytes > 0 for device in virtual.devices)
    emoe.close(model)
    emoe.close(whole)


@pytest.mark.parametrize(("cpu_s", "computes"), [(0.0, True), (1.0, False)])
def test_hybrid_computes_misses_on_the_cpu_where_that_is_faster(
    path: Path, virtual: Virtual, monkeypatch: pytest.MonkeyPatch, cpu_s: float, computes: bool
) -> None:
    monkeypatch.setattr(placement, "measure", lambda *args: Costs(link_s=1e-3, cpu_s=cpu_s, rows_s=1e-5))
    model = virtual.load(path, expert_memory="40%", host_memory="100%", on_miss="hybrid")
    whole, _ = emoe.load(path)
    for seed in range(4):
        inputs = batch_of(seed, 1, 12)
        for ours, theirs in zip(logits_of(model, inputs, 12), logits_of(whole, inputs, 12), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)  # here, bits differ by vector ends at most
    stats = sound(model)
    assert (stats["hybrid"]["computed"] > 0) == computes
    assert "CPU arithmetic" in stats["hybrid"]["label"]
    emoe.close(model)
    emoe.close(whole)


def test_hybrid_measures_by_itself(path: Path, virtual: Virtual) -> None:
    model = virtual.load(path, expert_memory="40%", host_memory="100%", on_miss="hybrid")
    hybrid = emoe.stats(model)["hybrid"]
    assert hybrid["link_s"] > 0 and hybrid["cpu_s"] > 0 and hybrid["rows_s"] > 0
    emoe.close(model)


def test_the_rule_weighs_times() -> None:
    costs = Costs(link_s=3.0, cpu_s=1.0, rows_s=4.0)
    assert [costs.cpu_is_faster(n) for n in range(5)] == [False, False, False, True, True]


def test_hybrid_is_refused_where_it_cannot_be_meant(path: Path, virtual: Virtual) -> None:
    with pytest.raises(UsageError, match="beside a GPU"):
        emoe.load(path, on_miss="hybrid")
    with pytest.raises(UsageError, match="beside a GPU"):
        virtual.load(path, on_miss="hybrid", mode="resident")
    with pytest.raises(UsageError, match="one of load, hybrid"):
        virtual.load(path, on_miss="guess")


def waits_of(model: PreTrainedModel, length: int, device: VirtualDevice) -> tuple[list[str], int, int]:
    """What a pass over `length` tokens makes a program wait for in emoe's part, routes asked for, and MoE layers."""
    runtime, found = binding_of(model).runtime, Waits()
    run, note = runtime.run, runtime.note_route

    def counted(work: Any) -> Any:
        def call(*args: Any) -> Any:
            with found:
                return work(*args)

        return call

    setattr(runtime, "run", counted(run))  # noqa: B010
    setattr(runtime, "note_route", counted(note))  # noqa: B010
    before = device.fetches
    try:
        with torch.no_grad():
            model(batch_of(3, 1, length)["input_ids"])
    finally:
        del runtime.run, runtime.note_route
    return found.found, device.fetches - before, len(runtime.layers)


@pytest.mark.parametrize("length", [1, 24])
@pytest.mark.parametrize("options", [{}, {"eviction": "decayed"}, {"mode": "resident"}, {"on_miss": "hybrid"}], ids=str)
def test_a_layer_waits_once_for_its_route_and_for_nothing_else(
    path: Path, virtual: Virtual, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], length: int
) -> None:
    monkeypatch.setattr(placement, "measure", lambda *args: Costs(link_s=1e-3, cpu_s=0.0, rows_s=1e-5))
    model = virtual.load(path, expert_memory="50%", host_memory="100%", **options)
    with torch.no_grad():
        for seed in range(6):
            model(batch_of(seed, 1, 12)["input_ids"])
    device = virtual.devices[0]
    stops = device.synchronisations
    found, fetches, layers = waits_of(model, length, device)
    noted = layers if options.get("mode") == "resident" else 0  # counters, that come with the route
    assert not found and layers <= fetches <= layers + noted
    assert device.synchronisations == stops
    emoe.close(model)


def test_counting_waits_finds_them(path: Path, virtual: Virtual, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    model = virtual.load(path, expert_memory="50%", host_memory="100%")
    with torch.no_grad():  # else reads from disk into host memory are found, too
        for seed in range(6):
            model(batch_of(seed, 1, 12)["input_ids"])
    observers = binding_of(model).runtime.observers

    def waits(now: Any, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        weights.sum().item()

    observers.append(waits)
    found, _, layers = waits_of(model, 24, virtual.devices[0])
    assert found == ["item"] * layers
    emoe.close(model)


def test_the_numbers_of_a_rerouted_batch_are_those_of_a_cpu(path: Path, virtual: Virtual) -> None:
    """They come from the device with the route, and are counted later than on a CPU."""
    models = [
        virtual.load(path, expert_memory="50%", mode="resident"),
        emoe.load(path, expert_memory="50%", mode="resident")[0],
    ]
    with torch.no_grad():
        for model in models:
            for seed in range(4):
                model(batch_of(seed, 1, 12)["input_ids"], use_cache=False)
                out = model(batch_of(seed, 2, 5)["input_ids"])
                model(batch_of(seed, 2, 1)["input_ids"], past_key_values=out.past_key_values)
    names = ("hits", "misses", "rerouted_tokens", "routed_tokens")
    first, second = ({name: emoe.stats(model)[name] for name in names} for model in models)
    assert first == second and first["rerouted_tokens"] > 0
    for model in models:
        emoe.close(model)
