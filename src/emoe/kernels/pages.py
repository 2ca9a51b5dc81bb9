"""What the system is asked about memory: huge pages for what is read from end to end (10 % more bandwidth than 4 KiB
pages), and freed memory that stays, so that the next layer does not take it anew page by page (docs/log.md)."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

import torch

HUGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14

FREED_BYTES_KEPT = 32 << 20
"""Of freed memory at a heap's end, what is kept at most (glibc has a heap for each of some threads); a piece that is
larger is no part of a heap and goes back at once."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables of the environment by which someone says himself what is kept."""


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Ask Linux to back the whole huge pages inside a tensor's memory with such; elsewhere do nothing.

    Only memory that has not been touched yet is sure to profit. It is a wish: a system that does not grant it runs as
    it would have.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < 2 * HUGE_BYTES or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // HUGE_BYTES) * HUGE_BYTES
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_BYTES * HUGE_BYTES
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)


def keep_freed_memory() -> bool:
    """Ask the C library to keep up to `FREED_BYTES_KEPT` of what the process frees; whether it will.

    The activations of a prompt, a few MiB each, otherwise go back to the system and come as new pages for every layer:
    4,400 page faults a layer of OLMoE with 512 tokens, 3 to 8 % of the prompt's time. Left alone, glibc raises both
    limits by itself as larger pieces are freed: that of pieces up to these 32 MiB, and that of what is kept to twice
    as much. So the peak is no higher than it may become anyhow. The limits hold for the whole process, also for what
    does not belong to emoe and for models loaded later, and stay when a model is closed. Where there is no glibc, or
    the environment says something of its own to malloc, nothing is changed.
    """
    told = any(name in os.environ for name in MALLOC_SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or not sys.platform.startswith("linux") or not hasattr(_libc(), "mallopt"):
        return False
    options = (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    return all(_libc().mallopt(option, FREED_BYTES_KEPT) == 1 for option in options)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
