"""Measuring gives every rate that can be had here, and says what could not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.profiling import disk, rates
from emoe.profiling.measuring import measure, thread_counts


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ARRAY_BYTES", 8 << 20), ("LEAST_ARRAY_BYTES", 8 << 20), ("SIDE", 128)):
        monkeypatch.setattr(rates, name, value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / "a.bin", folder / "b.bin"]
    for path in paths:
        path.write_bytes(bytes(5_000_001))
    return paths


def test_measuring_gives_every_rate(files: list[Path]) -> None:
    said: list[str] = []
    found = measure(files, threads=(1, 2), seconds=0.5, say=said.append)
    assert set(found.memory_bytes_per_s) == {1, 2}
    assert {"float32", "bfloat16"} <= set(found.flops)
    assert found.memory_rate(1) > 1e8
    assert found.compute_rate("bfloat16", 2) > 1e8
    assert found.link_rate("cached") > 1e7
    if found.disk_direct_bytes_per_s is None:
        assert "O_DIRECT" in found.notes[0]
    else:
        assert found.link_rate("direct") > 1e5
        assert found.disk_direct_way is not None
        assert found.disk_direct_way["threads"] in disk.THREADS
    assert found.h2d_pinned_bytes_per_s is None
    with pytest.raises(UsageError, match="rate of 'pinned' loads was not measured"):
        found.link_rate("pinned")
    assert any("disk" in line for line in said)


def test_without_files_the_disk_is_left_out() -> None:
    found = measure(threads=(1,), seconds=0.2)
    assert found.disk_direct_bytes_per_s is None
    assert found.disk_cached_bytes_per_s is None
    assert found.fingerprint["files"] == "none"


def test_no_direct_reads_are_said_to_be_missing(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "best_direct", lambda *_: None)
    found = measure(files, threads=(1,), seconds=0.2)
    assert found.disk_direct_bytes_per_s is None
    assert "no O_DIRECT" in found.notes[-1]
    with pytest.raises(UsageError, match="no O_DIRECT"):
        found.link_rate("direct")


@given(st.integers(1, 300))
def test_thread_counts_double_up_to_the_cores(cores: int) -> None:
    counts = thread_counts(cores)
    assert counts[0] == 1
    assert counts[-1] == cores
    assert list(counts) == sorted(set(counts))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"seconds": 0.0}, "positive"), ({"threads": (0,)}, "at least 1"), ({"device": "tpu"}, "no device")],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        measure(**options)  # type: ignore[arg-type]
