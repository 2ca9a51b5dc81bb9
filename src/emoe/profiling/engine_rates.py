"""What emoe itself takes on this machine, beside the machine's own rates: the kernels' rates and the time of a layer.

Predictions (`emoe.profiling.speed`) are made of these, limits (`emoe.profiling.roofline`) of the machine's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from emoe.kernels.choice import kernel_of
from emoe.kernels.chunks import grouped, many_tokens
from emoe.kernels.dense import DenseKernels
from emoe.kernels.experts import ExpertMath, one_token
from emoe.profiling.machine import PROMPT_TOKENS, EngineRates
from emoe.profiling.rates import seconds_of, using_threads

HIDDEN, INNER, EXPERTS, TOP_K = 2048, 1024, 24, 8
"""The layer of experts that kernels are timed on: 302 MB in bfloat16, beyond any cache."""
DTYPE = "bfloat16"
TOKENS = 24
LAYER_S = 1.0
"""Seconds in which the embedded model decodes, at least."""


def measure_engine(threads: int, seconds: float = 4.0) -> EngineRates:
    """Time the kernels and the embedded model's decoding, in about `seconds` and what loading that model takes."""
    with using_threads(threads), torch.inference_mode():
        each = seconds / 6
        dense, dense_flops = _dense(each)
        expert, expert_flops = _experts(each)
        layer_s, token_s = _layer(dense, expert)
    return EngineRates(dense, expert, dense_flops, expert_flops, layer_s, token_s)


def _dense(seconds: float) -> tuple[float, float]:
    """Bytes per second with one row, operations per second with many, of linear layers in turn."""
    layers = [nn.Linear(HIDDEN, HIDDEN, bias=False, device="meta", dtype=getattr(torch, DTYPE)) for _ in range(48)]
    for layer in layers:
        layer.weight = nn.Parameter(torch.zeros(HIDDEN, HIDDEN, dtype=layer.weight.dtype), requires_grad=False)
    rows = torch.zeros(PROMPT_TOKENS, HIDDEN, dtype=getattr(torch, DTYPE))
    kernels = DenseKernels(nn.ModuleList(layers), kernel_of("cpu", rows.dtype))

    def run(x: torch.Tensor, count: int) -> Callable[[], object]:
        return lambda: [layer(x) for layer in layers[:count]]

    try:
        one = seconds_of(run(rows[:1], len(layers)), seconds)
        many = seconds_of(run(rows, 4), seconds)
    finally:
        kernels.remove()
    return len(layers) * HIDDEN**2 * rows.itemsize / one, 4 * 2 * PROMPT_TOKENS * HIDDEN**2 / many


def _experts(seconds: float) -> tuple[float, float]:
    """The same of a layer's experts."""
    dtype = getattr(torch, DTYPE)
    module = SimpleNamespace(has_gate=True, has_bias=False, is_transposed=False, _apply_gate=_gated)
    math = ExpertMath(cast(nn.Module, module), kernel_of("cpu", dtype))
    first = torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=dtype)
    down = torch.zeros(EXPERTS, HIDDEN, INNER, dtype=dtype)
    weights = [math.bind({"gate_up_proj": first[e], "down_proj": down[e]}) for e in range(EXPERTS)]
    expert_nbytes = (first.nbytes + down.nbytes) // EXPERTS
    hidden = torch.zeros(PROMPT_TOKENS, HIDDEN, dtype=dtype)
    gates = torch.full((PROMPT_TOKENS, TOP_K), 1 / TOP_K, dtype=dtype)

    def decode() -> None:
        for start in range(0, EXPERTS, TOP_K):  # each expert once: nothing stays in a cache
            one_token(math, hidden[:1], weights[start : start + TOP_K], gates[:1])

    ids = torch.arange(PROMPT_TOKENS * TOP_K).view(PROMPT_TOKENS, TOP_K) % EXPERTS
    grouping = grouped(math, weights[0], dtype, ids, EXPERTS)

    def prefill() -> None:
        many_tokens(math, hidden, grouping, ((e, weights[e]) for e in range(EXPERTS)), gates)

    operations = 2 * PROMPT_TOKENS * TOP_K * expert_nbytes / first.itemsize
    return EXPERTS * expert_nbytes / seconds_of(decode, seconds), operations / seconds_of(prefill, seconds)


def _gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _layer(dense_bytes_per_s: float, expert_bytes_per_s: float) -> tuple[float, float]:
    """Seconds of a layer and of a token, beside its bytes: the embedded model, everything resident."""
    from emoe import nano
    from emoe.model.bind import close, load
    from emoe.planner import facts_of
    from emoe.profiling.roofline import ModelWork

    _, facts = facts_of(nano.path())
    work = ModelWork(facts)
    bytes_s = work.dense_read_bytes() / dense_bytes_per_s + work.routed_bytes / expert_bytes_per_s
    model, _ = load(nano.path())
    try:
        ids = torch.arange(8)[None] + 10
        cache = model(input_ids=ids).past_key_values

        def step() -> None:
            nonlocal cache
            cache = model(input_ids=ids[:, :1], past_key_values=cache).past_key_values

        forward = seconds_of(step, LAYER_S)
        few, many = (min(_generate_s(model, ids, count) for _ in range(3)) for count in (TOKENS // 4, TOKENS))
    finally:
        close(model)
    generated = (many - few) / (TOKENS - TOKENS // 4)
    return max(forward - bytes_s, 0.0) / len(facts.expert_layers), max(generated - forward, 0.0)


def _generate_s(model: Any, ids: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - start
