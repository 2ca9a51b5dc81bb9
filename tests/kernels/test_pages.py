"""Freed memory stays, and does not come back page by page; huge pages are asked for where a tensor lies."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emoe.kernels import pages
from emoe.kernels.pages import HUGE_BYTES, MADV_HUGEPAGE, MALLOC_SETTINGS, keep_freed_memory, prefer_huge_pages

PROGRAM = """
import resource, sys
import torch
from emoe.kernels.pages import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(1 << 20, dtype=torch.bfloat16) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
assert keep_freed_memory() == (sys.argv[1] == "kept")
print([faults() for _ in range(8)][-1])
"""


def faults(how: str) -> int:
    """Page faults of 16 MiB of tensors that are made, freed and made again, once that has settled."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    if how == "given back":
        environment |= dict.fromkeys(MALLOC_SETTINGS[:2], "131072")
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's limits")
def test_freed_memory_comes_back_without_page_faults() -> None:
    if not keep_freed_memory():
        pytest.skip("no glibc, or the environment says what is kept")
    assert faults("given back") > 4000  # of 4,096 pages
    assert faults("kept") < 100


def test_what_the_environment_says_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MALLOC_SETTINGS:
        with monkeypatch.context() as set_one:
            set_one.setenv(name, "131072")
            assert not keep_freed_memory()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")
    assert not keep_freed_memory()


@pytest.mark.parametrize("granted", [1, 0])
def test_both_limits_are_set_or_it_is_said_that_they_are_not(granted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the heap's end keeps and of what is large enough for a mapping of its own (malloc.h: -1 and -3)."""
    set_: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        set_[option] = value
        return 1 if option == -3 else granted

    for name in (*MALLOC_SETTINGS, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(pages, "_libc", lambda: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory() is bool(granted)
    assert set_ == {-1: 32 << 20, -3: 32 << 20}
    monkeypatch.setattr(pages, "_libc", SimpleNamespace)
    assert not keep_freed_memory(), "no glibc"
    monkeypatch.setattr(pages, "_libc", lambda: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


Asked = list[tuple[int, int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found: Asked = []

    def madvise(start: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
        found.append((start.value or 0, length.value, advice))
        return 0

    monkeypatch.setattr(pages, "_libc", lambda: SimpleNamespace(madvise=madvise))
    monkeypatch.setattr(sys, "platform", "linux")
    return found


def lying(start: int, nbytes: int) -> Any:
    return SimpleNamespace(device=torch.device("cpu"), nbytes=nbytes, data_ptr=lambda: start)


@pytest.mark.parametrize("start", [0, 64, HUGE_BYTES - 64, HUGE_BYTES + 1])
@pytest.mark.parametrize("nbytes", [2 * HUGE_BYTES, 3 * HUGE_BYTES - 1, 5 * HUGE_BYTES + 64])
def test_every_whole_huge_page_of_the_tensor_and_no_other(asked: Asked, start: int, nbytes: int) -> None:
    start += 8 * HUGE_BYTES
    prefer_huge_pages(lying(start, nbytes))
    whole = [at for at in range(0, 32 * HUGE_BYTES, HUGE_BYTES) if start <= at and at + HUGE_BYTES <= start + nbytes]
    assert asked == [(whole[0], len(whole) * HUGE_BYTES, MADV_HUGEPAGE)]


def test_small_tensors_and_other_systems_are_left_alone(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_huge_pages(lying(0, 2 * HUGE_BYTES - 1))
    prefer_huge_pages(torch.empty(4 * HUGE_BYTES, dtype=torch.uint8, device="meta"))
    monkeypatch.setattr(sys, "platform", "darwin")
    prefer_huge_pages(lying(0, 4 * HUGE_BYTES))
    assert asked == []
