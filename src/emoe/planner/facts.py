"""What a plan has to know about a checkpoint: plain numbers, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emoe.checkpoint.codecs.formats import NATIVE
from emoe.errors import UsageError
from emoe.residency.budget import LayerNeed, padded

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element of the dtypes that models run in."""

CacheKind = Literal["full", "sliding", "latent", "state"]


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """One layer's experts. `part_nbytes`: bytes of each part of one expert as it lies in a slot, descending."""

    layer: int
    experts: int
    part_nbytes: tuple[int, ...]

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(self.part_nbytes)


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """What one decoder layer keeps between tokens, for each sequence.

    `token_nbytes` for each token it remembers (at most `window`, None: all), `state_nbytes` whatever the
    length.
    """

    layer: int
    kind: CacheKind
    token_nbytes: int
    window: int | None = None
    state_nbytes: int = 0

    def nbytes(self, tokens: int, whole: bool = False) -> int:
        """Bytes for one sequence of `tokens`; `whole` counts those beyond the window too."""
        held = tokens if whole or self.window is None else min(tokens, self.window)
        return self.state_nbytes + held * self.token_nbytes


@dataclass(frozen=True, slots=True)
class Activations:
    """What a forward pass makes and drops again, beside what the experts do.

    `token_nbytes` for each token of the fullest moment, `pair_nbytes` for each pair of tokens of one sequence (where
    attention scores are written out: eager attention, and keys and values of unequal size), `block_nbytes` at most in
    all where they are so block by block (emoe.kernels.sinks; 0: they are not), `masked` where layers
    need a mask even for a single sequence. `hidden`, `vocabulary` and `expert_inner` (outputs of an expert's first
    product: gate and up together where it has both) are widths in elements.

    Where the C kernels compute norms and attention, each token takes `native_token_nbytes` (0: nobody knows), and
    `native_cached_nbytes` while its keys join the cache; each takes `head_nbytes` as keys and values of one head in
    scratch memory. `gate_known`: whether they know what stands between an expert's two products.
    """

    hidden: int
    vocabulary: int
    expert_inner: int
    token_nbytes: int
    pair_nbytes: int = 0
    masked: bool = False
    block_nbytes: int = 0
    native_token_nbytes: int = 0
    native_cached_nbytes: int = 0
    head_nbytes: int = 0
    gate_known: bool = False

    def written(self, pairs: int) -> int:
        """Bytes of scores that are written out for that many pairs of tokens."""
        whole = pairs * self.pair_nbytes
        return min(whole, self.block_nbytes) if self.block_nbytes else whole


SCORES_BLOCK_BYTES = 48 << 20
"""What attention with sinks holds of scores where keys and values are of unequal size: emoe.kernels.sinks.BLOCK_BYTES
in float32, and in the run dtype as products and as weights."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A checkpoint in numbers. `source` says how they were found, `assumed` what had to be supposed.

    `lookup_bytes` are those of the dense weights of which a token reads a row only: an embedding that is not the output
    projection too. `expert_layers` have their bytes as `expert_dtype` stores experts; natively, in the run dtype, all
    of them are `native_expert_bytes`. `not_paged` says why the engine cannot serve it (`emoe.planner.paged`).
    `layers`: decoder layers, with experts or without.
    """

    path: Path
    model_type: str
    dtype: str
    top_k: int
    max_context: int | None
    checkpoint_bytes: int
    dense_bytes: int
    expert_layers: tuple[ExpertLayer, ...]
    cache_layers: tuple[CacheLayer, ...]
    activations: Activations
    source: Literal["headers", "dry run"]
    assumed: tuple[str, ...] = ()
    lookup_bytes: int = 0
    expert_dtype: str = NATIVE
    native_expert_bytes: int = 0
    not_paged: str = ""
    layers: int = 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.experts * layer.expert_nbytes for layer in self.expert_layers)

    @property
    def experts(self) -> int:
        """Number of experts in all layers."""
        return sum(layer.experts for layer in self.expert_layers)

    def cache_bytes(self, context: int, batch: int) -> int:
        """Bytes the model keeps for `batch` sequences of `context` tokens each."""
        return batch * sum(layer.nbytes(context) for layer in self.cache_layers)


def layer_needs(facts: Facts) -> list[LayerNeed]:
    """The experts as the budget arithmetic takes them: aligned slot sizes, layers of equal parts grouped."""
    groups: dict[tuple[int, ...], int] = {}
    return [
        LayerNeed(
            layer=layer.layer,
            experts=layer.experts,
            top_k=min(facts.top_k, layer.experts),
            slot_nbytes=sum(padded(layer.part_nbytes)),
            group=groups.setdefault(layer.part_nbytes, len(groups)),
        )
        for layer in facts.expert_layers
    ]


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of `dtype` ("bfloat16"). Raises UsageError for one that models do not run in."""
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def max_context(stated: object) -> int | None:
    """The longest sequence a configuration states, None where it states none."""
    return stated if isinstance(stated, int) and stated > 0 else None


def by_size(part_nbytes: Iterable[int]) -> tuple[int, ...]:
    """Parts in the order of ExpertLayer."""
    return tuple(sorted(part_nbytes, reverse=True))
