"""Attention of the engine, request by request, against transformers' one masked product over the whole step.

    python -m bench.engine_attention [--dtype bfloat16] [--steps 12] [--kinds alone,packed]

Prints, for emoe-nano with all experts resident, prompt tokens/s and answer tokens/s by requests and KV length, and the
largest mask that transformers holds for it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

import emoe
from emoe.engine import batching
from emoe.engine.attention import IMPLEMENTATION
from emoe.model.bind import binding_of


def greedy(logits: torch.Tensor, requests: Sequence[str]) -> list[int]:
    """The likeliest tokens."""
    chosen: list[int] = logits.argmax(-1).tolist()
    return chosen


def measure(model: object, requests: int, length: int, steps: int, batch_tokens: int) -> tuple[float, float, float]:
    """Prompt tokens/s, answer tokens/s, and the mask's MiB."""
    runtime = binding_of(model).runtime  # type: ignore[arg-type]
    pages = -(-(length + steps + 2) // 32)
    runtime.dense_only = True
    batcher = batching.Batcher(
        model,  # type: ignore[arg-type]
        greedy,
        page_tokens=32,
        kv_tokens=requests * pages * 32,
        max_batch_tokens=batch_tokens,
        max_running=32,
    )
    runtime.dense_only = False
    mask = batcher._processor.inputs_and_outputs.attention_mask
    mib = 0.0 if mask is None else sum(each.nbytes for each in mask.values()) / 2**20
    generator = torch.Generator().manual_seed(1)
    for number in range(requests):
        prompt = torch.randint(5, 4000, (length,), generator=generator).tolist()
        batcher.add(str(number), prompt, steps + 2, ())
    start = time.perf_counter()
    while any(not part.answers for part in batcher.prepare()) or batcher._scheduler.waiting_requests:
        batcher.run()
        batcher.finish()
    batcher.run()
    batcher.finish()
    read_s = time.perf_counter() - start
    start, tokens = time.perf_counter(), 0
    for _ in range(steps):
        tokens += len(batcher.prepare())
        batcher.run()
        batcher.finish()
    decode_s = time.perf_counter() - start
    batcher.close()
    return requests * length / read_s, tokens / decode_s, mib


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kinds", default="alone,packed")
    parser.add_argument("--batch-tokens", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = emoe.load(dtype=arguments.dtype)
    print(f"{'attention':10} {'requests':>8} {'KV':>5} {'prompt tokens/s':>16} {'answer tokens/s':>16} {'mask MiB':>9}")
    for requests in (1, 8, 32):
        for length in (64, 256, 960):
            for kind in arguments.kinds.split(","):
                batching.IMPLEMENTATION = IMPLEMENTATION if kind == "alone" else "sdpa"
                measure(model, min(requests, 2), 64, 2, arguments.batch_tokens)
                read, answer, mib = measure(model, requests, length, arguments.steps, arguments.batch_tokens)
                print(f"{kind:10} {requests:8} {length:5} {read:16.0f} {answer:16.0f} {mib:9.1f}", flush=True)


if __name__ == "__main__":
    main()
