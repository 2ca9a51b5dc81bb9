"""A predictor in a process of its own, so that predicting never stalls decoding (paper, section 2.2).

    with PredictorProcess("emoe-a", shape, state) as process:
        process.begin_prompt("qa")
        process.observe(routes)
        ticket = process.ask("code")
        ...
        answer = process.poll()      # None until it is there

The child is started afresh, not forked, builds the predictor by name and restores it from a safetensors file; no
object crosses. No call waits for it: two threads carry messages, and what they cannot carry is dropped and counted.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from emoe.errors import EmoeError, UsageError
from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.worker_child import read_frame, write_frame

MAX_PENDING = 1024
"""Messages waiting to be sent. A token of gpt-oss-20b is 96 bytes, so they stay under 1 MB when observed one by one."""

CLOSE_S = 2.0

_log = logging.getLogger(__name__)


class PredictorDiedError(EmoeError):
    """The predictor's process ended by itself; the text says how, and what it printed last."""


class Answer(NamedTuple):
    """A prediction: the ticket of its question, shares float64 [layers, experts], seconds the prediction took."""

    ticket: int
    shares: Array
    seconds: float


class _Message(NamedTuple):
    header: dict[str, Any]
    array: Array | None = None


class PredictorProcess:
    """Owns a predictor in a child process. Safe to call from several threads; every method returns at once.

    Args:
        name: of `registry.PREDICTORS`.
        shape: how the model routes.
        state: what a fitted predictor's `state()` gave; None starts online.
        imports: modules that the child imports first, to register predictors of your own.
        max_pending: messages that may wait for the child. Beyond that the oldest observation is dropped.
    """

    def __init__(
        self,
        name: str,
        shape: RoutingShape,
        state: Mapping[str, Array] | None = None,
        *,
        imports: Sequence[str] = (),
        max_pending: int = MAX_PENDING,
    ) -> None:
        if max_pending < 2:
            raise UsageError(f"max_pending is {max_pending}, but a question needs room beside an observation: give 2.")
        self.name, self.shape = name, shape
        self._max_pending = max_pending
        self._change = threading.Condition()
        self._pending: deque[_Message] = deque()
        self._answers: deque[Answer] = deque()
        self._tickets = self._dropped = self._superseded = self._memory = 0
        self._ready = self._closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="emoe-predictor-")
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        file = None if state is None else self._save(state)
        routing = [shape.layers, shape.experts, shape.top_k]
        self._pending.append(_Message({"name": name, "routing": routing, "state": file, "imports": list(imports)}))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "emoe.prediction.worker_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        self._threads = [
            threading.Thread(target=run, name=f"emoe-{name}-{what}", daemon=True)
            for what, run in (("send", self._send), ("receive", self._receive))
        ]
        for thread in self._threads:
            thread.start()

    def begin_prompt(self, task: str | None) -> None:
        """Tell the predictor that a prompt starts.

        Raises:
            PredictorDiedError, UsageError: the process ended, or was closed. So do the other methods.
        """
        self._put(_Message({"kind": "begin", "task": task}))

    def observe(self, routes: Array) -> None:
        """Tell it routes [tokens, layers, k] of the running prompt. They are copied."""
        if routes.ndim != 3 or routes.shape[1] != self.shape.layers:
            raise UsageError(f"routes of shape {list(routes.shape)} do not fit {self.shape.layers} MoE layers.")
        self._put(_Message({"kind": "observe"}, np.array(routes, copy=True)))

    def ask(self, task: str | None) -> int:
        """Ask for the next prompt's shares; return the ticket that the answer will carry.

        The answer takes in everything observed before. A question that still waits when a newer one comes is
        superseded: it is not answered, and counted.
        """
        with self._change:
            self._tickets += 1
            ticket = self._tickets
            others = [message for message in self._pending if message.header.get("kind") != "ask"]
            self._superseded += len(self._pending) - len(others)
            self._pending = deque(others)
            self._put(_Message({"kind": "ask", "task": task, "ticket": ticket}))
        return ticket

    def poll(self) -> Answer | None:
        """The oldest answer that was not polled yet; None if there is none."""
        with self._change:
            self._check()
            return self._answers.popleft() if self._answers else None

    @property
    def ready(self) -> bool:
        """Whether the child has built its predictor."""
        return self._ready

    @property
    def pid(self) -> int:
        """The child's process number."""
        return self._child.pid

    @property
    def dropped(self) -> int:
        """Observations that found the queue full and were not made."""
        return self._dropped

    @property
    def superseded(self) -> int:
        """Questions that a newer one replaced."""
        return self._superseded

    def memory_bytes(self) -> int:
        """The child's resident bytes when it last answered; 0 before it is ready."""
        return self._memory

    def close(self) -> None:
        """End the child, also in the middle of a prediction. Safe to call twice; no other call works afterwards."""
        with self._change:
            if self._closed:
                return
            self._closed = True
            self._change.notify_all()
        self._child.terminate()
        try:
            self._child.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._child.stdout, self._output):
            cast(BinaryIO, pipe).close()
        self._folder.cleanup()

    def __enter__(self) -> PredictorProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _save(self, state: Mapping[str, Array]) -> str:
        from safetensors.numpy import save_file

        file = Path(self._folder.name) / "state.safetensors"
        save_file({key: np.ascontiguousarray(array) for key, array in state.items()}, file)
        return str(file)

    def _put(self, message: _Message) -> None:
        with self._change:
            self._check()
            if len(self._pending) >= self._max_pending:
                self._drop_oldest()
            self._pending.append(message)
            self._change.notify_all()

    def _drop_oldest(self) -> None:
        """Make room: the oldest observation goes, or if none waits the oldest start of a prompt."""
        kinds = [message.header.get("kind") for message in self._pending]
        victim = "observe" if "observe" in kinds else "begin"
        if victim not in kinds:
            return
        del self._pending[kinds.index(victim)]
        self._dropped += 1
        if self._dropped == 1:
            _log.warning(
                "the predictor %s does not keep up: observations are being dropped (%d messages wait)",
                self.name,
                self._max_pending,
            )

    def _check(self) -> None:
        if self._closed:
            raise UsageError(f"the process of predictor {self.name} was closed: start another.")
        code = self._child.poll()
        if code is None:
            return
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - 2000))
        said = self._output.read().decode(errors="replace").strip()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise PredictorDiedError(
            f"the process of predictor {self.name} (pid {self._child.pid}) ended with {how}"
            f"{': ' + said if said else ''}. Close it and start another, or go on without predictions."
        )

    def _send(self) -> None:
        """Write what waits to the child, until it is gone or closed."""
        pipe = cast(BinaryIO, self._child.stdin)
        with suppress(BrokenPipeError):  # the child is gone; `_check` says so to the next caller
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._pending or self._closed)
                    if self._closed:
                        break
                    message = self._pending.popleft()
                write_frame(pipe, *message)
        with suppress(BrokenPipeError):  # part of the last message may still be buffered
            pipe.close()

    def _receive(self) -> None:
        """Read answers until the child is gone."""
        pipe = cast(BinaryIO, self._child.stdout)
        while (frame := read_frame(pipe)) is not None:
            header, array = frame
            with self._change:
                self._memory = header["memory"]
                if header["kind"] == "ready":
                    self._ready = True
                elif array is not None:
                    self._answers.append(Answer(header["ticket"], array, header["seconds"]))
