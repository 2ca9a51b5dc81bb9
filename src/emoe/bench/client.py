"""The parent's end of a worker process: starts it, asks it, and says what became of it if it died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from emoe.bench.cgroup import MemoryCgroup
from emoe.config import format_bytes
from emoe.errors import EmoeError

STOP_S = 20.0
LOG_TAIL = 1500  # characters


class WorkerError(EmoeError):
    """A measured process failed or died; the text says how and shows the end of what it printed."""


class WorkerClient:
    """One worker process, inside `cgroup` from its first instruction if one is given."""

    def __init__(self, what: str, cgroup: MemoryCgroup | None = None, threads: int | None = None) -> None:
        self.what = what
        self._cgroup = cgroup
        # Closed by close(), with the process that writes to it.
        self._log = tempfile.TemporaryFile(mode="w+", prefix="emoe-bench-", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "emoe.bench.worker"]
        if cgroup is not None:
            # The shell enters the cgroup and becomes Python, so all memory of the process is charged to it.
            command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.entry), *command]
        environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def ask(self, operation: str, **values: Any) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            WorkerError: the worker answered with an error, or died.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise WorkerError(f"{self.what}: its pipes are closed")
        try:
            stdin.write(json.dumps({"op": operation, **values}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.what} {self._end()}\n{self.log_tail()}".rstrip())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise WorkerError(f"{self.what} failed: {found['error']}")
        return found

    def _end(self) -> str:
        code = self._process.wait()
        if self._cgroup is not None and self._cgroup.kills:
            return f"was killed: it needs more than its {format_bytes(self._cgroup.limit_bytes)} of memory"
        if code == -signal.SIGKILL:
            return "was killed, probably because memory ran out"
        return f"died with exit code {code}"

    def log_tail(self) -> str:
        """The end of what the process printed."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()[-LOG_TAIL:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process: by closing its stdin, and by force if it does not heed that. Safe to call twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it has died already
                self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
