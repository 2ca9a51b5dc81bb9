"""Memory that is freed stays, so that it does not come back page by page."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from emoe.kernels.pages import MALLOC_SETTINGS, keep_freed_memory

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
