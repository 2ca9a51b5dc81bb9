"""Attention of the engine, request by request, against transformers' one masked product over the whole step.

    python -m bench.engine_attention [--dtype bfloat16] [--steps 12] [--kinds alone,packed] [--layers] [--sinks]
                                     [--decode DIR] [--long DIR [--prompt N] [--budget SIZE] [--no-experts]]

Prints, for emoe-nano with all experts resident, prompt tokens/s and answer tokens/s by requests and KV length, and the
largest mask that transformers holds for it. With --layers, instead: one layer's attention of one query row and of four
by transformers' sdpa and by emoe's C, in microseconds, taking turns (`strided`: as the engine reads its pages).
With --sinks, instead: a prompt through one layer of gpt-oss' attention (64 heads over 8, sinks) by transformers' eager
attention and by emoe's, in milliseconds, MiB held at once beside the result, and the error against float64.
With --decode DIR: a token of that checkpoint with either, resident, after 64, 512 and 2048 tokens, in milliseconds.
With --long DIR: one prompt of that checkpoint through the engine, experts within a budget, by each of --kinds in a
process of its own: seconds, what resident memory grows by at most meanwhile, and the masks that transformers holds.
--no-experts leaves the experts out, which are the same either way and take most of the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import emoe
from emoe.engine import batching
from emoe.engine.attention import ATTENDS
from emoe.kernels.attention import few_rows
from emoe.kernels.choice import native_calls
from emoe.kernels.sinks import with_sinks
from emoe.model.attention import FEW_ROWS_SDPA
from emoe.model.bind import binding_of
from emoe.planner.live_bytes import LiveBytes

ALONE = dict(ATTENDS)


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


def use(kind: str) -> None:
    """Let engines made from now on attend request by request ("alone"), or as transformers does ("packed")."""
    ATTENDS.clear()
    if kind == "alone":
        ATTENDS.update(ALONE)


def one_long_prompt(
    folder: str, kind: str, prompt: int, budget: str, batch_tokens: int, experts: bool, dtype: str
) -> str:
    """Read it in chunks after one of 64 tokens; what `--long` prints."""
    torch.set_num_threads(1)
    model, _ = emoe.load(folder, expert_memory=budget, dtype=dtype)
    use(kind)
    runtime = binding_of(model).runtime
    runtime.dense_only = True
    batcher = batching.Batcher(
        model, greedy, page_tokens=32, kv_tokens=prompt + 64, max_batch_tokens=batch_tokens, max_running=8
    )
    runtime.dense_only = not experts
    masks = batcher._processor.inputs_and_outputs.attention_mask or {}
    mib = sum(each.nbytes for each in masks.values()) / 2**20
    tokens = torch.randint(5, 1000, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    for length in (64, prompt):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        start = time.perf_counter()
        batcher.add(str(length), tokens[:length], 1, ())
        while not batcher.empty:
            batcher.prepare()
            batcher.run()
            batcher.finish()
        seconds = time.perf_counter() - start
    return f"{kind:10} {prompt:8} {seconds:9.2f} {resident('VmHWM') - before:12.1f} {mib:9.1f}"


def resident(name: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def layers(dtype: torch.dtype, rounds: int) -> None:
    """Print one layer's attention; the mask leaves all keys, and one row needs none."""
    print(f"{'heads':>9} {'rows':>5} {'keys':>5} {'':8} {'sdpa us':>9} {'emoe us':>9}")
    calls = native_calls()
    if calls is None:
        raise SystemExit("there is no C compiler")
    for heads, key_heads, size in ((16, 16, 64), (16, 4, 64), (32, 4, 128)):
        module = nn.Module()
        module.num_key_value_groups = heads // key_heads  # type: ignore[assignment]
        for rows in (1, 4):
            for keys in (64, 512, 2048):
                for strided in (False, True):
                    query = torch.randn(1, heads, rows, size, dtype=dtype)
                    pages = torch.randn(2, 1, keys, key_heads, size, dtype=dtype).transpose(2, 3)
                    key, value = (pages if strided else pages.contiguous()).unbind()
                    mask = None if rows == 1 else torch.ones(1, 1, rows, keys, dtype=torch.bool)
                    times: tuple[list[float], list[float]] = ([], [])
                    for _ in range(rounds):
                        start = time.perf_counter()
                        sdpa_attention_forward(module, query, key, value, mask)
                        middle = time.perf_counter()
                        few_rows(calls, query, key, value, mask)
                        times[0].append(middle - start)
                        times[1].append(time.perf_counter() - middle)
                    theirs, ours = (statistics.median(each) * 1e6 for each in times)
                    layout = "strided" if strided else ""
                    print(f"{heads:3}/{key_heads:2}x{size:3} {rows:4} {keys:5} {layout:8} {theirs:9.0f} {ours:9.0f}")


