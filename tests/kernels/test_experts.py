"""Kernels: the order in which experts become ready changes no bit, and the arithmetic is the plain formula's."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emoe.kernels.chunks import many_tokens
from emoe.kernels.combining import COMBINE_TOKENS, combine
from emoe.kernels.experts import ExpertMath, FirstOnly, Weights, one_token, one_token_arriving
from emoe.kernels.grouping import Grouping, round_rows


class Experts(nn.Module):
    """What transformers' decorator leaves on a gated experts module."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False
    act_fn = nn.SiLU()

    def _apply_gate(self, inner: torch.Tensor) -> torch.Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def make(experts: int, hidden: int, width: int, dtype: torch.dtype, seed: int) -> tuple[ExpertMath, list[Weights]]:
    generator = torch.Generator().manual_seed(seed)
    math = ExpertMath(Experts())
    weights = []
    for _ in range(experts):
        first = torch.randn(2 * width, hidden, generator=generator).to(dtype)
        down = torch.randn(hidden, width, generator=generator).to(dtype)
        weights.append(math.bind({"gate_up_proj": first, "down_proj": down}))
    return math, weights


@given(
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rounded=st.booleans(),
)
def test_the_order_of_arrival_changes_no_bit(
    tokens: int, top_k: int, seed: int, dtype: torch.dtype, rounded: bool
) -> None:
    experts, hidden = 6, 32
    math, weights = make(experts, hidden, 24, dtype, seed)
    x = torch.randn(tokens, hidden).to(dtype)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    gates = torch.rand(tokens, top_k).softmax(-1).to(dtype)
    grouping = Grouping(ids, experts, rounded=rounded)
    order = list(grouping.counts)
    one = many_tokens(math, x, grouping, [(e, weights[e]) for e in order], gates)
    random.Random(seed).shuffle(order)
    assert torch.equal(one, many_tokens(math, x, grouping, [(e, weights[e]) for e in order], gates))

    expected = torch.zeros(tokens, hidden)
    for t in range(tokens):
        for choice in range(top_k):
            w = weights[int(ids[t, choice])]
            assert isinstance(w.first, torch.Tensor)
            assert isinstance(w.down, torch.Tensor)
            gate, up = (x[t].float() @ w.first.float()).chunk(2)
            out = (torch.nn.functional.silu(gate) * up) @ w.down.float()
            expected[t] += gates[t, choice].float() * out
    tolerance = 1e-3 if dtype is torch.float32 else 0.08
    torch.testing.assert_close(one.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    if tokens == 1:
        alone = one_token(math, x, [weights[int(e)] for e in ids[0]], gates)
        scale = float(expected.abs().max())
        torch.testing.assert_close(alone.float(), expected, rtol=tolerance, atol=tolerance * scale)


@given(
    hidden=st.integers(1, 70),
    width=st.integers(1, 50),
    order=st.permutations(range(4)),
    cuts=st.lists(st.booleans(), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_one_token_has_the_same_bits_however_its_experts_arrive(
    hidden: int, width: int, order: list[int], cuts: list[bool], dtype: torch.dtype, seed: int
) -> None:
    math, weights = make(4, hidden, width, dtype, seed)
    x, gates = torch.randn(1, hidden).to(dtype), torch.rand(1, 4).softmax(-1).to(dtype)
    at_once = one_token(math, x, weights, gates)
    ready = waves(order, cuts, weights)
    assert torch.equal(at_once, one_token_arriving(math, x, ready, gates))
    places, last = ready[-1]
    assert torch.equal(at_once, one_token_arriving(math, x, [*ready[:-1], (places, FirstOnly(last)), ready[-1]], gates))


def waves(order: list[int], cuts: list[bool], weights: list[Weights]) -> list[tuple[list[int], list[Weights]]]:
    """Places in some order, in groups that end where a cut is, and the experts for them."""
    groups: list[list[int]] = [[order[0]]]
    for place, cut in zip(order[1:], cuts, strict=True):
        if cut:
            groups.append([])
        groups[-1].append(place)
    return [(group, [weights[place] for place in group]) for group in groups]


@given(
    tokens=st.integers(0, 30),
    top_k=st.integers(1, 4),
    experts=st.integers(4, 9),
    seed=st.integers(0, 999),
    rounded=st.booleans(),
)
def test_grouping_is_a_partition_of_the_routes(tokens: int, top_k: int, experts: int, seed: int, rounded: bool) -> None:
    ids = torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    grouping = Grouping(ids, experts, rounded=rounded)
    place = grouping.place.tolist()
    assert len(set(place)) == tokens * top_k
    ends, end = {}, 0
    for expert, size in grouping.blocks.items():
        assert size == (round_rows(grouping.counts[expert]) if rounded else grouping.counts[expert])
        ends[expert] = (end, end := end + size)
    assert len(grouping.gather) == end
    for pair, row in enumerate(place):
        expert = int(ids.reshape(-1)[pair])
        assert ends[expert][0] <= row < ends[expert][0] + grouping.counts[expert]
        assert grouping.gather[row] == pair // top_k
    counts = [grouping.counts[expert] for expert in grouping.by_count()]
    assert counts == sorted(counts, reverse=True)


@given(st.integers(1, 1 << 20))
def test_rounding_adds_at_most_a_quarter_and_makes_few_shapes(n: int) -> None:
    assert n <= round_rows(n) <= max(n, 1.25 * n)
    assert round_rows(round_rows(n)) == round_rows(n)


def test_a_chunk_of_4096_tokens_meets_44_shapes_at_most() -> None:
    assert len({round_rows(n) for n in range(1, 4097)}) == 44


def test_combining_in_blocks_is_combining_at_once() -> None:
    tokens, k = COMBINE_TOKENS + 7, 2
    outer = torch.randn(tokens * k, 8)
    gates = torch.rand(tokens, k)
    whole = (outer.view(tokens, k, 8) * gates[..., None]).sum(1)
    assert torch.equal(combine(outer, gates, torch.float32), whole)
