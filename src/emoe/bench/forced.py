"""Feeding given tokens to a model, teacher-forced: a prompt in one pass, then the next ids one step at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from emoe.bench import feeding
from emoe.bench.engines import Running, Sample
from emoe.bench.feeding import Fed
from emoe.bench.process import memory, reset_peak, storage_bytes_read


def forced(model: Any, ids: torch.Tensor, prompt: int, chunk: int | None = None) -> Iterator[torch.Tensor]:
    """Run `model` over `ids` [batch, tokens]; yield the logits [batch, vocabulary] after the prompt and each step.

    The prompt is ids[:, :prompt], read in passes of `chunk` tokens (None: in one). Every step reads the next column,
    whatever the logits say. Works for emoe's models and plain transformers' alike.
    """
    cache = None
    starts = range(0, prompt, chunk or prompt)
    passes = [(start, min(start + (chunk or prompt), prompt)) for start in starts]
    with torch.inference_mode():
        for start, end in [*passes, *((at, at + 1) for at in range(prompt, ids.shape[1]))]:
            out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            if end >= prompt:
                yield out.logits[:, -1]


def replay(running: Running, ids: list[list[int]], prompt: int, base_bytes: int, chunk: int | None = None) -> Sample:
    """Feed `ids` [batch][tokens], a prompt of `prompt` first (in passes of `chunk`), and measure it."""
    fed = torch.tensor(ids)
    kept: list[torch.Tensor] = []
    tokens: list[int] = []
    counts = [running.counters()]
    read = storage_bytes_read()
    reset_peak()
    times, cpu = [time.perf_counter()], [time.process_time()]
    for logits in forced(running.model, fed, prompt, chunk):
        # Choosing the next token is part of a step, although another one is fed.
        tokens.append(int(logits.argmax(dim=-1)[0]))
        kept.append(logits)
        times.append(time.perf_counter())
        if len(kept) == 1:
            cpu.append(time.process_time())
            counts.append(running.counters())
    cpu.append(time.process_time())
    counts.append(running.counters())
    before, first, after = counts
    bits = hashlib.sha256()
    for logits in kept:
        bits.update(logits.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return Sample(
        tokens=tokens,
        first_token_s=times[1] - times[0],
        decode_s=times[-1] - times[1],
        first_token_cpu_s=cpu[1] - cpu[0],
        decode_cpu_s=cpu[2] - cpu[1],
        peak_bytes=memory().peak_bytes - base_bytes,
        storage_bytes=storage_bytes_read() - read,
        prefill={name: first[name] - before[name] for name in before},
        decode={name: after[name] - first[name] for name in before},
        step_s=[round(b - a, 6) for a, b in pairwise(times[1:])],
        batch=len(ids),
        checksum=bits.hexdigest()[:16],
    )


def feed(running: Running, prompt: list[int], given: list[int], seconds: float, base_bytes: int) -> Fed:
    """Feed `prompt`, then the `given` tokens one by one for as long as `seconds` allow, and measure it."""
    return feeding.feed(
        (logits[0] for logits in forced(running.model, torch.tensor([prompt + given]), len(prompt))),
        given,
        lambda logits, token: float(logits.double().log_softmax(-1)[token]),
        seconds=seconds,
        counters=running.counters,
        base_bytes=base_bytes,
    )
