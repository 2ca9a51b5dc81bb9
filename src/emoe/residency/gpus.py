"""GPUs by name: which one "cuda:1" is on this machine, and that there is one."""

from __future__ import annotations

from emoe.errors import UsageError


def gpu_count() -> int:
    """How many CUDA devices torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_number(name: str, remedy: str) -> int | None:
    """The number of the GPU that a device's name stands for; None for the CPU.

    Args:
        name: "cpu", "cuda" or "cuda:1".
        remedy: what to do where there is no such GPU, a sentence.

    Raises:
        UsageError: no device is called so, it is neither a CPU nor a CUDA device, or torch finds no such GPU here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device is called {name!r}: choose cpu, cuda or a GPU's number as in cuda:1.") from error
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise UsageError(f"experts run on a CPU or a CUDA device, and {name!r} is neither: choose cpu, cuda or cuda:1.")
    number, count = device.index or 0, gpu_count()
    if number >= count:
        raise UsageError(f"there is no device {name!r}: torch {torch.__version__} finds {count} CUDA devices. {remedy}")
    return number
