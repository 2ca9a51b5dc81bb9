"""The experts of a layer on several devices: the bits of one, and where it is left open never slower by the clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
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
from emoe.model.spreading import Spread, SpreadCosts, expected_most
from emoe.residency.pool import ExpertPool
from emoe.residency.table import SlotState
from emoe.residency.virtual import Program, VirtualDevice
from tests.families import make_checkpoint
from tests.model.test_exact import batch_of, logits_of

LINK = 1e9
NAMES = ("cpu", "cpu:1", "cpu:2")


class Machine:
    """Virtual devices under one program's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hop_s: float = 1e-6, memory: float = 1e10) -> None:
        self.devices: list[VirtualDevice] = []
        self._monkeypatch, self._hop_s, self._memory = monkeypatch, hop_s, memory

    def load(self, path: Path, devices: int, **options: Any) -> PreTrainedModel:
        """A model whose experts may use so many devices; the devices are those of the latest."""
        program = Program()
        self.devices = []

        def make(place: torch.device) -> VirtualDevice:
            device = VirtualDevice(LINK, memory_bytes_per_s=self._memory, hop_s=self._hop_s, program=program)
            self.devices.append(device)
            return device

        with self._monkeypatch.context() as patch:
            patch.setattr(placement, "device_at", make)
            names = None if devices == 1 else NAMES[:devices]
            return emoe.load(path, device_map="cpu", expert_devices=names, **options)[0]

    def seconds(self, model: PreTrainedModel, tokens: int, length: int = 1) -> float:
        """The clock's time for some passes."""

        def now() -> float:
            return max(self.devices[0].compute_s, self.devices[0].program_s)

        with torch.no_grad():
            for seed in range(6):
                model(batch_of(seed, 1, 12)["input_ids"])
            begun = now()
            for seed in range(tokens):
                model(batch_of(50 + seed, 1, length)["input_ids"])
        return now() - begun


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"), seed=2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "kernels"), [("mixtral", "auto"), ("mixtral", "torch"), ("gpt_oss", "torch"), ("deepseek_v3", "auto")]
)
def test_the_bits_are_those_of_one_device(
    name: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMOE_KERNELS", kernels)
    path = make_checkpoint(name, tmp_path, seed=3, dtype=torch.bfloat16)
    machine = Machine(monkeypatch)
    whole = machine.load(path, 1)
    total = emoe.stats(whole)["total_expert_bytes"]

    @settings(max_examples=5)
    @given(
        at=st.floats(0.5, 1),  # a layer's experts, which is the floor over three devices, are half of deepseek_v3's
        devices=st.integers(2, 3),
        host=st.sampled_from([0, "40%", "100%"]),
        batch=st.integers(1, 3),
        length=st.integers(1, 12),
        seed=st.integers(0, 10**6),
    )
    def check(at: float, devices: int, host: Any, batch: int, length: int, seed: int) -> None:
        budget = ExpertMemory("bytes", int(at * total))
        model = machine.load(path, devices, expert_memory=budget, host_memory=host, spread="always")
        for number in range(2):
            inputs = batch_of(seed + number, batch, length)
            for ours, theirs in zip(logits_of(model, inputs, 4), logits_of(whole, inputs, 4), strict=True):
                assert torch.equal(ours, theirs)
        stats = emoe.stats(model)
        layers = binding_of(model).runtime.layers.values()
        assert all(layer.spread is not None and len(layer.spread.shards) == devices for layer in layers)
        for layer, entry in stats["layers"].items():
            assert entry["experts"] == binding_of(model).runtime.layers[layer].experts
            assert len(set(entry["resident"])) == len(entry["resident"])
        assert stats["peak_resident_bytes"] <= stats["budget_bytes"] and stats["spread"].startswith("spread")
        emoe.close(model)

    check()
    emoe.close(whole)


def test_spread_misses_come_over_every_link_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies decide: two links take less than one; the model says by about how much."""
    machine = Machine(monkeypatch, hop_s=1e-7, memory=1e12)
    options: dict[str, Any] = {"expert_memory": "50%", "host_memory": "100%"}
    one = machine.load(path, 1, **options)
    alone_s, alone_prefill_s = machine.seconds(one, 40), machine.seconds(one, 10, 12)
    two = machine.load(path, 2, **options)
    assert emoe.stats(two)["spread"].startswith("spread")
    spread_s, spread_prefill_s = machine.seconds(two, 40), machine.seconds(two, 10, 12)
    assert all(device.copied_bytes > 0 for device in machine.devices)
    assert spread_s < 0.9 * alone_s and spread_prefill_s < 0.75 * alone_prefill_s
    emoe.close(one)
    emoe.close(two)


@pytest.mark.parametrize("hop_s", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("share", ["40%", "50%", "70%", "100%"])
def test_left_open_it_is_never_slower_than_one_device(
    path: Path, monkeypatch: pytest.MonkeyPatch, hop_s: float, share: str
) -> None:
    machine = Machine(monkeypatch, hop_s=hop_s)
    options: dict[str, Any] = {"expert_memory": share, "host_memory": "100%"}
    one = machine.load(path, 1, **options)
    alone_s = machine.seconds(one, 20)
    left = machine.load(path, 2, **options)
    spread = emoe.stats(left)["spread"]
    assert spread.startswith("not spread") == (hop_s == 1e-3 or share in ("40%", "100%")) or hop_s == 1e-5
    assert machine.seconds(left, 20) <= 1.001 * alone_s
    emoe.close(one)
    emoe.close(left)


def test_a_hop_costs_what_it_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: spread in any case, far devices are slower."""
    machine = Machine(monkeypatch, hop_s=1e-3)
    one = machine.load(path, 1, expert_memory="50%", host_memory="100%")
    alone_s = machine.seconds(one, 10)
    always = machine.load(path, 2, expert_memory="50%", host_memory="100%", spread="always")
    assert machine.seconds(always, 10) > 2 * alone_s
    emoe.close(one)
    emoe.close(always)


def test_a_read_error_leaves_nothing_pinned_on_any_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    model = machine.load(path, 2, expert_memory="50%", host_memory=0, spread="always")
    whole = machine.load(path, 1)
    reader: Any = binding_of(model).reader
    working, dice, failures = reader._pread, random.Random(0), 0

    def faulty(descriptor: int, buffers: Any, offset: int) -> int:
        if dice.random() < 0.1:
            raise OSError(5, "Input/output error")
        return int(working(descriptor, buffers, offset))

    with torch.no_grad():
        for seed in range(16):
            reader._pread = faulty
            try:
                model(batch_of(seed, 1, 1 + seed % 9)["input_ids"])
            except ReadError:
                failures += 1
            reader._pread = working
            for pool in binding_of(model).pools:
                assert all(slot.state.value in ("empty", "ready") for slot in pool.table.slots)
            ids = batch_of(seed, 1, 5)["input_ids"]
            assert torch.equal(model(ids).logits, whole(ids).logits)
    assert failures > 0
    emoe.close(model)
    emoe.close(whole)


def test_the_fullest_device_of_a_token() -> None:
    for k, devices in ((1, 2), (2, 2), (3, 2), (4, 3)):
        throws = list(itertools.product(range(devices), repeat=k))
        mean = sum(max(throw.count(d) for d in range(devices)) for throw in throws) / len(throws)
        assert expected_most(k, devices) == pytest.approx(mean)
    assert expected_most(8, 1) == 8
    costs = SpreadCosts(link_s=1.0, hop_s=0.25)
    assert costs.saved_s(2, 2, 1.0) == pytest.approx(0.25) and costs.saved_s(2, 2, 0.0) == -0.25


def test_what_spreading_does_not_do_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"mode": "resident"}, {"prefetch": "next-gate"}, {"eviction": "next-use"}):
        with pytest.raises(UsageError, match="expert devices"):
            emoe.load(path, expert_devices=NAMES, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one of auto, always"):
        emoe.load(path, spread="never")
    with pytest.raises(UsageError, match="each named once"):
        emoe.load(path, expert_devices=("cpu", "cpu"))
    with pytest.raises(UsageError, match="put them on one of the expert devices"):
        emoe.load(path, expert_devices=("cpu:1", "cpu:2"))


def test_every_shards_slots_come_back_whatever_ending_one_raises(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Machine(monkeypatch).load(path, 3, expert_memory="60%", host_memory="100%", spread="always")
    stream = ExpertPool.stream

    class Odd:
        """A stream that says something as it ends."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._stream: Any = stream(*arguments, **options)

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            return next(self._stream)

        def close(self) -> None:
            self._stream.close()
            raise OSError("at its end")

    def odd(*arguments: Any, **options: Any) -> Odd:
        return Odd(*arguments, **options)

    def failing(*_: object) -> torch.Tensor:
        raise ValueError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(ExpertPool, "stream", odd)
        patch.setattr(Spread, "_rows", failing)
        with pytest.raises(OSError, match="at its end") as caught:  # it keeps the frames, and so the streams
            logits_of(model, batch_of(0, 1, 12), 1)
    slots = [slot for pool in binding_of(model).pools for slot in pool.table.slots]
    assert caught.value.__context__ is not None
    assert slots and all(slot.state in (SlotState.EMPTY, SlotState.READY) for slot in slots)
    emoe.close(model)
