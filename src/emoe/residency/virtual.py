"""A device with a virtual clock: for tests of what a real one would need luck to show, and for dry runs.

Its banks are CPU memory, so that models run on it bit for bit as on the CPU. A copy lands when the virtual clock has
reached its end and something waited for it; until then its slot holds NaN. Computing takes the time it is told to take
(`compute`), copies take bytes over bandwidth, issuing takes none. Orders that a real device would forgive now and then
raise `OrderError` every time.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from emoe.residency.devices import Device, HostMemory, Mark, aligned

POISON = 0xFF
"""Bytes of all ones are NaN in every floating-point dtype that weights have."""


class OrderError(RuntimeError):
    """Work was issued in an order that a real device may run wrongly: a defect in emoe, never a user's error."""


WAITING = frozenset(
    {
        "tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__",
        "bincount", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "one_hot", "equal",
        "allclose", "histc", "repeat_interleave", "is_nonzero",
    }
)  # fmt: skip
"""torch's functions for which a program waits, if what they are given lies on a CUDA device."""


class Waits(TorchFunctionMode):
    """`with Waits() as waits: ...; waits.found`: what would make a program wait for a CUDA device, by name.

    For programs on a virtual device, whose tensors are CPU tensors: all of them are taken to lie on the device, but for
    what `fetch` has brought. Boolean masks as indices count too: their results' sizes have to be known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        given = args[0] if args else None
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        masks = [each for each in (index if isinstance(index, tuple) else (index,)) if _is_mask(each)]
        here = getattr(given, FETCHED, False)
        if (name in WAITING and isinstance(given, torch.Tensor) and not here) or masks:
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        if here and isinstance(result, torch.Tensor):
            setattr(result, FETCHED, True)
        return result


def _is_mask(index: object) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool


FETCHED = "emoe_fetched"
"""Set on tensors that `fetch` has brought to the program."""


@dataclass(slots=True, eq=False)
class VirtualMark:
    """A moment of virtual time. `copy` is the one that ends there, if any."""

    device: VirtualDevice
    time: float
    copy: _Copy | None = None

    def query(self) -> bool:
        """Whether the program's clock has passed it."""
        return self.device.program_s >= self.time

    def synchronize(self) -> None:
        """Let the program's clock pass it."""
        self.device.arrive(self)
        self.device.program_s = max(self.device.program_s, self.time)


@dataclass(slots=True, eq=False)
class _Copy:
    source: torch.Tensor
    target: torch.Tensor
    expected: torch.Tensor
    begin: float
    end: float
    landed: bool = False


@dataclass(slots=True)
class Program:
    """The clock of a program."""

    s: float = 0.0


@dataclass(slots=True)
class _Region:
    """What is known of one slot: the copy into it, whether compute may read it, and when its last use ends."""

    copy: _Copy | None = None
    waited: bool = False
    used_until: float = 0.0


