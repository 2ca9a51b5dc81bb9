"""What will compute prompts, as plans know it before anything is compiled."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emoe.errors import UsageError
from emoe.kernels import choice
from emoe.kernels.native.build import BuildError, built
from emoe.kernels.processor import BY_TORCH, OTHER_DTYPE, OTHER_PROCESSOR, VARIABLE, usable_threads, why_torch
from emoe.planner import plan

FLAGS = "fpu avx512f avx512bw avx512vl avx512_bf16"


def machine(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    return path


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("CC", sys.executable)  # anything that is there: nothing is compiled


def test_who_reads_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pairs = machine(tmp_path, FLAGS)
    assert why_torch("bfloat16", pairs) == ""
    assert why_torch("float32", pairs) == OTHER_DTYPE
    assert why_torch("bfloat16", machine(tmp_path, FLAGS + " amx_bf16")) == OTHER_PROCESSOR
    assert why_torch("bfloat16", machine(tmp_path, FLAGS.replace(" avx512_bf16", ""))) == OTHER_PROCESSOR
    assert why_torch("bfloat16", tmp_path / "none") == OTHER_PROCESSOR
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no C compiler was found (no-such-compiler)" in why_torch("bfloat16", machine(tmp_path, FLAGS))
    monkeypatch.setenv(VARIABLE, "torch")
    assert why_torch("bfloat16", pairs) == BY_TORCH
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UsageError, match="EMOE_KERNELS is 'fast'"):
        why_torch("bfloat16", pairs)


def test_what_was_compiled_is_what_was_expected() -> None:
    os.environ.pop("CC")  # monkeypatch gives it back
    calls = choice.native_calls()
    if calls is not None:
        assert calls.knows_many is not bool(why_torch("bfloat16"))


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        ("", BuildError("cc ended with 3"), "take more memory than `emoe plan` counts: cc ended with 3"),
        ("", SimpleNamespace(knows_many=False), "take more memory than `emoe plan` counts"),
        (OTHER_PROCESSOR, SimpleNamespace(knows_many=True), "take less memory than `emoe plan` counts"),
        ("", SimpleNamespace(knows_many=True), ""),
        (OTHER_PROCESSOR, SimpleNamespace(knows_many=False), ""),
    ],
)
def test_another_outcome_than_the_plans_is_told(
    expected: str, found: Any, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "why_torch", lambda dtype: expected)
    monkeypatch.setattr(choice, "Calls", SimpleNamespace)
    monkeypatch.setattr(choice, "_calls", lambda: found)
    choice._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        choice.kernel_of("cpu", torch.float32)  # no prompts of such a type
        assert "emoe plan" not in caplog.text
        caplog.clear()
        choice._say_once.cache_clear()
        choice.kernel_of("cpu", torch.bfloat16)
    assert len(caplog.records) == bool(said)
    choice._say_once.cache_clear()
    assert said in caplog.text
    assert ("emoe plan" in caplog.text) == bool(said)


def test_threads_are_those_that_torch_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert usable_threads() == 7
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert usable_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,4")
    assert usable_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert 1 <= usable_threads() <= (os.cpu_count() or 1)


def test_a_plan_needs_neither_torch_nor_a_compilation(tmp_path: Path) -> None:
    program = "import sys; from emoe.planner import plan; print(plan().prompts_by); assert 'torch' not in sys.modules"
    environment = os.environ | {"EMOE_CACHE": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert found.startswith(("native", "torch: "))
    assert not list(tmp_path.iterdir())


def test_a_plan_after_compiling_failed_counts_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer once it succeeds."""
    pairs = machine(tmp_path, FLAGS)
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert why_torch("bfloat16", pairs) == ""
    with pytest.raises(BuildError, match="out of order"):
        built()
    assert "out of order" in why_torch("bfloat16", pairs)
    broken.write_text('#!/bin/sh\n[ "$1" != -o ] || echo code > "$2"\n')
    built()
    assert why_torch("bfloat16", pairs) == ""


def test_a_plan_says_whose_kernels_it_supposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["emoe.planner.plan"], "why_not_native", lambda facts: "")
    told = plan(context=512).assumed
    assert any(text.startswith("prompts are counted as the C kernels read them") for text in told)
    monkeypatch.setattr(sys.modules["emoe.planner.plan"], "why_not_native", lambda facts: "no compiler")
    assert not any("C kernels" in text for text in plan(context=512).assumed)
