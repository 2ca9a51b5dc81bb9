"""The predictor's own process: `python -m emoe.prediction.worker_child` answers `worker.PredictorProcess`.

Messages in both directions are frames: the length of a JSON header as 4 bytes, little-endian, the header, and where
it says "shape" the bytes of an array. Nothing is unpickled. The process ends when its input does, so with its parent.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from emoe.prediction.protocol import Array, Predictor, RoutingShape, Trainable
from emoe.prediction.registry import make_predictor

ORPHAN_CHECK_S = 2.0


def write_frame(pipe: BinaryIO, header: dict[str, Any], array: Array | None = None) -> None:
    """Write one frame, and all of it."""
    if array is not None:
        header = header | {"dtype": array.dtype.str, "shape": list(array.shape)}
    text = json.dumps(header).encode()
    pipe.write(struct.pack("<I", len(text)) + text + (b"" if array is None else np.ascontiguousarray(array).tobytes()))
    pipe.flush()


def read_frame(pipe: BinaryIO) -> tuple[dict[str, Any], Array | None] | None:
    """Read one frame: its header, and its array if it has one; None at the end, also in the middle of a frame."""
    size = pipe.read(4)
    if len(size) < 4:
        return None
    wanted = struct.unpack("<I", size)[0]
    text = pipe.read(wanted)
    if len(text) < wanted:
        return None
    header: dict[str, Any] = json.loads(text)
    if "shape" not in header:
        return header, None
    dtype = np.dtype(header["dtype"])
    count = int(np.prod(header["shape"], dtype=np.int64))
    raw = pipe.read(count * dtype.itemsize)
    if len(raw) < count * dtype.itemsize:
        return None
    return header, np.frombuffer(raw, dtype=dtype).reshape(header["shape"])


def memory_bytes() -> int:
    """This process's resident bytes; where there is no /proc, their peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build(name: str, shape: RoutingShape, state_file: str | None) -> Predictor:
    """The predictor by name, with the state of a safetensors file."""
    predictor = make_predictor(name, shape)
    if state_file is not None:
        from safetensors.numpy import load_file

        if not isinstance(predictor, Trainable):
            raise SystemExit(f"{name} has no state to restore")
        predictor.restore(load_file(state_file))
    return predictor


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Build the predictor that the first frame describes, then answer until the input ends."""
    first = read_frame(source)
    if first is None:
        return
    header = first[0]
    for module in header["imports"]:
        import_module(module)
    predictor = build(header["name"], RoutingShape(*header["routing"]), header["state"])
    write_frame(sink, {"kind": "ready", "memory": memory_bytes()})
    while (frame := read_frame(source)) is not None:
        header, array = frame
        if header["kind"] == "begin":
            predictor.begin_prompt(header["task"])
        elif header["kind"] == "observe" and array is not None:
            predictor.observe(array)
        else:
            started = time.perf_counter()
            shares = predictor.predict(header["task"])
            seconds = time.perf_counter() - started
            answer = {"kind": "answer", "ticket": header["ticket"], "seconds": seconds, "memory": memory_bytes()}
            write_frame(sink, answer, shares)


def end_with(parent: int) -> None:
    """Exit once the parent is gone, even if another process still holds our input open."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK_S)
    os._exit(0)


def main() -> None:
    """Serve on the standard streams; whatever else is printed goes to the error stream."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    try:
        serve(sys.stdin.buffer, sink)
    except BrokenPipeError:
        # The parent closed us in the middle of an answer: nobody waits for it any more.
        os._exit(0)


if __name__ == "__main__":
    main()