@dataclass(slots=True, eq=False)
class VirtualDevice:
    """A device whose clock stands still unless work is given to it.

    Attributes:
        bytes_per_s: the link's bandwidth; copies share it, in the order they are issued.
        latency_s: what a copy takes beside its bytes.
        memory_bytes_per_s: how fast slots are read when they are used; computing takes that long.
        hop_s, hop_bytes_per_s: what rows from another device take.
        program: the clock of the program, which several devices may share.
        pinning: whether host memory can be pinned.
        place: what its banks' memory says it lies on.
        compute_s: when what has been given to compute will be done.
        link_s: when the link will be free; `busy_s`: how long it has worked.
        copied_bytes: bytes of all copies.
    """

    bytes_per_s: float = 1e9
    memory_bytes_per_s: float = math.inf
    hop_s: float = 0.0
    hop_bytes_per_s: float = math.inf
    latency_s: float = 0.0
    pinning: bool = True
    place: torch.device = field(default_factory=lambda: torch.device("cpu"))
    copies: bool = True
    synchronisations: int = 0
    fetches: int = 0
    compute_s: float = 0.0
    program: Program = field(default_factory=Program)
    link_s: float = 0.0
    busy_s: float = 0.0
    copied_bytes: int = 0
    _regions: dict[int, _Region] = field(default_factory=dict)
    _flying: deque[_Copy] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def bank(self, nbytes: int) -> torch.Tensor:
        """CPU memory, poisoned."""
        return aligned(nbytes, self.place, "expert memory").fill_(POISON)

    def host(self, nbytes: int) -> HostMemory:
        """CPU memory, poisoned; pinned if this device can pin."""
        memory = aligned(nbytes, self.place, "host memory").fill_(POISON)
        return HostMemory(memory, self.pinning, "" if self.pinning else "this virtual device cannot pin memory")

    def free_host(self, held: HostMemory) -> None:
        """Poison it: nothing may be copied from it any more."""
        held.memory.fill_(POISON)

    def compute(self, seconds: float) -> None:
        """Give the device work that takes `seconds`."""
        self.compute_s = max(self.compute_s, self.program_s) + seconds

    def synchronise(self) -> None:
        """Let the program wait for everything that was given to compute, as reading a result does."""
        self.synchronisations += 1
        self.program_s = max(self.program_s, self.compute_s)

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Mark], *, ahead: bool) -> Mark:
        """Begin a copy. Its target holds NaN until it lands.

        Raises:
            OrderError: it could run before the last use of its target, or beside another copy into it.
        """
        with self._lock:
            region = self._regions.setdefault(target.data_ptr(), _Region())
            ready = max((mark.time for mark in after if isinstance(mark, VirtualMark)), default=0.0)
            if ready < region.used_until:
                raise OrderError(f"a slot used until {region.used_until} s is overwritten from {ready} s on")
            before = region.copy
            if before is not None and not before.landed and ready < before.end:
                raise OrderError(f"a slot that a copy fills until {before.end} s is overwritten from {ready} s on")
            origin = self._regions.get(source.data_ptr())
            if origin is not None and origin.copy is not None and not origin.copy.landed:
                if ready < origin.copy.end:
                    raise OrderError(f"memory that a copy fills until {origin.copy.end} s is copied from {ready} s on")
                self._land_until(origin.copy)
            for reader in [copy for copy in self._flying if copy.source.data_ptr() == target.data_ptr()]:
                if ready < reader.end:
                    raise OrderError(f"memory that is copied until {reader.end} s is overwritten from {ready} s on")
                self._land_until(reader)
            begin = max(self.link_s, ready, self.program_s)
            end = begin + self.latency_s + source.numel() / self.bytes_per_s
            self.busy_s += end - begin
            self.link_s = end
            self.copied_bytes += source.numel()
            if before is not None:
                self._land_until(before)
            target.fill_(POISON)
            region.copy = _Copy(source, target, source.clone(), begin, end)
            self._flying.append(region.copy)
            region.waited = False
            return VirtualMark(self, end, region.copy)

    def wait(self, arrival: Mark) -> None:
        """Compute waits for the copy; the program does not."""
        if isinstance(arrival, VirtualMark):
            self.arrive(arrival)
            self.compute_s = max(self.compute_s, arrival.time)
            if arrival.copy is not None:
                self._regions[arrival.copy.target.data_ptr()].waited = True

    def used(self, memories: Sequence[torch.Tensor]) -> Mark:
        """Note the last use of some slots.

        Raises:
            OrderError: nothing waited for the copy that fills it.
        """
        self.compute_s = max(self.compute_s, self.program_s)
        with self._lock:
            for memory in memories:
                region = self._regions.get(memory.data_ptr())
                if region is None or not region.waited:
                    raise OrderError("a slot was used and nothing had waited for the copy that fills it")
                self.compute_s += memory.numel() / self.memory_bytes_per_s
            for memory in memories:
                self._regions[memory.data_ptr()].used_until = self.compute_s
            return VirtualMark(self, self.compute_s)

    def finish(self, mark: Mark) -> None:
        """The program waits, unless it has passed."""
        if not mark.query():
            self.synchronisations += 1
        mark.synchronize()

    def drain(self) -> None:
        """The program waits for whatever was given to compute or to copy."""
        self.synchronisations += 1
        self.program_s = max(self.program_s, self.compute_s, self.link_s)
        with self._lock:
            while self._flying:
                self._land(self._flying.popleft())
            for region in self._regions.values():
                region.used_until, region.waited = 0.0, region.copy is not None

    def fetch(self, *tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """The program waits for what has been given to compute so far, when it asks for the numbers."""
        self.fetches += 1
        ready, there = self.compute_s, tuple(tensor.detach().clone() for tensor in tensors)
        for tensor in there:
            setattr(tensor, FETCHED, True)

        def arrived() -> tuple[torch.Tensor, ...]:
            self.program_s = max(self.program_s, ready)
            return there

        return arrived

    def receive(self, rows: torch.Tensor, sender: Device) -> torch.Tensor:
        """Compute here goes on when the other device has computed the rows and they have come over."""
        if sender is self or not isinstance(sender, VirtualDevice):
            return rows
        took = self.hop_s + rows.nbytes / self.hop_bytes_per_s
        self.compute_s = max(self.compute_s, max(sender.compute_s, self.program_s) + took)
        return rows.clone()

    @property
    def program_s(self) -> float:
        """The program's clock: it moves only when the program waits."""
        return self.program.s

    @program_s.setter
    def program_s(self, seconds: float) -> None:
        self.program.s = seconds

    def clock(self) -> float:
        """The program's clock."""
        return self.program_s

    def arrive(self, mark: VirtualMark) -> None:
        """Land the copy that ends at `mark`, and those before it: the link takes them in turn."""
        with self._lock:
            if mark.copy is not None:
                self._land_until(mark.copy)

    def _land_until(self, copy: _Copy) -> None:
        while not copy.landed:
            self._land(self._flying.popleft())

    def _land(self, copy: _Copy) -> None:
        with torch._C.DisableTorchFunction():  # the clock's own work is no wait of the program's
            same = torch.equal(copy.source, copy.expected)
        if not same:
            raise OrderError(f"the source of a copy was overwritten before the copy ended at {copy.end} s")
        copy.landed = True
        copy.target.copy_(copy.source)
