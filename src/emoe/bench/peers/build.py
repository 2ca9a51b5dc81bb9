"""llama.cpp for measurements: built from the source package of llama-cpp-python into a cache folder of its own.

The build is for this machine's processor, in a virtual environment that holds nothing else, so that it neither
depends on this environment nor changes it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import emoe
from emoe.config import user_cache
from emoe.errors import EmoeError, UsageError

VERSION = "0.3.36"
"""Of llama-cpp-python, whose source package brings the llama.cpp that is measured."""

CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
LOG_TAIL = 1500  # characters


class BuildError(EmoeError):
    """llama.cpp could not be built; the text names the log."""


def cache_folder(chosen: str | Path | None = None) -> Path:
    """Where builds and converted checkpoints are kept: `chosen`, else "peers" in emoe's user cache."""
    return user_cache() / "peers" if chosen is None else Path(chosen).expanduser()


def llama_python(cache: Path) -> Path | None:
    """The Python that has llama_cpp, or None where it was not built."""
    python = _folder(cache) / "bin" / "python"
    return python if python.exists() else None


def build_command(cache: Path) -> list[str]:
    """The pip command that compiles, as `build_llama` runs it with CMAKE_ARGS in its environment."""
    python = str(_folder(cache) / "bin" / "python")
    # No cache: a wheel that lies there may have been compiled for another processor or with other arguments.
    pip = [python, "-m", "pip", "install", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
    return [*pip, f"llama-cpp-python=={VERSION}"]


def build_llama(cache: Path, jobs: int | None = None) -> Path:
    """Build llama.cpp into `cache`, where it is not there yet, and return its Python. Takes some minutes.

    Args:
        cache: as `cache_folder` gives.
        jobs: compilers at once; None: one for each processor.

    Raises:
        UsageError: no C++ compiler.
        BuildError: pip failed; its output is in the log that the error names.
    """
    found = llama_python(cache)
    if found is not None:
        return found
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise UsageError(
            "llama.cpp is built from source, and there is no C++ compiler (c++, g++, clang++); install one"
        )
    folder = _folder(cache)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = cache / "llama.cpp-build.log"
    try:
        venv.create(folder, with_pip=True, clear=True)
        jobs = jobs or len(os.sched_getaffinity(0))
        variables = os.environ | {"PYTHONPATH": "", "CMAKE_ARGS": CMAKE_ARGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
        with log.open("w") as out:
            code = subprocess.run(
                build_command(cache), stdout=out, stderr=subprocess.STDOUT, env=variables, check=False
            ).returncode
        if code:
            raise BuildError(f"{' '.join(build_command(cache))} failed; all of it is in {log}\n{_tail(log)}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a folder that is there counts as built
        raise
    return folder / "bin" / "python"


def worker_command(python: Path) -> tuple[list[str], dict[str, str]]:
    """What starts `llama_worker` with the build's Python, and the environment it needs: emoe is not installed there."""
    return [str(python), "-m", "emoe.bench.peers.llama_worker"], {"PYTHONPATH": str(Path(emoe.__file__).parent.parent)}


def _folder(cache: Path) -> Path:
    """Of the virtual environment: another for each version of either side."""
    return cache / f"llama-cpp-python-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_TAIL:]
