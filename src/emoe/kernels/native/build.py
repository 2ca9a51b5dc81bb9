"""Compiles the packaged C source once, into the user's cache, and gives the file to load.

The file's name holds a fingerprint of the source, the flags, the compiler and the processor, then one of the file
itself: what does not match is built again. Nothing but the packaged source is ever compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from emoe.config import user_cache

SOURCES = (
    *("emoe.c", "vectors.h", "pool.h", "products.h", "pairs.h", "integers.h", "many.h", "gates.h", "unpacking.h"),
    *("threads.h", "attention.h", "many_attention.h", "norm.h"),
)
"""`emoe.c` includes the others."""

FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden", "-lm", "-lpthread")

COMPILE_S = 120.0
"""It takes 1 to 5 seconds; a machine that needs longer than this is out of order."""


class BuildError(Exception):
    """There are no native kernels; the text says why and what would help."""


def compiler() -> list[str]:
    """Return the command of the C compiler: $CC, else the first of cc, gcc, clang.

    Raises:
        BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CC", ""))
    for words in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(words[0])
        if found is not None:
            return [found, *words[1:]]
    raise BuildError(
        f"no C compiler was found ({named[0] if named else 'cc, gcc, clang'}): install one (Debian: apt install gcc)"
    )


def cache_folder() -> Path:
    """Return the user's own folder for compiled kernels, made if need be.

    Raises:
        BuildError: it cannot be made, or others could write to it.
    """
    folder = user_cache() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except OSError as error:
        raise BuildError(f"{folder} cannot be made ({error.strerror}): set EMOE_CACHE to a folder that can") from error
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise BuildError(
            f"others may write to {folder}, from which code is run: chmod go-w it, or set EMOE_CACHE to another"
        )
    return folder


def built(flags: Sequence[str] = FLAGS) -> Path:
    """Return the compiled library: from the cache, else compiled now.

    Raises:
        BuildError: it cannot be compiled; the text says why.
    """
    command = compiler()
    folder = cache_folder()
    source = resources.files(__package__)
    texts = {name: (source / name).read_bytes() for name in SOURCES}
    key = _fingerprint(texts, flags, command)
    note = folder / f"{_attempt(command, flags)}.failed"
    for found in sorted(folder.glob(f"{key}-*.so")):
        if _is_whole(found):
            with contextlib.suppress(OSError):  # another process may have failed where this one succeeded
                note.unlink(missing_ok=True)
            return found
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            temporary = Path(name)
            for text, content in texts.items():
                (temporary / text).write_bytes(content)
            out = temporary / "emoe.so"
            _compile([*command, "-o", str(out), str(temporary / "emoe.c"), *flags])
            final = folder / f"{key}-{_digest(out.read_bytes())}.so"
            os.replace(out, final)  # whole or not at all, also beside another process that builds the same
        note.unlink(missing_ok=True)
    except BuildError as error:
        with contextlib.suppress(OSError):  # it helps plans only
            note.write_text(str(error))
        raise
    except OSError as error:
        raise BuildError(f"the kernels cannot be compiled in {folder}: {error}") from error
    return final


def failed_before(flags: Sequence[str] = FLAGS) -> str:
    """Why this compiler failed over this source when it was last tried; nothing where it did not, or was never tried.

    Plans ask, which do not compile. Loading tries every time, and what succeeds is not held against it any more.

    Raises:
        BuildError: there is no compiler.
    """
    note = user_cache() / "kernels" / f"{_attempt(compiler(), flags)}.failed"
    try:
        return note.read_text()
    except OSError:
        return ""


def _attempt(command: Sequence[str], flags: Sequence[str]) -> str:
    """What a failure is remembered by, without running the compiler to ask for its version."""
    source = resources.files(__package__)
    texts = b"\0".join((source / name).read_bytes() for name in SOURCES)
    return _digest("\0".join([*command, *flags]).encode() + texts + _processor().encode())


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {COMPILE_S:.0f} s over the kernels") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{command[0]} ended with {done.returncode} over the kernels: {lines[0].strip()}")


def _fingerprint(texts: dict[str, bytes], flags: Sequence[str], command: list[str]) -> str:
    """Of everything the machine code depends on."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=COMPILE_S, check=False)
    parts = [*(name.encode() + content for name, content in texts.items()), " ".join([*command, *flags]).encode()]
    parts += [version.stdout.encode(), _processor().encode()]
    return _digest(b"\0".join(parts))


def _processor() -> str:
    """What -march=native looks at: the home of the cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part", "isa")
    first = {line.partition(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return platform.machine() + "".join(first[name] for name in sorted(first))


def _is_whole(path: Path) -> bool:
    try:
        return path.stem.partition("-")[2] == _digest(path.read_bytes())
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]
