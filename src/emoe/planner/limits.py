"""What a plan has to stay within: the memory that experts run in, and the process's where these are not the same."""

from __future__ import annotations

from dataclasses import dataclass

from emoe.checkpoint.memory_room import memory_room
from emoe.config import parse_bytes
from emoe.errors import UsageError
from emoe.residency.gpus import gpu_count, gpu_number

CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, and where each number comes from.

    Attributes:
        device: where the model runs: "cpu", "cuda", "cuda:1", or "auto": all GPUs.
        memory_bytes: what may be used there: on a CPU the process's memory.
        process_bytes: what the process may use of the machine's memory, pinned host memory included; None on a CPU,
            where that is `memory_bytes`.
    """

    device: str = CPU
    memory_bytes: int | None = None
    memory_source: str = ""
    process_bytes: int | None = None
    process_source: str = ""


def find_limits(
    device: str | None = None, memory: str | int | None = None, process_memory: str | int | None = None
) -> Limits:
    """What is given, else what is free now.

    Raises:
        UsageError: a size that cannot be meant, process memory of a model that runs on the CPU, or a device whose
            memory is neither given nor here to be asked.
    """
    room = memory_room(with_own=True) if process_memory is None else None
    process = (room.available_bytes, f"free ({room.bound})") if room is not None else (0, "")
    if process_memory is not None:
        process = parse_bytes(process_memory), "allowed"
    if device is None or device == CPU:
        if process_memory is not None:
            raise UsageError("process memory is for models that run on a GPU; on the CPU, --memory is the process's")
        if memory is None:
            return Limits(CPU, *process)
        return Limits(CPU, parse_bytes(memory), "allowed")
    given = device_room(device) if memory is None else (parse_bytes(memory), "allowed")
    return Limits(device, *given, *process)


def device_room(device: str) -> tuple[int, str]:
    """Free bytes of a GPU, or of all of them together ("auto"), and the words for it.

    Raises:
        UsageError: torch sees no such device here.
    """
    import torch

    remedy = "To plan for one that is elsewhere, give --memory, what may be used of the device's."
    if device == "auto" and (count := gpu_count()):
        free = sum(int(torch.cuda.mem_get_info(number)[0]) for number in range(count))
        return free, f"free on auto ({count} devices together)"
    number = gpu_number("cuda" if device == "auto" else device, remedy)
    return int(torch.cuda.mem_get_info(number)[0]), f"free on {device}"
