"""Whether llama.cpp takes the routes that a planted checkpoint was planted with, as emoe does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe.bench.client import WorkerClient
from emoe.bench.peers.build import worker_command
from emoe.bench.plant.card import ROUTES, read_card
from emoe.routing.trace import Trace

TOKENS = 32


@dataclass(frozen=True, slots=True)
class Agreement:
    """Routes counted for each token and layer: the same experts, in whatever order."""

    equal: int
    of: int

    @property
    def text(self) -> str:
        """For people."""
        return f"llama.cpp takes {self.equal} of {self.of} planted routes"


def planted_routes(folder: Path, gguf: Path, python: Path, tokens: int = TOKENS) -> Agreement:
    """Feed the first `tokens` of the trace planted in `folder` to llama.cpp one by one and compare its choices.

    Raises:
        UsageError: `folder` is not planted.
        TraceError: its routes are missing.
        WorkerError: llama.cpp failed.
    """
    tokens = min(tokens, read_card(folder).tokens)
    wanted = Trace.read(folder / ROUTES).experts[:tokens].tolist()
    command, environment = worker_command(python)
    with WorkerClient("llama.cpp", None, 1, command, environment) as client:
        load: dict[str, Any] = {
            "gguf": str(gguf),
            "threads": 1,
            "load_mode": "mmap",
            "repack": False,
            "context": tokens,
        }
        client.ask("load", **load, record=True)
        found = client.ask("routes", tokens=list(range(tokens)))["routes"]
    pairs = [
        (set(one), set(other))
        for row, planted in zip(found, wanted, strict=True)
        for one, other in zip(row, planted, strict=True)
    ]
    return Agreement(sum(one == other for one, other in pairs), len(pairs))
