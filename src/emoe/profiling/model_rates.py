"""What one checkpoint's own experts take on this machine: read from its files, and computed for a prompt.

`EngineRates` are of experts of one made-up size. Reading depends on how large an expert is and where its parts lie, and
a prompt's matrix products on how its matrices are stored and how many rows an expert gets: gpt-oss stores [in, out] and
gives 64 rows of a 512-token prompt to each of 32 experts, which take 1.3 times as long as the same from [out, in].
"""

from __future__ import annotations

import random
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.index import build_index
from emoe.checkpoint.readers import Reader, ReaderKind
from emoe.checkpoint.skeleton import skeleton
from emoe.kernels.choice import kernel_of
from emoe.kernels.chunks import many_tokens
from emoe.kernels.experts import ExpertMath
from emoe.kernels.grouping import Grouping, rounds_rows
from emoe.model.bind import LOADER_THREADS
from emoe.profiling.machine import PROMPT_TOKENS, ModelRates
from emoe.profiling.rates import seconds_of, using_threads
from emoe.residency.bank import Bank
from emoe.residency.devices import device_at
from emoe.residency.loader import Load, Loader

DEPTH = 4
"""Loads under way while a layer's experts stream, as for a prompt."""
SLOTS = 2 * DEPTH


class ExpertReads:
    """One checkpoint's experts, read into a bank of a few slots as the engine reads them; a context manager."""

    def __init__(self, folder: Path, kind: ReaderKind = "direct", seed: int = 0) -> None:
        """Index the checkpoint and open its files.

        Raises:
            CheckpointError, UnsupportedModelError: what loading it would raise.
        """
        self.config, self.model = skeleton(folder)
        self.index = build_index(folder, self.model)
        self.reader = Reader(kind, self.index.files)
        self.parts = self.index.layers[0].parts
        self.bank = Bank(self.parts, SLOTS, device_at(torch.device("cpu")))
        for views in self.bank.views:  # memory that was never touched takes reads at half the speed, once
            for part in views.values():
                part.zero_()
        self.layers = [layer.layer for layer in self.index.layers if layer.parts == self.parts]
        self.keys = [(layer, e) for layer in self.layers for e in range(self.index.layer(layer).num_experts)]
        self._draw = random.Random(seed)
        self._loader = Loader(LOADER_THREADS[self.reader.kind])

    def __enter__(self) -> ExpertReads:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def one(self, seconds: float) -> float:
        """Bytes per second of experts drawn at random, one after another: a miss while decoding."""
        start, nbytes, turn = time.perf_counter(), 0, 0
        while turn == 0 or time.perf_counter() - start < seconds:
            key = self._draw.choice(self.keys)
            nbytes += self.reader.read_into(self.index.pieces(*key), self.bank.views[turn % SLOTS])
            turn += 1
        return nbytes / (time.perf_counter() - start)

    def stream(self, seconds: float) -> float:
        """Bytes per second of whole layers, DEPTH loads under way: a prompt."""
        start, nbytes = time.perf_counter(), 0
        flights: deque[Load] = deque()
        while nbytes == 0 or time.perf_counter() - start < seconds:
            layer = self._draw.choice(self.layers)
            for expert in range(self.index.layer(layer).num_experts):
                if len(flights) == DEPTH:
                    nbytes += self._loader.wait(flights.popleft())
                views, pieces = self.bank.views[expert % SLOTS], self.index.pieces(layer, expert)
                flights.append(self._loader.submit(lambda p=pieces, v=views: self.reader.read_into(p, v), "expert"))  # type: ignore[misc]
        while flights:
            nbytes += self._loader.wait(flights.popleft())
        return nbytes / (time.perf_counter() - start)

    def close(self) -> None:
        """Stop the threads."""
        self._loader.close()
        self.reader.close()


def measure_model(folder: Path, threads: int, seconds: float = 3.0) -> ModelRates:
    """Read and run experts of the checkpoint in `folder`, in about `seconds` and what indexing it takes.

    Raises:
        CheckpointError, UnsupportedModelError: what loading it would raise.
        ReadError: an expert cannot be read.
    """
    with ExpertReads(folder) as reads, using_threads(threads), torch.inference_mode():
        one, stream = reads.one(seconds / 3), reads.stream(seconds / 3)
        flops = _flops(reads, seconds / 3)
        direct = reads.reader.kind == "direct"
    return ModelRates(one if direct else None, stream if direct else None, flops)


def _flops(reads: ExpertReads, seconds: float) -> float:
    """Operations per second of the experts of a prompt of PROMPT_TOKENS tokens, each expert with its share of them."""
    first, views = reads.index.layers[0], reads.bank.views
    dtype = next(iter(views[0].values())).dtype
    math = ExpertMath(reads.model.get_submodule(first.module), kernel_of("cpu", dtype))
    weights = [math.bind(each) for each in views]
    config: Any = reads.config.get_text_config(decoder=True)
    rows = max(1, round(PROMPT_TOKENS * min(config.num_experts_per_tok, first.num_experts) / first.num_experts))
    ids = torch.arange(len(weights)).repeat_interleave(rows)[:, None]
    hidden = torch.zeros(len(ids), config.hidden_size, dtype=dtype)
    gates = torch.ones(len(ids), 1, dtype=dtype)
    grouping = Grouping(ids, len(weights), rounded=rounds_rows(hidden.device, dtype))
    elements = sum(each.numel() for each in views[0].values())

    def prompt() -> None:
        many_tokens(math, hidden, grouping, enumerate(weights), gates)

    return 2 * len(ids) * elements / seconds_of(prompt, seconds)
