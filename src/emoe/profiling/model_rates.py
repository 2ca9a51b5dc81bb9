"""What one checkpoint takes on this machine: its experts read from its files and computed, and the rest of a token.

`EngineRates` are of experts of one made-up size. Reading depends on how large an expert is and where its parts lie, and
a prompt's matrix products on how its matrices are stored and how many rows an expert gets: gpt-oss stores [in, out] and
gives 64 rows of a 512-token prompt to each of 32 experts, which take 1.3 times as long as the same from [out, in].
A token's layers are timed as the engine runs them, with none, one and all of their experts missing: what a load takes,
what computing hides of it and what reading costs computing beside it are in those times together.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.index import build_index
from emoe.checkpoint.memory_room import ReaderKind, memory_room
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.skeleton import skeleton
from emoe.kernels.choice import kernel_of
from emoe.kernels.chunks import grouped, many_tokens
from emoe.kernels.experts import ExpertMath, FirstOnly, Weights, one_token, one_token_arriving
from emoe.model.bind import LOADER_THREADS, binding_of, close, load
from emoe.planner import plan
from emoe.profiling.machine import PROMPT_TOKENS, ModelRates, TokenTimes
from emoe.profiling.rates import seconds_of, using_threads
from emoe.residency.bank import Bank, used_first
from emoe.residency.devices import device_at
from emoe.residency.loader import DEMAND, Load, Loader

DEPTH = 4
"""Loads under way while a layer's experts stream, as for a prompt."""
STEPS = 33
"""Tokens that are timed without their experts; the first is not counted."""


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
        config: Any = self.config.get_text_config(decoder=True)
        self.hidden: int = config.hidden_size
        self.top_k = min(config.num_experts_per_tok, self.index.layers[0].num_experts)
        # Twice what is under way or computed at once: what is read or computed next lies in no cache.
        self.bank = Bank(self.parts, 2 * max(DEPTH, self.top_k), device_at(torch.device("cpu")))
        for views in self.bank.views:  # memory that was never touched takes reads at half the speed, once
            for part in views.values():
                part.zero_()
        self.layers = [layer.layer for layer in self.index.layers if layer.parts == self.parts]
        self.keys = [(layer, e) for layer in self.layers for e in range(self.index.layer(layer).num_experts)]
        module = self.model.get_submodule(self.index.layers[0].module)
        self.dtype = next(iter(self.bank.views[0].values())).dtype
        self.math = ExpertMath(module, kernel_of("cpu", self.dtype))
        self.weights = [self.math.bind(views) for views in self.bank.views]
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
            nbytes += self.reader.read_into(self.index.pieces(*key), self.bank.views[turn % len(self.bank.views)])
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
                flights.append(self._begin((layer, expert), expert % len(self.bank.views)))
        while flights:
            nbytes += self._loader.wait(flights.popleft())
        return nbytes / (time.perf_counter() - start)

    def layer_s(self, missing: int, start: int) -> float:
        """Seconds of one token's experts of one layer, so many of them missing; in slots from `start` on."""
        slots = [(start + place) % len(self.weights) for place in range(self.top_k)]
        hidden = torch.zeros(1, self.hidden, dtype=self.dtype)
        gates = torch.ones(1, self.top_k, dtype=self.dtype)
        keys = self._draw.sample(self.keys, min(missing, len(self.keys)))
        begun = time.perf_counter()
        if missing:
            one_token_arriving(self.math, hidden, self._arriving(slots, keys), gates)
        else:
            one_token(self.math, hidden, [self.weights[slot] for slot in slots], gates)
        return time.perf_counter() - begun

    def _arriving(self, slots: list[int], keys: list[tuple[int, int]]) -> Iterator[tuple[list[int], list[Weights]]]:
        """As the engine's pool: what is there is computed first, then whatever has come or comes next."""
        there = len(slots) - len(keys)
        flights = {there + n: self._begin(key, slots[there + n]) for n, key in enumerate(keys)}
        if there:
            yield list(range(there)), [self.weights[slot] for slot in slots[:there]]
        while flights:
            place = next((place for place, load in flights.items() if load.done.is_set()), min(flights))
            if len(flights) == 1 and self._loader.wait_first(flights[place]):
                yield [place], FirstOnly([self.weights[slots[place]]])
            self._loader.wait(flights.pop(place))
            yield [place], [self.weights[slots[place]]]

    def _begin(self, key: tuple[int, int], slot: int) -> Load:
        pieces, views, first = self.index.pieces(*key), self.bank.views[slot], threading.Event()
        parts, read = used_first(views), self.reader.read_into
        return self._loader.submit(lambda: read(pieces, views, DEMAND, parts, first.set), "expert", first=first)

    def close(self) -> None:
        """Stop the threads."""
        self._loader.close()
        self.reader.close()


