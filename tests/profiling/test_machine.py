"""A machine's rates: measured, kept, and refused where they are another's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.profiling import disk, machine, rates
from emoe.profiling.machine import Machine, fingerprint, keep, kept_path, known, measure, read, thread_counts


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    for name, value in (("ARRAY_BYTES", 8 << 20), ("LEAST_ARRAY_BYTES", 8 << 20), ("SIDE", 128)):
        monkeypatch.setattr(rates, name, value)
    yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / "a.bin", folder / "b.bin"]
    for path in paths:
        path.write_bytes(bytes(5_000_001))
    return paths


numbers = st.floats(1.0, 1e13)
by_threads = st.dictionaries(st.integers(1, 64), numbers, max_size=3)


@given(by_threads, st.dictionaries(st.sampled_from(["float32", "int8"]), by_threads), st.none() | numbers)
def test_what_is_kept_is_what_was_measured(memory: dict[int, float], flops: dict, rate: float | None) -> None:  # type: ignore[type-arg]
    made = Machine({"cpu": "x"}, memory_bytes_per_s=memory, flops=flops, h2d_pinned_bytes_per_s=rate, notes=("a",))
    assert Machine.from_dict(json.loads(json.dumps(made.as_dict()))) == made


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


def test_kept_measurements_are_found_again_and_those_of_another_machine_refused(files: list[Path]) -> None:
    assert known(files) is None
    made = Machine(fingerprint(files), memory_bytes_per_s={1: 1e9})
    file = keep(made)
    assert known(files) == made
    assert known() is None  # another fingerprint: no files
    other = replace(made, fingerprint=made.fingerprint | {"cpu": "another"})
    file.write_text(json.dumps(other.as_dict()))
    with pytest.raises(UsageError, match=r"measured on another machine \(cpu: another there"):
        known(files)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "cannot be read"), ("[]", "no measurements"), ('{"format": "emoe-machine/1"}', "damaged measurements")],
)
def test_damaged_measurements_are_refused(text: str, says: str) -> None:
    wanted = fingerprint()
    file = kept_path(wanted)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        read(file, wanted)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match="set EMOE_CACHE"):
        keep(Machine(fingerprint()))


def test_rates_are_the_best_of_up_to_so_many_threads() -> None:
    made = Machine({}, memory_bytes_per_s={2: 20.0, 8: 50.0}, flops={"float32": {1: 7.0}})
    assert [made.memory_rate(n) for n in (1, 2, 4, 8, 16)] == [20, 20, 20, 50, 50]
    assert Machine({}, memory_bytes_per_s={1: 30.0, 2: 20.0}).memory_rate(2) == 30
    assert made.compute_rate("bfloat16", 4) == 7.0
    with pytest.raises(UsageError, match="memory bandwidth was not measured"):
        Machine({}).memory_rate(1)


@given(st.integers(1, 300))
def test_thread_counts_double_up_to_the_cores(cores: int) -> None:
    counts = thread_counts(cores)
    assert counts[0] == 1
    assert counts[-1] == cores
    assert list(counts) == sorted(set(counts))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"seconds": 0.0}, "positive"), ({"threads": (0,)}, "at least 1"), ({"device": "tpu"}, "not there")],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        measure(**options)  # type: ignore[arg-type]


def test_the_file_system_is_named_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = machine.file_system(tmp_path)
    assert named

    def refuse(self: Path, *_: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert machine.file_system(tmp_path).count(":") == 1
    assert machine.processor()
