"""Fitting a recorded trace to a shape: which of its tokens are planted, and their routes in the shape's own terms.

A trace of the shape's own layers x experts x k is taken as it is (its first layers, where the shape is cut). Any other
is resampled so that reuse distances, in tokens between two uses of one expert, stay those of the recording as far as
the two shapes allow; see `fit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emoe.bench.plant.routers import check_tokens
from emoe.bench.shapes import Shape
from emoe.errors import UsageError
from emoe.routing.trace import Array, Trace, id_dtype, missing_id


@dataclass(frozen=True, slots=True)
class Routes:
    """What is planted: `experts` [tokens, MoE layers, k], best first, and their weights or None.

    prompts: [start, end) of each; kept: what became of reuse distances, in words; resampled: whether anything did.
    """

    experts: Array
    weights: Array | None
    prompts: tuple[tuple[int, int], ...]
    resampled: bool
    kept: str

    @property
    def top_k(self) -> int:
        """Experts for each token and layer."""
        return int(self.experts.shape[2])


def read_trace(path: str | Path, shape: Shape) -> Trace:
    """The trace at `path`. A layout that does not say how many experts there are may not show the last of them: one
    that shows more than half of the shape's, and no more, is taken to be of the shape's number.

    Raises:
        TraceError: there is none, or it is damaged.
    """
    trace = Trace.read(path)
    if "layout" in trace.source and shape.experts < 2 * trace.num_experts and trace.num_experts < shape.experts:
        return Trace.read(path, num_experts=shape.experts)
    return trace


def fit(trace: Trace, shape: Shape, tokens: int, seed: int) -> Routes:
    """The first `tokens` of the trace's prompts, loops skipped, as routes of `shape`.

    With the shape's number of experts, its k or fewer, and enough layers the routes are the recorded ones. Otherwise
    each layer is made of recorded layers in three steps:

    1. *Side by side.* As many recorded layers as k needs, each keeping its own experts: every expert keeps every reuse
       distance. No two layers get the same set, and neighbours are made of neighbours. Weights are divided by the
       number of layers put together.
    2. *Split or merged*, where this gives another number of experts. Fewer than the shape's: experts are split in two
       (or more), of which one is used in each prompt; within prompts distances stay, between prompts they grow. More:
       experts that seldom go together are merged, and their distances shrink.
    3. *Thinned*, where more than k experts are chosen: those with the largest weights stay, so distances grow.

    OLMoE (64 experts, 8 chosen) from gpt-oss-20b (32 and 4) is step 1 alone.

    Raises:
        UsageError: too few tokens or layers recorded, or too many for the shape.
    """
    return _planted(trace, shape, tokens, seed)[0]


def fit_others(trace: Trace, shape: Shape, tokens: int, seed: int) -> tuple[Routes, tuple[int, ...]]:
    """Routes of the prompts that `fit` with the same arguments takes nothing of, made in the same way (the same layers
    side by side, the same experts merged), and their numbers in the trace. Loops are skipped too.

    Raises:
        UsageError: as `fit`; or there are no other prompts.
    """
    _, maker = _planted(trace, shape, tokens, seed)
    others = other_prompts(trace, tokens)
    if not others:
        raise UsageError(f"the trace has no prompts beside those of its first {tokens} tokens")
    spans = [(int(trace.offsets[n]), int(trace.offsets[n + 1])) for n in others]
    ends = np.cumsum([end - start for start, end in spans]).tolist()
    prompts = tuple(zip([0, *ends[:-1]], ends, strict=True))
    rows = np.concatenate([np.arange(*span) for span in spans])
    experts, weights, notes = _recorded(trace, shape, rows)
    if maker is None:
        return Routes(experts, weights, prompts, False, "; ".join(["every route as recorded", *notes])), others
    made, made_weights = maker.run(len(shape.moe_layers), experts, weights, prompts)
    return Routes(made, made_weights, prompts, True, "; ".join([maker.kept, *notes])), others


def _planted(trace: Trace, shape: Shape, tokens: int, seed: int) -> tuple[Routes, _Resampler | None]:
    """What `fit` returns, and what made it where it was resampled."""
    check_tokens(tokens, shape.hidden)
    rows, prompts = first_tokens(trace, tokens)
    layers, recorded = len(shape.moe_layers), trace.experts.shape[1]
    experts, weights, notes = _recorded(trace, shape, rows)
    if _same(trace, shape):
        if recorded < layers:
            raise UsageError(
                f"the trace has {recorded} layers and {shape.name} has {layers} with experts; plant fewer with --layers"
            )
        if trace.top_k < shape.top_k:
            notes.insert(0, f"{trace.top_k} of {shape.top_k} experts per token, as recorded")
        return Routes(experts, weights, prompts, False, "; ".join(["every route as recorded", *notes])), None
    maker = _Resampler(experts, trace.num_experts, shape, seed)
    made, made_weights = maker.run(layers, experts, weights, prompts)
    return Routes(made, made_weights, prompts, True, "; ".join([maker.kept, *notes])), maker


def _same(trace: Trace, shape: Shape) -> bool:
    """Whether the trace's routes are taken as they are."""
    return trace.num_experts == shape.experts and trace.top_k <= shape.top_k


