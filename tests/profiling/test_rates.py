"""How a rate is timed: on a clock that is given, and with the processor in a GPU's place."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch

from emoe.profiling import rates
from emoe.profiling.rates import gpu, memory_bytes_per_s, seconds_of, using_threads


def on_a_clock(monkeypatch: pytest.MonkeyPatch, took: list[float]) -> Callable[[], None]:
    """Work whose calls take so long, the first included, and the last for ever after."""
    clock = [0.0]
    left = iter(took)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(left, took[-1])

    return work


@pytest.mark.parametrize(
    ("took", "seconds", "found"),
    [
        ([9.0, 3.0, 1.0, 2.0, 8.0], 0.0, 1.0),  # three at least, the first of all not counted
        ([9.0, 3.0, 2.0, 2.5, 0.5, 8.0], 7.0, 2.0),  # until the time is over, at which none begins
        ([9.0, 3.0, 2.0, 2.5, 0.5, 8.0], 7.6, 0.5),
        ([1.0, *[5.0] * 8, 2.0, 1.0, 4.0], 43.0, 2.0),  # the fastest tenth's slowest: of ten, the second
    ],
)
def test_a_call_takes_what_the_fastest_tenth_takes(
    took: list[float], seconds: float, found: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seconds_of(on_a_clock(monkeypatch, took), seconds) == pytest.approx(found)


def test_threads_are_as_many_as_before_whatever_happens() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_memory_is_as_fast_as_the_better_loop_over_an_array_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large, a sixteenth of what is free, and never so small that it lies in a cache."""
    monkeypatch.setattr(rates, "ARRAY_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "LEAST_ARRAY_BYTES", 1 << 14)
    read: list[float] = []

    def timed(loop: Callable[[], torch.Tensor], seconds: float) -> float:
        read.append(float(loop()))
        return 0.5 if len(read) % 2 else 0.25

    monkeypatch.setattr(rates, "seconds_of", timed)
    for free, nbytes in ((1 << 40, 1 << 20), (1 << 22, 1 << 18), (1 << 10, 1 << 14)):
        monkeypatch.setattr(rates, "memory_room", lambda free=free: type("Room", (), {"available_bytes": free})())
        assert memory_bytes_per_s(1, 1.0) == nbytes / 0.25
        assert read[-2:] == [nbytes / 4] * 2, "each loop reads the whole array"


@pytest.mark.parametrize("pins", [True, False])
def test_a_gpus_rates_wait_for_what_was_given_to_it(pins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ARRAY_BYTES", 1 << 12), ("COPY_BYTES", 1 << 10), ("GPU_SIDE", 32)):
        monkeypatch.setattr(rates, name, value)
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    copied: list[bool] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        if not pins:
            raise RuntimeError("no locked memory")
        return tensor.clone()

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copied.append(non_blocking)
        return target

    def timed(work: Callable[[], object], seconds: float) -> float:
        before = len(waited)
        work()
        assert len(waited) == before + 1, "a GPU computes on after its program has returned"
        return random.Random(before).choice([0.5, 0.25])

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(rates, "seconds_of", timed)
    said: list[str] = []
    found = gpu("cpu", 1.0, said.append)
    seconds = iter([random.Random(number).choice([0.5, 0.25]) for number in range(9)])
    assert found.pinned_bytes_per_s == ((1 << 10) / next(seconds) if pins else None)
    assert found.pageable_bytes_per_s == (1 << 10) / next(seconds)
    assert found.bytes_per_s == (1 << 12) / next(seconds)
    assert list(found.flops)[:2] == ["float32", "bfloat16"]
    assert [found.flops[dtype] for dtype in found.flops] == [2 * 32**3 / next(seconds) for _ in found.flops]
    assert set(waited) == {"cpu"} and copied == [True] * (1 + pins) and len(said) == 2
