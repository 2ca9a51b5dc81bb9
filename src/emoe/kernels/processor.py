"""What will compute prompts on this machine, found without torch and without compiling: plans ask before anything runs.

`kernels.choice` decides by the same words, then looks at what was compiled, and says so where that is something else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from emoe.errors import UsageError
from emoe.kernels.native.build import BuildError, failed_before

VARIABLE = "EMOE_KERNELS"
"""auto (the C kernels where they can be compiled), native (an error where they cannot), torch."""

PAIRS = {"avx512_bf16", "avx512bw", "avx512vl"}
"""What a processor has that multiplies bfloat16 in pairs, as /proc/cpuinfo names it (`MANY` of native/many.h)."""

TILES = "amx_bf16"
"""What it has if oneDNN is faster."""

BY_TORCH = f"{VARIABLE} says so"
OTHER_DTYPE = "the C kernels for many rows know bfloat16 only"
OTHER_PROCESSOR = "this processor does not multiply bfloat16 in pairs, or has AMX, with which torch is faster"


def wanted_kernels() -> str:
    """What EMOE_KERNELS asks for. Raises UsageError where that is not one of its values."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", "native", "torch"):
        raise UsageError(f"{VARIABLE} is {wanted!r}; it can be auto, native or torch.")
    return wanted


def why_torch(dtype: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Why torch will compute prompts in `dtype` ("bfloat16") on the CPU; nothing where the C kernels will.

    That is what the environment, the compilers that are there, what came of compiling when it was last tried, and the
    processor's flags say: it may still fail the first time.

    Raises:
        UsageError: EMOE_KERNELS is not one of its values.
    """
    if wanted_kernels() == "torch":
        return BY_TORCH
    if dtype != "bfloat16":
        return OTHER_DTYPE
    try:
        if failed := failed_before():
            return failed
    except BuildError as error:
        return str(error)
    return "" if multiplies_pairs(cpuinfo) else OTHER_PROCESSOR


def multiplies_pairs(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether `-march=native` finds a processor of which many.h makes use."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False  # no Linux, so no such flags
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return flags >= PAIRS and TILES not in flags


def usable_threads() -> int:
    """Threads that computing will have: torch's where it is there, else OMP_NUM_THREADS, else this process's cores."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    stated = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if stated.isdecimal() and int(stated) > 0:
        return int(stated)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