def _recorded(trace: Trace, shape: Shape, rows: Array) -> tuple[Array, Array | None, list[str]]:
    """Routes and weights of some tokens, gaps filled, in the layers that are used; and what was filled, in words."""
    used = slice(len(shape.moe_layers) if _same(trace, shape) else trace.experts.shape[1])
    experts, filled = _filled(trace.experts[rows, used], trace.num_experts)
    weights = None if trace.weights is None else trace.weights[rows, used].astype(np.float32)
    return experts, weights, [f"{filled:.1%} of routes, not recorded, repeat a neighbouring token's"] if filled else []


def other_prompts(trace: Trace, tokens: int) -> tuple[int, ...]:
    """Numbers of the prompts that the first `tokens` tokens take nothing of, loops left out, and texts that are fed."""
    fed = _fed(trace, tokens)
    texts = {_text(trace, n) for n in fed} - {None}
    return tuple(
        n
        for n, about in enumerate(trace.prompts)
        if n not in fed
        and not about.get("repetition")
        and trace.offsets[n] < trace.offsets[n + 1]
        and _text(trace, n) not in texts
    )


def _text(trace: Trace, prompt: int) -> bytes | None:
    """The prompt's text as token ids, where the trace has it."""
    if trace.prompt_token_ids is None or trace.prompt_token_offsets is None:
        return None
    first, end = trace.prompt_token_offsets[prompt : prompt + 2]
    return trace.prompt_token_ids[first:end].tobytes()


def _fed(trace: Trace, tokens: int) -> list[int]:
    """Numbers of the prompts that the first `tokens` tokens are of; the last may be cut."""
    fed: list[int] = []
    there = 0
    for prompt, about in enumerate(trace.prompts):
        length = int(trace.offsets[prompt + 1] - trace.offsets[prompt])
        if there < tokens and length and not about.get("repetition"):
            fed.append(prompt)
            there += length
    return fed


def first_tokens(trace: Trace, tokens: int) -> tuple[Array, tuple[tuple[int, int], ...]]:
    """Rows of the first `tokens` tokens of prompts that are not marked as loops, and where each prompt lies in them.

    Raises:
        UsageError: the trace has fewer.
    """
    rows: list[Array] = []
    prompts: list[tuple[int, int]] = []
    start = 0
    for prompt in _fed(trace, tokens):
        first = int(trace.offsets[prompt])
        end = min(int(trace.offsets[prompt + 1]), first + tokens - start)
        rows.append(np.arange(first, end))
        prompts.append((start, start + end - first))
        start += end - first
    if start < tokens:
        raise UsageError(f"the trace has {start} tokens in prompts that do not loop; ask for at most {start}")
    return np.concatenate(rows), tuple(prompts)


def _filled(experts: Array, num_experts: int) -> tuple[Array, float]:
    """Routes without gaps, and the share that was filled: from the nearest later token that has them, else an earlier.

    Raises:
        UsageError: a layer has no complete route at all.
    """
    experts = experts.copy()
    absent = (experts == missing_id(experts.dtype)).any(axis=2)
    for layer in np.flatnonzero(absent.any(axis=0)):
        there = np.flatnonzero(~absent[:, layer])
        if not len(there):
            raise UsageError(f"the trace holds no complete route of layer {layer}; use another trace")
        gaps = np.flatnonzero(absent[:, layer])
        nearest = there[np.minimum(np.searchsorted(there, gaps), len(there) - 1)]
        experts[gaps, layer] = experts[nearest, layer]
    return experts.astype(id_dtype(num_experts)), float(absent.mean())


