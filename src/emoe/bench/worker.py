"""A process that measures one contender: `python -m emoe.bench.worker` reads requests from stdin, one JSON object a
line, and answers each with one line. See `emoe.bench.client` for the other end.

    {"op": "load", "contender": ..., "folder": ..., "threads": ..., "options": ...}
    {"op": "generate", "prompt": 3, "prompt_tokens": 128, "new_tokens": 32, "seed": 0}
    {"op": "replay", "start": 576, "prompt_tokens": 512, "steps": 64, "batch": 1, "chunk": null}
    {"op": "replay", "ids": [[0, 1, 2], [3, 4, 5]], "prompt_tokens": 2, "chunk": null}
    {"op": "feed", "prompt": [0, 1, 2], "forced": [3, 4], "seconds": 60}
    {"op": "stop"}

Processes that run something else than torch serve their own operations the same way, with `serve`.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from emoe.plugins import load_plugins

Operations = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
"""What answers a request, by its "op". "stop" must be among them, and harmless when it is called twice."""


class Worker:
    """The state between requests."""

    def __init__(self) -> None:
        self._running: Any = None
        self._folder = Path()
        self._base_bytes = 0

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Import and rehearse everything, note what that takes, then load. Peaks are above that base."""
        load_plugins()  # contenders may be named in them
        import torch

        if request["threads"] is not None:
            torch.set_num_threads(request["threads"])
        import transformers

        from emoe.bench import engines
        from emoe.bench.cores import usable_cores
        from emoe.bench.process import memory, reset_peak, storage_bytes_read
        from emoe.bench.settings import Contender

        self._folder = Path(request["folder"])
        contender = Contender.from_dict(request["contender"])
        engines.rehearse(contender, self._folder, request["options"])
        # The others' versions are noted in any case.
        versions = {name: version(name) for name in (contender.engine,) if name in ("accelerate", "airllm")}
        reset_peak()
        base, read = memory(), storage_bytes_read()
        self._base_bytes = base.now_bytes
        start = time.perf_counter()
        self._running = engines.load(contender, self._folder, request["options"])
        seconds = time.perf_counter() - start
        now = memory()
        return {
            "load_s": seconds,
            "base_bytes": base.now_bytes,
            "load_peak_bytes": now.peak_bytes - base.now_bytes,
            "loaded_bytes": now.now_bytes - base.now_bytes,
            "load_storage_bytes": storage_bytes_read() - read,
            "threads": torch.get_num_threads(),
            "cores": usable_cores(),
            "extra_files": [str(path) for path in self._running.extra_files],
            "notes": self._running.notes,
            "reader": self._running.reader,
            "versions": versions
            | {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """One generation, measured."""
        from emoe.bench import engines
        from emoe.bench.prompts import prompt_ids

        prompt = prompt_ids(self._folder, request["prompt"], request["prompt_tokens"], request["seed"])
        return engines.generate(self._running, prompt, request["new_tokens"], self._base_bytes).as_dict()

    def replay(self, request: dict[str, Any]) -> dict[str, Any]:
        """Given `ids` [batch][tokens], or tokens of a planted checkpoint's trace, teacher-forced, measured."""
        from emoe.bench import forced
        from emoe.bench.prompts import planted_ids

        ids = request.get("ids")
        if ids is None:
            tokens = request["prompt_tokens"] + request["steps"]
            ids = planted_ids(self._folder, request["start"], tokens, request["batch"])
        prompt, chunk = request["prompt_tokens"], request["chunk"]
        return forced.replay(self._running, ids, prompt, self._base_bytes, chunk).as_dict()

    def feed(self, request: dict[str, Any]) -> dict[str, Any]:
        """Given tokens, measured for as long as a time allows."""
        from emoe.bench import forced

        prompt, given = request["prompt"], request["forced"]
        return forced.feed(self._running, prompt, given, request["seconds"], self._base_bytes).as_dict()

    def stop(self, _: dict[str, Any]) -> dict[str, Any]:
        """Remove what was written."""
        if self._running is not None:
            self._running.close()
            self._running = None
        return {}

    @property
    def operations(self) -> Operations:
        """What it answers."""
        return {
            "load": self.load,
            "generate": self.generate,
            "replay": self.replay,
            "feed": self.feed,
            "stop": self.stop,
        }


def answer(operations: Operations, request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request; an error becomes an answer too, since the other end must always get one."""
    try:
        return operations[request["op"]](request)
    except Exception as error:  # whatever it was, the other end is told, with its type
        import traceback

        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main(operations: Operations, requests: TextIO, answers: TextIO) -> None:
    """Answer until `requests` end or "stop" is asked."""
    try:
        for line in requests:
            request = json.loads(line)
            print(json.dumps(answer(operations, request)), file=answers, flush=True)
            if request["op"] == "stop":
                return
    finally:
        operations["stop"]({})


def serve(operations: Operations) -> None:
    """Answer what comes on stdin."""
    # Ctrl-C goes to the whole terminal; the other end ends this process in order, by closing stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ended while it works, it still removes what it wrote.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # What libraries print must not end up between the answers.
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        main(operations, sys.stdin, channel)


if __name__ == "__main__":
    serve(Worker().operations)
