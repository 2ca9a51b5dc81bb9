"""Banks: the memory experts run from. One allocation of equal slots, made once and never moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from emoe.checkpoint.index import PartSpec
from emoe.errors import BudgetError
from emoe.residency.budget import padded
from emoe.residency.devices import Device


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called `name` ("bfloat16")."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BudgetError(f"{name!r} is not a torch dtype.")
    return dtype


def part_nbytes(part: PartSpec) -> int:
    """Return the bytes of one expert's part."""
    numel = 1
    for size in part.shape:
        numel *= size
    return numel * torch_dtype(part.dtype).itemsize


def slot_nbytes(parts: Sequence[PartSpec]) -> int:
    """Return the bytes of one slot: every part aligned (`emoe.residency.budget.padded`)."""
    return sum(padded([part_nbytes(part) for part in parts]))


def used_first(parts: Iterable[str]) -> frozenset[str]:
    """The parts of an expert that its first projection needs (`ExpertMath.bind`): all but the second's."""
    return frozenset(name for name in parts if not name.startswith("down_proj"))


class Bank:
    """`slots` equal slots of the given parts on one device.

    `memories[slot]` is a slot's bytes and `views[slot][part name]` that part's tensor; they never move, so kernels,
    readers and captured graphs may keep them.
    """

    def __init__(self, parts: Sequence[PartSpec], slots: int, device: Device) -> None:
        """Allocate the bank.

        Raises:
            BudgetError: the device has not that much memory.
        """
        self.parts = tuple(parts)
        self.home = device
        self.device = device.place
        self.slot_nbytes = slot_nbytes(parts)
        self.memory = device.bank(slots * self.slot_nbytes)
        self.memories = list(self.memory.view(slots, self.slot_nbytes))
        self.views = [carve(memory, self.parts) for memory in self.memories]

    def stacked(self) -> dict[str, torch.Tensor]:
        """Each part of all slots as one strided tensor [slots, ...], for kernels that take slots by number."""
        shape, slot = (len(self.views),), self.slot_nbytes
        return {
            name: view.as_strided((*shape, *view.shape), (slot // view.itemsize, *view.stride()), view.storage_offset())
            for name, view in self.views[0].items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return len(self.views) * self.slot_nbytes


def carve(memory: torch.Tensor, parts: Sequence[PartSpec]) -> dict[str, torch.Tensor]:
    """Return one expert's parts as views of the start of `memory` (uint8, aligned)."""
    views = {}
    offset = 0
    sizes = [part_nbytes(part) for part in parts]
    for part, nbytes, taken in zip(parts, sizes, padded(sizes), strict=True):
        views[part.name] = memory[offset : offset + nbytes].view(torch_dtype(part.dtype)).view(part.shape)
        offset += taken
    return views
