"""Choosing kernels: by name, by what there is, and never silently; building them once, whole, and in private."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from emoe.errors import UsageError
from emoe.kernels import choice
from emoe.kernels.native import build

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


CACHE = os.environ.get("EMOE_CACHE", "")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No choice made yet, an empty cache, and a fast build."""
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.delenv("CC", raising=False)
    for cached in (choice._calls, choice._say_once):
        cached.cache_clear()
    yield
    for cached in (choice._calls, choice._say_once):
        cached.cache_clear()


def test_torch_by_name_by_device_and_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.kernel_of("cuda", torch.bfloat16).name == "torch"
    half = choice.kernel_of("cpu", torch.float16)
    assert half.name == "torch"
    assert "float16" in half.reason
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert choice.kernel_of("cpu", torch.bfloat16) == choice.Kernel("torch", "EMOE_KERNELS says so")
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(UsageError, match="EMOE_KERNELS is 'fast'; it can be auto, native or torch"):
        choice.kernel_of("cpu", torch.bfloat16)


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        kernels = [choice.kernel_of("cpu", torch.float32) for _ in range(3)]
    assert {kernel.name for kernel in kernels} == {"torch"}
    assert len(caplog.records) == 1
    assert "no C compiler was found (no-such-compiler): install one" in caplog.text
    monkeypatch.setenv(choice.VARIABLE, "native")
    with pytest.raises(UsageError, match="EMOE_KERNELS is native, but no C compiler"):
        choice.kernel_of("cpu", torch.float32)


def test_a_compiler_that_fails_is_named_with_its_first_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'note: x' >&2\necho 'emoe.c:1: error: too modern' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(build.BuildError, match=r"broken-cc ended with 3 over the kernels: emoe.c:1: error: too modern"):
        build.built()
    assert [left.suffix for left in (tmp_path / "kernels").iterdir()] == [".failed"]  # the note for plans


@needs_compiler
def test_a_library_that_is_found_ends_the_note_of_a_failure(tmp_path: Path) -> None:
    """Another process may have failed where this one, or an earlier one, did not: plans should not hear of it."""
    flags = [flag.replace("-O3", "-O0") for flag in build.FLAGS]
    first = build.built(flags)
    note = tmp_path / "kernels" / f"{build._attempt(build.compiler(), flags)}.failed"
    note.write_text("no room")
    assert build.failed_before(flags) == "no room"
    assert build.built(flags) == first
    assert build.failed_before(flags) == ""


@needs_compiler
def test_built_once_privately_and_again_when_damaged(tmp_path: Path) -> None:
    flags = [flag.replace("-O3", "-O0") for flag in build.FLAGS]
    first = build.built(flags)
    folder = tmp_path / "kernels"
    assert first.parent == folder
    assert folder.stat().st_mode & 0o077 == 0
    when = first.stat().st_mtime_ns
    assert build.built(flags) == first
    assert first.stat().st_mtime_ns == when
    os.truncate(first, 1000)
    again = build.built(flags)
    assert again.stat().st_size > 1000
    other = build.built([*flags, "-DOTHER"])
    assert other.stem.partition("-")[0] != first.stem.partition("-")[0]
    assert not [path for path in folder.iterdir() if path.is_dir()]


@needs_compiler
def test_two_at_once_are_fine() -> None:
    flags = [flag.replace("-O3", "-O0") for flag in build.FLAGS]
    with ThreadPoolExecutor(2) as threads:
        paths = list(threads.map(lambda _: build.built(flags), range(2)))
    assert all(path.exists() for path in paths)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(build.BuildError, match="others may write to"):
        build.cache_folder()
    folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(build.BuildError, match="cannot be made"):
        build.cache_folder()


@needs_compiler
def test_threads_do_not_follow_into_a_forked_child() -> None:
    program = """
import os, torch
from emoe.kernels.choice import kernel_of
from emoe.kernels.native.calls import Matrix, Shape
import ctypes
torch.set_num_threads(2)
calls = kernel_of("cpu", torch.float32).calls
weight, x = torch.ones(1024, 512), torch.ones(1, 512)
matrix, shape = Matrix(weight.data_ptr(), None, None), Shape(512, 1024, 0, 0)
def run():
    out = torch.zeros(1, 1024)
    for _ in range(10):
        calls.products(shape, [ctypes.addressof(matrix)], x, out)
    assert bool((out == 512).all())
run()
child = os.fork()
run()
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0)
assert sum(calls.thread_counts().values()) == 20
"""
    environment = os.environ | {"EMOE_CACHE": CACHE}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
