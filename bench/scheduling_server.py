"""`emoe serve` that also tells its cost model at /costs: what bench/scheduling.py starts.

    python -m bench.scheduling_server MODEL-AND-OPTIONS-OF-EMOE-SERVE

`Server` starts one in a process of its own.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Self

START_S = 120.0
STOP_S = 20.0


def main() -> int:
    """Serve until told to stop."""
    from emoe import cli
    from emoe.server import app

    create_app = app.create_app

    def with_costs(engine: Any, *rest: Any) -> Any:
        made = create_app(engine, *rest)
        made.add_api_route("/costs", engine.costs.as_dict)
        return made

    app.create_app = with_costs  # type: ignore[assignment]
    return cli.main(["serve", *sys.argv[1:]])


class Server:
    """A server of one scheduler; as a context manager it ends with the block."""

    def __init__(self, scheduler: str, words: Sequence[str]) -> None:
        self.scheduler = scheduler
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process
        command = [sys.executable, "-m", "bench.scheduling_server", "--port", "0", "--scheduler", scheduler, *words]
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


if __name__ == "__main__":
    sys.exit(main())
