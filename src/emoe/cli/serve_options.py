"""The options of `emoe serve`, in groups."""

from __future__ import annotations

import argparse
import math
import re

from emoe.cli.layers import Layers
from emoe.cli.options import add_json, add_loading, add_model, add_process_memory, positive, size
from emoe.engine.interface import EngineSettings, TaskTargets
from emoe.scheduling.registry import SCHEDULERS

_ENGINE = EngineSettings()


def add_options(layers: Layers) -> None:
    """All of them."""
    _add_memory(layers)
    _add_scheduling(layers)
    _add_server(layers)
    _add_limits(layers)
    watching = layers.group("observability")
    watching.add_argument(
        "--status-interval", type=_seconds, metavar="S", default=10.0, help="between status lines, 0: none (default 10)"
    )
    watching.add_argument("--dry-run", action="store_true", help="print what would take how much memory, and exit")
    add_json(watching)


def _add_memory(layers: Layers) -> None:
    memory = layers.group("model and memory")
    add_model(memory)
    memory.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="what may be used where the model runs, of the process's memory or the device's; experts get what is left "
        "of it (default: what is free there)",
    )
    add_process_memory(memory)
    memory.add_argument(
        "--kv-memory",
        type=size,
        metavar="SIZE",
        help="memory for keys and values of all requests (default: 16384 tokens' worth, or one context's)",
    )
    memory.add_argument(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="tokens of a prompt and its answer together (default: 8192, or the model's most)",
    )
    add_loading(memory)
    memory.add_argument(
        "--max-read-bytes-per-s", type=size, metavar="SIZE", help="slow the store down, to see what a slower disk does"
    )


def _add_scheduling(layers: Layers) -> None:
    group = layers.group("scheduling")
    group.add_argument(
        "--scheduler",
        choices=tuple(SCHEDULERS),
        default=_ENGINE.scheduler,
        help="who is admitted next: fifo; edf: earliest first-token deadline; emoe: the paper's Algorithm 1; affinity: "
        "deadlines, and whose experts are resident (default: affinity)",
    )
    group.add_argument(
        "--max-num-seqs",
        "--max-running",
        type=positive,
        metavar="N",
        default=_ENGINE.max_running,
        help=f"requests in a step at most (default: {_ENGINE.max_running})",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        "--max-batch-tokens",
        type=positive,
        metavar="N",
        default=_ENGINE.max_batch_tokens,
        help=f"tokens of a step; longer prompts are read in chunks (default: {_ENGINE.max_batch_tokens})",
    )
    group.add_argument(
        "--max-input-tokens",
        type=positive,
        metavar="N",
        help="input tokens of all running requests, T_max of Algorithm 1 (default: as many as KV memory holds)",
    )
    group.add_argument(
        "--slo-ttft-ms", type=_milliseconds, metavar="MS", help="default target for the time to the first token"
    )
    group.add_argument(
        "--slo-tpot-ms", type=_milliseconds, metavar="MS", help="default target for the mean time of each later token"
    )
    group.add_argument(
        "--task-slo",
        type=task_slo,
        action="append",
        metavar="TASK=TTFT/TPOT",
        help="a task's default targets, e.g. qa=500/50 or code=/100; repeatable",
    )


def _add_server(layers: Layers) -> None:
    server = layers.group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1, this machine)")
    server.add_argument("--port", type=number_of_port, default=8000, metavar="N", help="0: a free one (default: 8000)")
    server.add_argument(
        "--served-model-name", type=_some, metavar="NAME", help="what clients call the model (default: its name)"
    )
    server.add_argument(
        "--api-key", type=_some, metavar="KEY", help="clients must send it as Bearer token; better EMOE_API_KEY"
    )
    server.add_argument(
        "--cors-origin",
        type=origin,
        action="append",
        metavar="ORIGIN",
        help="an origin whose pages may call the server, * for all; repeatable (default: none)",
    )


def _add_limits(layers: Layers) -> None:
    limits = layers.group("limits")
    limits.add_argument(
        "--max-queue",
        type=positive,
        metavar="N",
        default=_ENGINE.max_waiting,
        help=f"requests that may wait; one more gets 429 (default: {_ENGINE.max_waiting})",
    )
    limits.add_argument(
        "--max-connections",
        type=positive,
        metavar="N",
        help="open at once; beyond, idle ones are closed, and where none is idle requests get 503, but for /health and "
        "/metrics (default: twice what may wait and run, at least 512)",
    )
    limits.add_argument(
        "--max-body-size", type=_room, metavar="SIZE", default=4 << 20, help="of a request (default: 4MiB)"
    )
    limits.add_argument(
        "--request-timeout",
        type=_seconds,
        metavar="S",
        default=600.0,
        help="a request that takes longer, waiting included, ends with an error; 0: never (default: 600)",
    )
    limits.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        metavar="S",
        default=30.0,
        help="what running requests get to finish once the server is told to stop (default: 30)",
    )
    limits.add_argument(
        "--keep-alive", type=_pause, metavar="S", default=15.0, help="comments in silent streams (default: every 15)"
    )
    limits.add_argument(
        "--write-timeout",
        type=_pause,
        metavar="S",
        default=60.0,
        help="for which a client may leave a stream unread (default: 60)",
    )


def _seconds(text: str) -> float:
    """argparse type for a duration."""
    return _number(text, "a number of seconds", zero=True)


def _pause(text: str) -> float:
    """argparse type for a duration that cannot be none."""
    return _number(text, "a number of seconds above 0")


def _milliseconds(text: str) -> float:
    """argparse type for a target."""
    return _number(text, "a number of milliseconds above 0")


def _number(text: str, what: str, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
    return value


def _room(text: str) -> int:
    """argparse type for bytes, one at least."""
    value = size(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text!r}")
    return value


def _some(text: str) -> str:
    """argparse type for a name or a key."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: leave it out, or give one")
    return text


def origin(text: str) -> str:
    """argparse type for a page's origin, exactly as browsers send it: anything else would never be met."""
    text = text.strip()  # a list in the environment may have spaces after its commas
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s*@A-Z]+", text):
        raise argparse.ArgumentTypeError(f"must be like https://chat.example:8443, without a path, or *, not {text!r}")
    return text


def number_of_port(text: str) -> int:
    """argparse type for a TCP port."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, not {text!r}")
    return int(text)


def task_slo(text: str) -> tuple[str, TaskTargets]:
    """argparse type for a task's targets."""
    task, equals, targets = text.partition("=")
    ttft, slash, tpot = targets.partition("/")
    if not (task.strip() and equals and slash and (ttft or tpot)):
        raise argparse.ArgumentTypeError(f"must be like qa=500/50, qa=500/ or qa=/50 (milliseconds), not {text!r}")
    values = [_milliseconds(each) if each else None for each in (ttft.strip(), tpot.strip())]
    return task.strip(), TaskTargets(ttft_slo_s=in_seconds(values[0]), tpot_slo_s=in_seconds(values[1]))


def in_seconds(milliseconds: float | None) -> float | None:
    """Of milliseconds."""
    return None if milliseconds is None else milliseconds / 1e3
