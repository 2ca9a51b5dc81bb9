"""Where experts run: what a pool needs from a device, and the two kinds there are.

On a CPU a bank is memory that readers fill themselves. On any other device experts are copied from host memory beside
the computation, and what runs on the device waits for the arrival, not the program that issues it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from emoe.errors import BudgetError, UnsupportedModelError
from emoe.kernels.fetching import at_once
from emoe.kernels.pages import prefer_huge_pages
from emoe.residency.budget import DIRECT_ALIGN_BYTES

_log = logging.getLogger(__name__)

PAGE_BYTES = 4096
_CUDA_HOST_REGISTER_PORTABLE = 1


class Mark(Protocol):
    """A moment in what a device was given to do: the end of a copy, or the last use of a slot."""

    def query(self) -> bool:
        """Whether it has passed."""
        ...

    def synchronize(self) -> None:
        """Return once it has passed."""
        ...


@dataclass(slots=True)
class HostMemory:
    """Host memory that a device copies from. `notice` says why it is not pinned where it was to be."""

    memory: torch.Tensor
    pinned: bool = False
    notice: str = ""


class Device(Protocol):
    """What a pool needs from where its experts run.

    Computing is one sequence of work (a CUDA device's current stream); copies go beside it. Methods may be called by
    any thread; `wait` and `used` speak of the work that the calling thread has issued.

    Attributes:
        place: the torch device of a bank's memory.
        copies: experts reach a bank by copies from host memory; otherwise readers fill it themselves.
        synchronisations: how often the program has stood still for a copy.
        fetches: how often it has asked for a result: routes, which it has to know.
    """

    place: torch.device
    copies: bool
    synchronisations: int
    fetches: int

    def bank(self, nbytes: int) -> torch.Tensor:
        """Allocate uint8 memory that kernels read weights from, aligned to a cache line.

        Raises:
            BudgetError: there is not that much memory.
        """
        ...

    def host(self, nbytes: int) -> HostMemory:
        """Allocate uint8 host memory to copy from: pinned, or pageable where pinning fails, which is said.

        Raises:
            BudgetError: there is not that much memory.
        """
        ...

    def free_host(self, held: HostMemory) -> None:
        """Give host memory back once no copy from it is under way."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark], *, ahead: bool) -> Mark:
        """Begin to copy host memory into a bank, or back, once the `after` have passed; return the arrival.

        Nothing waits for copies that are `ahead` of need, those in need do not queue behind them.
        """
        ...

    def wait(self, arrival: Mark) -> None:
        """Make what is computed from now on wait for a copy; the caller does not."""
        ...

    def used(self, memories: Sequence[torch.Tensor]) -> Mark:
        """Note that what has been given to compute so far is the last use of these slots."""
        ...

    def finish(self, mark: Mark) -> None:
        """Return once `mark` has passed: with `fetch`, all that makes the program wait."""
        ...

    def drain(self) -> None:
        """Return once all that it was given to do has been done: what was to be waited for is not known any more."""
        ...

    def fetch(self, *tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Begin to bring small results of computing to the program; what is returned waits for them and gives them."""
        ...

    def receive(self, rows: torch.Tensor, sender: Device) -> torch.Tensor:
        """Rows that another device has computed, here; what is computed from now on comes after them."""
        ...

    def clock(self) -> float:
        """Seconds, to measure copies by."""
        ...


def aligned(nbytes: int, device: torch.device, what: str, to: int = DIRECT_ALIGN_BYTES) -> torch.Tensor:
    """`nbytes` of uint8 memory that starts at a multiple of `to`.

    Raises:
        BudgetError: there is not that much memory.
    """
    try:
        with torch.inference_mode(False):  # made inside it, threads outside it could not write there
            raw = torch.empty(nbytes + to, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        raise BudgetError(
            f"{nbytes} bytes of {what} could not be allocated on {device}: {error}. Give a smaller budget."
        ) from error
    start = -raw.data_ptr() % to
    return raw[start : start + nbytes]


@dataclass(frozen=True, slots=True)
class Passed:
    """A mark of work that is done when it is issued."""

    def query(self) -> bool:
        """Always."""
        return True

    def synchronize(self) -> None:
        """At once."""


class CpuDevice:
    """The machine's own memory: slots are the destination of reads, and whatever is asked for is done at once."""

    copies = False

    def __init__(self, place: torch.device | None = None) -> None:
        """Stand for `place`."""
        self.place = torch.device("cpu") if place is None else place
        self.synchronisations = self.fetches = 0

    def bank(self, nbytes: int) -> torch.Tensor:
        """Allocate memory for slots, on huge pages where the system has them."""
        memory = aligned(nbytes, self.place, "expert memory")
        prefer_huge_pages(memory)
        return memory

    def host(self, nbytes: int) -> HostMemory:
        """Allocate memory."""
        return HostMemory(aligned(nbytes, self.place, "host memory"))

    def free_host(self, held: HostMemory) -> None:
        """Nothing is to be undone: the memory goes with its tensor."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark], *, ahead: bool) -> Mark:
        """Copy now."""
        target.copy_(source)
        return Passed()

    def wait(self, arrival: Mark) -> None:
        """It has arrived."""

    def used(self, memories: Sequence[torch.Tensor]) -> Mark:
        """What was given to compute has been computed."""
        return Passed()

    def finish(self, mark: Mark) -> None:
        """It has passed."""

    def drain(self) -> None:
        """All has been done."""

    def fetch(self, *tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """They are there."""
        return at_once(*tensors)

    def receive(self, rows: torch.Tensor, sender: Device) -> torch.Tensor:
        """Copy, if they are elsewhere."""
        return rows.to(self.place)

    def clock(self) -> float:
        """Seconds of the machine's clock."""
        return time.perf_counter()


class CudaDevice:
    """A CUDA device: copies on three side streams, ordered by events.

    Demand copies, copies ahead and copies back have a stream each, so that what is needed now does not queue behind a
    plan and both directions of the link are used. Streams wait for events; the host waits only in `finish`.
    """

    copies = True

    def __init__(self, place: torch.device) -> None:
        """Make the streams."""
        index = torch.cuda.current_device() if place.index is None else place.index
        self.place = torch.device("cuda", index)
        self.synchronisations = self.fetches = 0
        self._lock = threading.Lock()
        self._streams = {
            ahead: torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
            for ahead in (False, True)
        }
        self._back = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]

    def bank(self, nbytes: int) -> torch.Tensor:
        """Allocate device memory; copies into it come after whatever used that memory before."""
        memory = aligned(nbytes, self.place, "expert memory")
        for stream in (*self._streams.values(), self._back):
            stream.wait_stream(torch.cuda.current_stream(self.place))
            memory.record_stream(stream)  # freed, it is nobody else's before the copies under way have ended
        return memory

    def host(self, nbytes: int) -> HostMemory:
        """Allocate whole pages and register them with CUDA.

        torch's own pinned allocator rounds a request up to a power of two, which for gigabytes is up to twice as much.
        """
        memory = aligned(-(-nbytes // PAGE_BYTES) * PAGE_BYTES, torch.device("cpu"), "host memory", PAGE_BYTES)
        refusal = self._register(memory)
        if refusal is not None:
            notice = (
                f"{memory.numel()} bytes of host memory could not be pinned ({refusal}): copies go through pageable "
                "memory, which is slower and holds up the program. Raise `ulimit -l`, or give a smaller host memory."
            )
            _log.warning("%s", notice)
            return HostMemory(memory[:nbytes], notice=notice)
        return HostMemory(memory[:nbytes], pinned=True)

    def _register(self, memory: torch.Tensor) -> str | None:
        """Pin pages; why they could not be, else None."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        try:  # a loader thread's current device is the first, which would get a context that nobody needs
            with torch.cuda.device(self.place):
                code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), _CUDA_HOST_REGISTER_PORTABLE))
        except RuntimeError as error:
            return str(error).splitlines()[0]
        if code == 0:
            return None
        reason = f"CUDA error {code}: {runtime.cudaGetErrorString(runtime.cudaError(code))}"
        try:  # the refusal is also kept as the last error, which the next kernel would report as its own
            torch.zeros(1, device=self.place)
        except RuntimeError as error:
            _log.debug("cleared %s", error)
        return reason

    def free_host(self, held: HostMemory) -> None:
        """Unregister pinned memory, after every copy under way."""
        if held.pinned:
            with torch.cuda.device(self.place):
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(held.memory.data_ptr())  # type: ignore[no-untyped-call]
            held.pinned = False

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark], *, ahead: bool) -> Mark:
        """Copy on a side stream, from and to pinned memory without the host's waiting."""
        stream = self._back if source.is_cuda else self._streams[ahead]
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # In a loader thread the first device is current: going back to it from a stream of another one, without the
        # guard, would give it a context (half a GB) that nobody needs.
        with self._lock, torch.cuda.device(self.place), torch.cuda.stream(stream):
            for mark in after:
                stream.wait_event(cast("torch.cuda.Event", mark))
            target.copy_(source, non_blocking=True)
            arrival.record(stream)
        return cast(Mark, arrival)

    def wait(self, arrival: Mark) -> None:
        """The current stream waits."""
        torch.cuda.current_stream(self.place).wait_event(cast("torch.cuda.Event", arrival))

    def used(self, memories: Sequence[torch.Tensor]) -> Mark:
        """An event on the current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.place))
        return cast(Mark, event)

    def finish(self, mark: Mark) -> None:
        """Wait on the host, unless it has passed."""
        if not mark.query():
            self.synchronisations += 1
            mark.synchronize()

    def drain(self) -> None:
        """Wait on the host for every stream."""
        self.synchronisations += 1
        torch.cuda.synchronize(self.place)

    def fetch(self, *tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Copy to pinned memory on the current stream, and wait for an event behind the copies, not for the stream."""
        self.fetches += 1
        with torch.cuda.device(self.place):
            there = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
            for host, each in zip(there, tensors, strict=True):
                host.copy_(each, non_blocking=True)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(torch.cuda.current_stream(self.place))

        def arrived() -> tuple[torch.Tensor, ...]:
            arrival.synchronize()
            return tuple(there)

        return arrived

    def receive(self, rows: torch.Tensor, sender: Device) -> torch.Tensor:
        """Copy from device to device: torch orders it after both devices' current streams, and the program goes on."""
        return rows.to(self.place, non_blocking=True)

    def clock(self) -> float:
        """Seconds of the machine's clock."""
        return time.perf_counter()


def device_at(place: torch.device) -> Device:
    """The device that runs experts at `place`.

    Raises:
        UnsupportedModelError: it is neither a CPU nor a CUDA device.
    """
    if place.type == "cpu":
        return CpuDevice(place)
    if place.type == "cuda":
        return CudaDevice(place)
    raise UnsupportedModelError(
        f"experts cannot be kept on {place}: emoe has devices for the CPU and for CUDA. Load the model on one of them "
        "with device_map."
    )