def measure_model(folder: Path, threads: int, seconds: float = 5.0) -> ModelRates:
    """Read and run experts of the checkpoint in `folder`, then the model without them, in about `seconds` and what
    indexing it and loading its dense weights take.

    Raises:
        CheckpointError, UnsupportedModelError: what loading it would raise.
        ReadError: an expert cannot be read.
    """
    each = seconds / 5
    with ExpertReads(folder) as reads, using_threads(threads), torch.inference_mode():
        one, stream = reads.one(each), reads.stream(each)
        flops = _flops(reads, each)
        direct = reads.reader.kind == "direct"
        layers = _layer_times(reads, 2 * each)
        top_k, dtype = reads.top_k, str(reads.dtype).removeprefix("torch.")
    del reads  # its bank makes room for the dense weights
    dense_s = _dense_s(folder, threads)
    token = None
    if dense_s is not None:
        first, every = layers[1] - layers[0], layers[top_k] - layers[0]
        token = TokenTimes(dense_s, layers[0], first, (every - first) / (top_k - 1) if top_k > 1 else first, dtype)
    return ModelRates(one if direct else None, stream if direct else None, flops, token)


def _layer_times(reads: ExpertReads, seconds: float) -> dict[int, float]:
    """Number of missing experts -> median seconds of a layer's experts of one token: none, one and all of them.

    Between two loads there is always a layer that misses nothing, as there mostly is while decoding.
    """
    turns = list(dict.fromkeys((1, reads.top_k)))
    times: dict[int, list[float]] = {missing: [] for missing in (0, *turns)}
    start, slot = time.perf_counter(), 0
    while len(times[0]) < 6 or time.perf_counter() - start < seconds:
        for missing in turns:
            for each in (0, missing):
                times[each].append(reads.layer_s(each, slot))
                slot = (slot + reads.top_k) % len(reads.weights)
    return {missing: statistics.median(found) for missing, found in times.items()}


def _dense_s(folder: Path, threads: int) -> float | None:
    """Median seconds of a token after PROMPT_TOKENS others (or half the positions) without its experts; None where
    memory has no room for the dense weights."""
    smallest = plan(folder, context=PROMPT_TOKENS + STEPS, prompt=PROMPT_TOKENS)
    if smallest.smallest_bytes > memory_room(with_own=True).available_bytes:
        return None
    model, _ = load(folder, expert_memory=smallest.floor_bytes)
    try:
        with using_threads(threads), torch.inference_mode():
            binding_of(model).runtime.dense_only = True
            most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            ids = torch.zeros(1, min(PROMPT_TOKENS, (most or 2 * PROMPT_TOKENS) // 2), dtype=torch.long)
            cache = model(input_ids=ids, logits_to_keep=1).past_key_values
            times = []
            for _ in range(min(STEPS, ids.shape[1])):
                begun = time.perf_counter()
                cache = model(input_ids=ids[:, :1], past_key_values=cache).past_key_values
                times.append(time.perf_counter() - begun)
    finally:
        close(model)
    return statistics.median(times[1:] or times)


def _flops(reads: ExpertReads, seconds: float) -> float:
    """Operations per second of the experts of a prompt of PROMPT_TOKENS tokens, each expert with its share of them."""
    weights, experts = reads.weights, reads.index.layers[0].num_experts
    rows = max(1, round(PROMPT_TOKENS * reads.top_k / experts))
    ids = torch.arange(len(weights)).repeat_interleave(rows)[:, None]
    hidden = torch.zeros(len(ids), reads.hidden, dtype=reads.dtype)
    gates = torch.ones(len(ids), 1, dtype=reads.dtype)
    grouping = grouped(reads.math, weights[0], reads.dtype, ids, len(weights))
    elements = sum(each.numel() for each in reads.bank.views[0].values())

    def prompt() -> None:
        many_tokens(reads.math, hidden, grouping, enumerate(weights), gates)

    return 2 * len(ids) * elements / seconds_of(prompt, seconds)
