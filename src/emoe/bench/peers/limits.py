"""The least time for what each row did, on this machine, and the share of it reached.

All rows are fed the same tokens, so they route to the same experts: what emoe counted there in exact mode is what every
engine computes with. What was missing emoe counts too; of the others it is what the kernel fetched from storage for
them, whatever they fetched it for. A limit is of a row's own bytes: an engine that reads too much has a low one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from emoe.bench.limits import Done, Limits, counted, limit_of, link_of
from emoe.bench.peers.entries import LLAMA_EXPERT_BYTES, Entry
from emoe.bench.peers.results import Row
from emoe.planner.facts import Facts, dtype_bytes
from emoe.profiling.machine import Machine
from emoe.profiling.roofline import ModelWork, Work


def limits_of(rows: Sequence[Row], facts: Mapping[str, Facts], machine: Machine, prompt: int) -> None:
    """Set `limits` of each row that has samples.

    Args:
        rows: all of a comparison; emoe's first exact one with a sample of a round says what that round's prompt routes
            to. Without one, other engines have no limit of the first token.
        facts: the model, by expert dtype.
        machine: its rates.
        prompt: tokens of it.

    Raises:
        UsageError: a rate that is needed was not measured.
    """
    touched = _touched(rows)
    for row in rows:
        if row.samples:
            row.limits = _of(row, facts_of_entry(row.entry, facts[row.entry.precision]), machine, prompt, touched)


def facts_of_entry(entry: Entry, facts: Facts) -> Facts:
    """The model as the entry's engine reads it: llama.cpp's quantised experts take their own bytes."""
    if entry.peer != "llama.cpp" or entry.precision not in LLAMA_EXPERT_BYTES:
        return facts
    weight = LLAMA_EXPERT_BYTES[entry.precision]
    elements = facts.native_expert_bytes / dtype_bytes(facts.dtype) / facts.experts
    layers = tuple(replace(layer, part_nbytes=(round(elements * weight),)) for layer in facts.expert_layers)
    return replace(facts, expert_layers=layers)


def _touched(rows: Sequence[Row]) -> dict[int, float]:
    """Experts that the prompt of each round routes to."""
    found: dict[int, float] = {}
    for row in rows:
        if row.entry.contender is None or row.entry.contender.mode != "exact":
            continue
        for number, sample in row.samples.items():
            found.setdefault(number, sample["prefill"]["hits"] + sample["prefill"]["misses"])
    return found


def _of(row: Row, facts: Facts, machine: Machine, prompt: int, touched: Mapping[int, float]) -> Limits:
    steps: list[tuple[Done, Work]] = []
    prompts: list[tuple[Done, Work]] = []
    for number, sample in sorted(row.samples.items()):
        count = len(sample["step_s"])
        step = _done(sample, "decode", float(sum(sample["step_s"])), ModelWork(facts).routed_experts * count, count)
        steps.append((step, step.step(facts, prompt + count // 2)))
        if sample["prefill"] or number in touched:
            whole = _done(sample, "prefill", float(sample["first_token_s"]), touched.get(number, 0.0))
            prompts.append((whole, whole.prompt(facts, prompt)))
    named = {"decode": steps, "prefill": prompts}
    return {phase: limit_of(rounds, machine, row.entry.threads) for phase, rounds in named.items() if rounds}


def _done(sample: Mapping[str, Any], phase: str, seconds: float, touched: float, steps: int = 1) -> Done:
    """As emoe counted it; else `touched` experts of which as much was missing as came from storage."""
    storage = float(sample[f"{phase}_storage_bytes"])
    if sample[phase]:
        link = link_of(storage, sample[phase]["bytes_read"])
        return counted(seconds, sample[phase], link, steps)
    return Done(seconds / steps, touched / steps, storage / steps, "direct")