def prompts_with_sinks(rounds: int) -> None:
    """Print time, memory and error of a prompt's attention with sinks, full and in a window of 128."""
    torch.manual_seed(0)
    module = nn.Module().eval()
    module.num_key_value_groups = 8  # type: ignore[assignment]
    print(f"{'tokens':>6} {'window':>6} {'':6} {'ms':>8} {'MiB':>8} {'rms error':>10}")
    for tokens in (64, 512, 1024):
        for window in (None, 128):
            query = torch.randn(1, tokens, 64, 64).bfloat16().transpose(1, 2)
            key, value = torch.randn(2, 1, tokens, 8, 64).bfloat16().transpose(2, 3)
            module.sinks = nn.Parameter(torch.randn(64).bfloat16(), requires_grad=False)
            seen = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
            mask = ((seen >= 0) & (seen < (window or tokens)))[None, None]
            added = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, torch.finfo(torch.bfloat16).min)
            truth, _ = eager_attention_forward(
                module, query.double(), key.double(), value.double(), added.double(), scaling=0.125
            )
            ways = {
                "eager": lambda: eager_attention_forward(module, query, key, value, added, scaling=0.125)[0],  # noqa: B023
                "emoe": lambda: with_sinks(query, key, value, mask, 0.125, module.sinks),  # noqa: B023
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way()
                    times[name].append(time.perf_counter() - start)
            for name, way in ways.items():
                with LiveBytes() as live:
                    out = way()
                error = float((out.double() - truth).pow(2).mean().sqrt())
                mib = (live.peak - out.nbytes) / 2**20
                took = statistics.median(times[name]) * 1e3
                print(f"{tokens:6} {window or '':>6} {name:6} {took:8.1f} {mib:8.1f} {error:10.6f}")


def decode(folder: str, dtype: str, rounds: int) -> None:
    """Print what a token takes with either attention, taking turns, by tokens before it."""
    model, _ = emoe.load(folder, dtype=dtype)
    for length in (64, 512, 2048):
        past = DynamicCache(config=model.config)
        times: dict[str, list[float]] = {"sdpa": [], FEW_ROWS_SDPA: []}
        with torch.no_grad():
            model(torch.randint(5, 1000, (1, length)), past_key_values=past, logits_to_keep=1)
            for _ in range(rounds):
                for name, seconds in times.items():
                    model.set_attn_implementation(name)
                    for _ in range(4):
                        start = time.perf_counter()
                        model(torch.tensor([[7]]), past_key_values=past)
                        seconds.append(time.perf_counter() - start)
        for name, seconds in times.items():
            print(f"{length:5} {name:10} {statistics.median(seconds) * 1e3:7.2f} ms (least {min(seconds) * 1e3:.2f})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kinds", default="alone,packed")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--layers", action="store_true", help="one layer by itself, without a model")
    parser.add_argument("--sinks", action="store_true", help="a prompt through one layer with sinks")
    parser.add_argument("--decode", metavar="DIR", help="a token of this checkpoint")
    parser.add_argument("--long", metavar="DIR", help="one long prompt of this checkpoint")
    parser.add_argument("--prompt", type=int, default=2048, help="its tokens")
    parser.add_argument("--budget", default="20%", help="of its experts")
    parser.add_argument("--no-experts", action="store_true", help="of --long: the dense part alone")
    parser.add_argument("--rounds", type=int, default=20, help="of --layers and --decode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.layers:
        layers(getattr(torch, arguments.dtype), arguments.rounds)
        return
    if arguments.sinks:
        prompts_with_sinks(arguments.rounds)
        return
    if arguments.decode:
        decode(arguments.decode, arguments.dtype, arguments.rounds)
        return
    if arguments.long:
        print(f"{'attention':10} {'tokens':>8} {'seconds':>9} {'MiB at most':>12} {'mask MiB':>9}")
        for kind in arguments.kinds.split(","):
            more = (arguments.prompt, arguments.budget, arguments.batch_tokens, not arguments.no_experts)
            with get_context("spawn").Pool(1) as pool:
                told = pool.apply(one_long_prompt, (arguments.long, kind, *more, arguments.dtype))
            print(told, flush=True)
        return
    model, _ = emoe.load(dtype=arguments.dtype)
    print(f"{'attention':10} {'requests':>8} {'KV':>5} {'prompt tokens/s':>16} {'answer tokens/s':>16} {'mask MiB':>9}")
    for requests in (1, 8, 32):
        for length in (64, 256, 960):
            for kind in arguments.kinds.split(","):
                use(kind)
                measure(model, min(requests, 2), 64, 2, arguments.batch_tokens)
                read, answer, mib = measure(model, requests, length, arguments.steps, arguments.batch_tokens)
                print(f"{kind:10} {requests:8} {length:5} {read:16.0f} {answer:16.0f} {mib:9.1f}", flush=True)


if __name__ == "__main__":
    main()
