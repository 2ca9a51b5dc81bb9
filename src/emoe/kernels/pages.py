"""Huge pages for large memory that is read from end to end: 10 % more bandwidth than 4 KiB pages (docs/log.md)."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

HUGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14


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


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
