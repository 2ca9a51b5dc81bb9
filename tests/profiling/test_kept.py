"""A machine's measurements are found again, and refused where they are another's."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

from emoe.errors import UsageError
from emoe.profiling import kept
from emoe.profiling.kept import fingerprint, keep, kept_path, known, read
from emoe.profiling.machine import Machine


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))


def test_kept_measurements_are_found_again_and_those_of_another_machine_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.bin"]
    files[0].write_bytes(bytes(4096))
    assert known(files) is None
    made = Machine(fingerprint(files), memory_bytes_per_s={1: 1e9})
    file = keep(made)
    assert known(files) == made
    assert known() is None  # another fingerprint: no files
    other = replace(made, fingerprint=made.fingerprint | {"cpu": "another"})
    file.write_text(json.dumps(other.as_dict()))
    with pytest.raises(UsageError, match=r"measured on another machine \(cpu: another there, [^:]*\)\."):
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


def test_the_file_system_is_named_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = kept.file_system(tmp_path)
    assert named

    def refuse(self: Path, *_: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert kept.file_system(tmp_path).count(":") == 1
    assert kept.processor()


def test_the_file_system_is_the_one_that_the_system_says_is_mounted_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = tmp_path.stat().st_dev
    here = f"{os.major(number)}:{os.minor(number)}"
    rows = [
        "21 1 0:99 / /other rw - ext2 /dev/other rw",
        f"22 1 {here} / /torn rw shared:1",
        f"23 1 {here} / /short rw - ext3",
        f"24 1 {here} / /data rw,noatime shared:1 master:2 - ext4 /dev/here rw",
        f"25 1 {here} /bound /data2 rw - xfs /dev/later rw",
    ]
    for count, found in ((5, "ext4 /dev/here"), (3, here), (1, here)):
        monkeypatch.setattr(Path, "read_text", lambda self, count=count: "\n".join(rows[:count]))
        assert kept.file_system(tmp_path) == found


def test_the_processor_and_its_cores_are_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "flags: a b\nmodel name\t: Some CPU @ 2 GHz \nmodel name : no")
    assert kept.processor() == "Some CPU @ 2 GHz"
    monkeypatch.setattr(Path, "read_text", lambda self: "flags: a b")
    assert kept.processor() == platform.machine()
    assert kept.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert kept.cores() == os.cpu_count()
