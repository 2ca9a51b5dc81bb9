"""How fast experts come from the store on this machine, by the engine's own reader and loader threads."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from emoe.checkpoint.index import PartSpec
from emoe.model.bind import Binding, binding_of
from emoe.profiling.running import Answer
from emoe.residency.bank import Bank, carve
from emoe.residency.devices import Device
from emoe.residency.loader import Load
from emoe.tasks.profile import Timings

DEPTH = 4
"""Loads under way at once, as in a pool."""
MOST_S = 3.0
"""Seconds for each of the two measurements at most; at least three loads are timed."""


def measure_timings(
    model: PreTrainedModel, prompt_tokens: Sequence[int], answers: Sequence[Answer], *, loads: int = 64, seed: int = 0
) -> Timings:
    """Load random experts, one at a time and several at once, into slots of their own; add the answers' own times.

    What the page cache holds comes from memory: that is what the engine would see, too.

    Raises:
        ReadError: an expert could not be read.
    """
    binding = binding_of(model)
    keys = binding.index.keys()
    chosen = random.Random(seed).choices(keys, k=loads)
    slots = _Slots(binding)
    alone = []
    start = time.perf_counter()
    for key in chosen:
        began = time.perf_counter()
        binding.loader.wait(slots.start(key, 0))
        alone.append(time.perf_counter() - began)
        if len(alone) >= 3 and time.perf_counter() - start > MOST_S:
            break
    decodes = [each.decode_s / (len(each.ids) - 1) for each in answers if len(each.ids) > 1]
    prefills = [each.prefill_s / count for each, count in zip(answers, prompt_tokens, strict=True)]
    return Timings(
        load_bytes_per_s=_bandwidth(binding, slots, chosen),
        expert_load_s=statistics.median(alone),
        token_s=_undisturbed(decodes),
        prefill_token_s=_undisturbed(prefills),
        reader=binding.reader.kind,
        device=slots.device.type,
    )


def _undisturbed(seconds: Sequence[float]) -> float | None:
    """The fastest tenth's slowest: recording takes long, and other programs slow parts of it down.

    On two cores shared by eight processes emoe-nano took 26 ms for a token in the median answer, 10 here, 4 alone.
    """
    ordered = sorted(seconds)
    return ordered[len(ordered) // 10] if ordered else None


def _bandwidth(binding: Binding, slots: _Slots, keys: Sequence[tuple[int, int]]) -> float:
    """Bytes per second with DEPTH loads under way, each in a slot of its own."""
    flights: deque[Load] = deque()
    nbytes, ended = 0, 0
    start = time.perf_counter()
    for number, key in enumerate(keys):
        if len(flights) == DEPTH:
            nbytes += binding.loader.wait(flights.popleft())
            ended += 1
        if ended >= 3 and time.perf_counter() - start > MOST_S:
            break
        flights.append(slots.start(key, number % DEPTH))
    while flights:
        nbytes += binding.loader.wait(flights.popleft())
    return nbytes / (time.perf_counter() - start)


class _Slots:
    """Scratch memory for DEPTH experts of any layer, on the experts' devices."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._scratch: dict[int, tuple[Bank, Device]] = {}
        banks: dict[tuple[int, tuple[PartSpec, ...]], tuple[Bank, Device]] = {}
        for pool in binding.pools:
            device = pool.bank.home
            key = (id(device), pool.bank.parts)  # layers whose parts have other shapes lie in other banks
            if key not in banks:
                banks[key] = (Bank(pool.bank.parts, DEPTH, device), device)
            self._scratch |= dict.fromkeys(pool.table.experts, banks[key])
        self.device = binding.pools[0].bank.device
        self._local = threading.local()

    def start(self, key: tuple[int, int], slot: int) -> Load:
        """Queue a load of one expert into a slot."""
        bank, device = self._scratch[key[0]]
        what = f"expert {key[1]} of layer {key[0]}"
        return self._binding.loader.submit(lambda: self._read(key, bank, device, slot), what)

    def _read(self, key: tuple[int, int], bank: Bank, device: Device, slot: int) -> int:
        pieces = self._binding.index.pieces(*key)
        if not device.copies:
            return self._binding.reader.read_into(pieces, bank.views[slot])
        staging = self._staging(bank, device)
        nbytes = self._binding.reader.read_into(pieces, carve(staging, bank.parts))
        device.finish(device.copy(staging, bank.memories[slot], (), ahead=False))
        return nbytes

    def _staging(self, bank: Bank, device: Device) -> torch.Tensor:
        """Host memory of this thread's own: pinning anew would take longer than the load."""
        kept: dict[int, torch.Tensor] = self._local.__dict__.setdefault("staging", {})
        if id(bank) not in kept:
            kept[id(bank)] = device.host(bank.slot_nbytes).memory
        return kept[id(bank)]
