"""Products and attention of many rows of bfloat16, emoe's C kernels and torch's in turn, on one thread.

    python bench/many_rows.py [--shapes olmoe,gpt-oss] [--rows 9,16,32,64,128,512] [--rounds 5]

Products are of one expert's projections or a dense layer, each with a matrix that is in no cache; GFLOP/s of medians.
Attention is of a whole prompt, causal, and with a window of 128 given as a mask; milliseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from emoe.kernels.attention import many_rows
from emoe.kernels.choice import native_calls
from emoe.kernels.native.calls import COLUMNS, ROWS, TYPES, Calls, Matrix, Shape
from emoe.kernels.pages import prefer_huge_pages

PRODUCTS = {
    "olmoe": (("first", ROWS, 2048, 2048), ("down", ROWS, 1024, 2048)),
    "gpt-oss": (("first", COLUMNS, 2880, 5760), ("down", COLUMNS, 2880, 2880)),
}
"""Name, format, columns (in) and rows (out)."""

ATTENTIONS = {"olmoe": (16, 16, 128), "gpt-oss": (64, 8, 64)}
"""Heads, key heads, size."""

PROMPT, WINDOW, MATRICES = 512, 128, 8


def seconds(run: Callable[[int], object], rounds: int) -> float:
    """The median over rounds of one run with each of the matrices, for one."""
    run(0)
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for matrix in range(MATRICES):
            run(matrix)
        found.append((time.perf_counter() - start) / MATRICES)
    return statistics.median(found)


def products(calls: Calls, shape: str, counts: list[int], rounds: int) -> None:
    for name, form, columns, outputs in PRODUCTS[shape]:
        sizes = (outputs, columns) if form == ROWS else (columns, outputs)
        weights = torch.empty(MATRICES, *sizes, dtype=torch.bfloat16)
        prefer_huge_pages(weights)
        weights.copy_(torch.randn(sizes))
        bound = [Matrix(each.data_ptr(), None, None) for each in weights]
        plain = [each.t() if form == ROWS else each for each in weights]
        of = Shape(columns, outputs, form, TYPES[torch.bfloat16])
        for count in counts:
            x, out = torch.randn(count, columns).bfloat16(), torch.empty(count, outputs, dtype=torch.bfloat16)

            def ours(i: int) -> None:
                calls.many_products(of, ctypes.addressof(bound[i]), x, out)  # noqa: B023

            def theirs(i: int) -> None:
                torch.mm(x, plain[i], out=out)  # noqa: B023

            giga = 2e-9 * count * columns * outputs
            found = [giga / seconds(run, rounds) for run in (ours, theirs)]
            print(f"{shape} {name}, {count} rows: C {found[0]:.0f} GFLOP/s, torch {found[1]:.0f}", flush=True)


def attention(calls: Calls, shape: str, rounds: int) -> None:
    heads, key_heads, size = ATTENTIONS[shape]
    query = torch.randn(1, heads, PROMPT, size).bfloat16()
    key, value = (torch.randn(1, key_heads, PROMPT, size).bfloat16() for _ in range(2))
    causal = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril()[None, None]
    window = causal & ~causal.tril(-WINDOW)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ways: dict[str, Callable[[int], object]] = {
        "C causal": lambda _: many_rows(calls, query, key, value, None, causal=True),
        "torch causal": lambda _: sdpa(query, key, value, is_causal=True, enable_gqa=True),
        "C window": lambda _: many_rows(calls, query, key, value, window),
        "torch window": lambda _: sdpa(query, key, value, attn_mask=window, enable_gqa=True),
    }
    found = {name: seconds(run, rounds) for name, run in ways.items()}
    told = ", ".join(f"{name} {took * 1e3:.1f} ms" for name, took in found.items())
    print(f"{shape} attention of {PROMPT} tokens: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="olmoe,gpt-oss")
    parser.add_argument("--rows", default="9,16,32,64,128,512")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    calls = native_calls()
    if calls is None or not calls.knows_many:
        raise SystemExit("there are no C kernels for many rows on this machine: no compiler, or another processor")
    for shape in asked.shapes.split(","):
        products(calls, shape, [int(count) for count in asked.rows.split(",")], asked.rounds)
        attention(calls, shape, asked.rounds)


if __name__ == "__main__":
    main()
