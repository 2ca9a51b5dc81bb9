"""Ending measured processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from emoe.bench.client import STOP_S, WorkerClient

BUSY = """
import pathlib, time
from emoe.bench.worker import serve
written = pathlib.Path({file!r})
def work(_):
    written.touch()
    time.sleep(60)
serve({{"work": work, "stop": lambda _: written.unlink(missing_ok=True) or {{}}}})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_an_interrupt_ends_a_worker_at_work_which_removes_what_it_wrote(tmp_path: Path) -> None:
    file = tmp_path / "written"
    code = BUSY.format(file=str(file))
    begin = time.monotonic()

    def interrupt_when_at_work() -> None:
        while not file.exists() and time.monotonic() - begin < STOP_S:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt_when_at_work)
    with pytest.raises(KeyboardInterrupt), WorkerClient("busy", command=(sys.executable, "-c", code)) as client:
        watcher.start()
        client.ask("work")
    watcher.join()
    assert time.monotonic() - begin < STOP_S
    assert not file.exists()
