"""A file is complete under its name, or as it was before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emoe.checkpoint.whole import whole_file, write_whole


def test_the_name_is_taken_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for old in (None, b"old"):
        if old is not None:
            path.write_bytes(old)
        with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == ([] if old is None else ["file"])
    assert path.read_bytes() == b"old"


def test_it_is_on_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", []

    def sync(descriptor: int) -> None:
        seen.append((path.exists(), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(path, b"12345")
    assert seen == [(False, 5)]
    assert path.read_bytes() == b"12345"


def test_a_folder_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "file", b"")
