"""A server of our own to measure: `emoe serve` in a process of its own, on a free port of 127.0.0.1."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Self

SERVE = ("-m", "emoe", "serve")
START_S = 120.0
STOP_S = 20.0


class Server:
    """A server of one scheduler; as a context manager it ends with the block."""

    def __init__(self, scheduler: str, words: Sequence[str], program: Sequence[str] = SERVE) -> None:
        """Start it with the options `words`; `program`: what Python runs, for servers that tell more."""
        self.scheduler = scheduler
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process
        command = [sys.executable, *program, "--port", "0", "--scheduler", scheduler, *words]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=self._log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        self.url = ""

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def wait(self) -> str:
        """Its address, once it serves. Raises RuntimeError when it does not."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            if found := re.search(r"serving \S+ at (http://[^/]+)/v1", self._said()):
                self.url = found[1]
                return self.url
            time.sleep(0.1)
        raise RuntimeError(f"the server of {self.scheduler} does not serve: {self._said()}")

    def _said(self) -> str:
        self._log.flush()
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
