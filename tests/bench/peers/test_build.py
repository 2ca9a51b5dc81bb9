"""Building llama.cpp, with a pip that only pretends: once, for this machine, and nothing left of what failed."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emoe.bench.peers.build import CMAKE_ARGS, BuildError, build_command, build_llama, llama_python


class Pip:
    """In place of venv and pip: makes the Python of the environment, ends with `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
        self.code = code
        self.runs: list[dict[str, str]] = []
        monkeypatch.setenv("CXX", "c++")
        monkeypatch.setattr(venv, "create", self.create)
        monkeypatch.setattr(subprocess, "run", self.run)

    def create(self, folder: Path, *, with_pip: bool, clear: bool) -> None:
        assert with_pip and clear
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").touch()

    def run(self, command: list[str], *, stdout: Any, stderr: int, env: dict[str, str], check: bool) -> Any:
        assert stderr == subprocess.STDOUT and not check
        assert Path(command[0]).is_file()
        stdout.write("x" * 5000 + "the compiler stopped\n")
        self.runs.append(env)
        return SimpleNamespace(returncode=self.code)


def test_it_is_built_once_with_one_compiler_for_each_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip = Pip(monkeypatch)
    cache = tmp_path / "below" / "cache"
    python = build_llama(cache)
    assert python == llama_python(cache) == Path(build_command(cache)[0])
    assert build_llama(cache, 3) == python and len(pip.runs) == 1
    [variables] = pip.runs
    assert variables["CMAKE_ARGS"] == CMAKE_ARGS and variables["PYTHONPATH"] == ""
    assert variables["CMAKE_BUILD_PARALLEL_LEVEL"] == str(len(os.sched_getaffinity(0)))
    build_llama(tmp_path / "other", 3)
    assert pip.runs[1]["CMAKE_BUILD_PARALLEL_LEVEL"] == "3"


def test_a_build_that_failed_leaves_its_log_and_no_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Pip(monkeypatch, code=1)
    with pytest.raises(
        BuildError, match=r"failed; all of it is in .*llama.cpp-build.log\n.*the compiler stopped"
    ) as error:
        build_llama(tmp_path)
    assert len(str(error.value)) < 3000, "the end of the log says why"
    assert llama_python(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp-build.log"]
