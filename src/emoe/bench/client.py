"""The parent's end of a worker process: starts it, asks it, and says what became of it if it died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from emoe.bench.cgroup import MemoryCgroup
from emoe.bench.cores import Cores, pinned
from emoe.config import format_bytes
from emoe.errors import EmoeError

STOP_S = 20.0
LOG_TAIL = 1500  # characters
TORCH_WORKER = (sys.executable, "-m", "emoe.bench.worker")


class WorkerError(EmoeError):
    """A measured process failed or died; the text says how and shows the end of what it printed."""


class WorkerClient:
    """One worker process, inside `cgroup` and on `cores` from its first instruction if they are given.

    `command` serves requests as `emoe.bench.worker.serve` does; `environment` is added to this process's.
    """

    def __init__(
        self,
        what: str,
        cgroup: MemoryCgroup | None = None,
        threads: int | None = None,
        command: Sequence[str] = TORCH_WORKER,
        environment: Mapping[str, str] | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.what = what
        self._cgroup = cgroup
        self._late = False
        # Closed by close(), with the process that writes to it.
        self._log = tempfile.TemporaryFile(mode="w+", prefix="emoe-bench-", errors="replace")  # noqa: SIM115
        command = list(command)
        if cgroup is not None:
            # The shell enters the cgroup and becomes Python, so all memory of the process is charged to it.
            command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.entry), *command]
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        variables = os.environ | quiet | dict(environment or {})
        if threads is not None:
            variables["OMP_NUM_THREADS"] = str(threads)
        with pinned(cores):
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=variables
            )

    def ask(self, operation: str, /, within_s: float | None = None, **values: Any) -> dict[str, Any]:
        """Send one request and return its answer; a worker that has not answered `within_s` seconds is ended.

        Raises:
            WorkerError: the worker answered with an error, died, or took too long.
        """
        watch = threading.Timer(within_s, self._end_late) if within_s is not None else None
        if watch is not None:
            watch.start()
        try:
            return self._ask(operation, values)
        except WorkerError as error:
            if self._late:
                raise WorkerError(f"{self.what} took more than {within_s:g} s to {operation} and was ended") from error
            raise
        finally:
            if watch is not None:
                watch.cancel()

    def _end_late(self) -> None:
        self._late = True
        self._process.kill()

    def _ask(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
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
        if isinstance(error, KeyboardInterrupt):
            self._process.terminate()  # it is at work, and would heed its stdin only afterwards
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