class _Resampler:
    """Makes routes of `shape` out of recorded ones. Which experts are merged follows from the `planted` routes
    [tokens, layers, k], whatever is made."""

    def __init__(self, planted: Array, num_experts: int, shape: Shape, seed: int) -> None:
        self.planted = planted.astype(np.int64)
        self.num_experts = num_experts
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.together = -(-shape.top_k // planted.shape[2])
        if self.together * num_experts > shape.experts:
            # Merging makes some of the chosen fall together: one more layer leaves enough of them.
            self.together += 1

    @property
    def kept(self) -> str:
        """What the steps leave of reuse distances."""
        found, chosen = self.together * self.num_experts, self.together * self.planted.shape[2]
        said = [f"{self.together} recorded layers side by side"] if self.together > 1 else []
        if found < self.shape.experts:
            said.append(f"{found} experts split into {self.shape.experts}, within prompts distances are kept")
        elif found > self.shape.experts:
            said.append(f"{found} experts merged into {self.shape.experts}, distances shrink")
        if chosen > self.shape.top_k:
            said.append(f"the best {self.shape.top_k} of {chosen} choices stay, distances grow")
        exact = found == self.shape.experts and chosen == self.shape.top_k
        return "resampled: " + ", ".join([*said, *(["every reuse distance is kept"] if exact else [])])

    def run(
        self, layers: int, recorded: Array, shares: Array | None, prompts: tuple[tuple[int, int], ...]
    ) -> tuple[Array, Array]:
        """Routes [tokens, layers, k] and their weights, of recorded ones and theirs."""
        recorded = recorded.astype(np.int64)
        shares = np.ones(recorded.shape, dtype=np.float32) / recorded.shape[2] if shares is None else shares
        sets = list(layer_sets(recorded.shape[1], self.together, layers))
        k = self.shape.top_k
        experts = np.zeros((len(recorded), layers, k), dtype=id_dtype(self.shape.experts))
        weights = np.zeros(experts.shape, dtype=np.float32)
        for layer, chosen in enumerate(sets):
            ids = self._side_by_side(recorded, chosen)
            gates = np.concatenate([shares[:, one] for one in chosen], axis=1) / self.together
            order = np.argsort(-gates, axis=1, kind="stable")
            ids, gates = np.take_along_axis(ids, order, 1), np.take_along_axis(gates, order, 1)
            count = self.together * self.num_experts
            if count < self.shape.experts:
                ids = self._split(ids, count, prompts)
            elif count > self.shape.experts:
                group = merged(self._side_by_side(self.planted, chosen), count, self.shape.experts)
                ids, gates = self._merge(group[ids], gates)
            experts[:, layer], weights[:, layer] = ids[:, :k], gates[:, :k]
        return experts, weights

    def _side_by_side(self, experts: Array, chosen: tuple[int, ...]) -> Array:
        """Ids [tokens, choices] of the chosen layers, each layer's experts numbered after those of the one before."""
        return np.concatenate([experts[:, one] + n * self.num_experts for n, one in enumerate(chosen)], axis=1)

    def _split(self, ids: Array, count: int, prompts: tuple[tuple[int, int], ...]) -> Array:
        """Each expert becomes the experts e, e + count, ..., as many as there are; each prompt uses one of them."""
        copies = (self.shape.experts - 1 - np.arange(count)) // count + 1
        made = ids.copy()
        for start, end in prompts:
            used = np.arange(count) + count * self.rng.integers(0, copies)
            made[start:end] = used[ids[start:end]]
        return made

    def _merge(self, group: Array, gates: Array) -> tuple[Array, Array]:
        """Experts fell into the shape's number of groups; of a token's choices in one group the best stays."""
        k = self.shape.top_k
        made = np.zeros((len(group), k), dtype=np.int64)
        weights = np.zeros((len(group), k), dtype=np.float32)
        recent: list[int] = list(range(self.shape.experts))
        for token, row in enumerate(group):
            _, first = np.unique(row, return_index=True)
            first = np.sort(first)[:k]
            chosen = row[first].tolist()
            found = gates[token, first].tolist()
            # Hardly ever: all choices fell into fewer than k groups. The most recent others fill up.
            for other in recent:
                if len(chosen) == k:
                    break
                if other not in chosen:
                    chosen.append(other)
                    found.append(found[-1] / 2)
            recent = chosen + [other for other in recent if other not in chosen]
            made[token], weights[token] = chosen, found
        return made, weights


def merged(ids: Array, count: int, groups: int) -> Array:
    """int64 [count]: a group for each expert, of sizes as equal as can be, such that those of one group are seldom
    chosen for the same token."""
    together = np.zeros((count, count), dtype=np.int64)
    for column in range(ids.shape[1]):
        for other in range(column):
            np.add.at(together, (ids[:, column], ids[:, other]), 1)
    together += together.T
    group = np.full(count, -1, dtype=np.int64)
    room = np.full(groups, count // groups, dtype=np.int64)
    room[: count % groups] += 1
    for expert in np.argsort(-together.sum(axis=1), kind="stable"):
        cost = np.array([together[expert, group == g].sum() for g in range(groups)], dtype=np.float64)
        cost[room == 0] = np.inf
        # Of equally good groups the one with the most room.
        best = int(np.lexsort((-room, cost))[0])
        group[expert] = best
        room[best] -= 1
    return group


def layer_sets(recorded: int, together: int, layers: int) -> Iterator[tuple[int, ...]]:
    """For each of `layers`, the `together` recorded layers it is made of; neighbours of neighbours, no set twice.

    Raises:
        UsageError: there are not so many sets.
    """
    seen: set[tuple[int, ...]] = set()
    # As far apart as they can be without beginning anew in the middle: what routes together is then independent, and
    # layers that follow each other are made of layers that follow each other.
    apart = recorded / max(together, 2)
    if layers < recorded and together > 1:
        apart = min(apart, (recorded - layers) // (together - 1))
    for step in sorted(range(1, max(2, recorded)), key=lambda step: abs(step - apart)):
        for first in range(recorded):
            if len(seen) == layers:
                return
            chosen = tuple((first + step * n) % recorded for n in range(together))
            ordered = tuple(sorted(chosen))
            if len(set(chosen)) == together and ordered not in seen:
                seen.add(ordered)
                yield chosen
    if len(seen) < layers:
        raise UsageError(
            f"{recorded} recorded layers, {together} at a time, make {len(seen)} layers without repeating one, and "
            f"{layers} are needed; plant fewer with --layers, or use a trace with more layers"
        )
