"""Every tensor of a planted checkpoint, under the names that the published repository uses, in the order of its files.

gpt-oss is published in MXFP4; its experts are written here as transformers' own parameters of the dequantised model
(`gate_up_proj` [experts, hidden, 2 x inner], gate and up interleaved; `down_proj` [experts, inner, hidden]), bfloat16.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property

import torch

from emoe.bench.plant.routers import RESIDUAL, check_tokens, embeddings, next_token_head, router_weight
from emoe.bench.shapes import Shape
from emoe.bench.writing import TensorToWrite

DTYPE = torch.bfloat16

TILE_ELEMENTS = 2**24
"""Of the block of noise that all weights are cut from: 32 MiB for each scale (five of them)."""

STRIDE = 0x9E3779B1
"""Odd, so that the first 2**24 cuts of a tile whose size is a power of two begin at different places."""

Logits = Callable[[int], torch.Tensor]
"""Router logits [tokens, experts] of the MoE layer with this number, counted from the first."""


class Noise:
    """Normal noise, as fast as it can be written: cuts of one block, each beginning at another place.

    Drawing noise for every weight takes longer than writing it. Cuts are views: nothing is computed or copied.
    """

    def __init__(self, seed: int, largest: int) -> None:
        self._size = 2**16
        while self._size < min(largest, TILE_ELEMENTS):
            self._size *= 2
        self._seed = seed
        self._scaled: dict[float, torch.Tensor] = {}
        self._cuts = 0

    def tensor(self, name: str, shape: Sequence[int], std: float) -> TensorToWrite:
        """A tensor of noise. One of three dimensions begins anew for each of its first."""
        pieces = shape[0] if len(shape) > 2 else 1
        first = self._cuts
        self._cuts += pieces
        numel = math.prod(shape) // pieces

        def blocks() -> Iterator[torch.Tensor]:
            tile = self._of(std)
            for cut in range(first, first + pieces):
                start, left = cut * STRIDE % len(tile), numel
                while left:
                    block = tile[start : start + left]
                    yield block
                    left -= len(block)
                    start = 0

        return TensorToWrite(name, tuple(shape), DTYPE, blocks)

    @cached_property
    def _tile(self) -> torch.Tensor:
        return torch.randn(self._size, generator=torch.Generator().manual_seed(self._seed))

    def _of(self, std: float) -> torch.Tensor:
        if std not in self._scaled:
            self._scaled[std] = (self._tile * std).to(DTYPE)
        return self._scaled[std]


def given(name: str, make: Callable[[], torch.Tensor], *shape: int) -> TensorToWrite:
    """A tensor that is computed when it is written."""
    return TensorToWrite(name, shape, DTYPE, lambda: [make()])


def ones(name: str, size: int) -> TensorToWrite:
    """A norm's weight."""
    return given(name, lambda: torch.ones(size), size)


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for each thing that is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def rows_of(shape: Shape, vocabulary: int, tokens: int, seed: int) -> torch.Tensor:
    """The embeddings that `tensors_of` writes with the same arguments, before they are rounded."""
    return embeddings(tokens, vocabulary, shape.hidden, seed_of(seed, "embeddings"))


def tensors_of(
    shape: Shape, vocabulary: int, tokens: int, logits: Logits, seed: int, signs: torch.Tensor | None = None
) -> Iterator[TensorToWrite]:
    """Every tensor, in order. Values are made when they are written.

    `signs` [MoE layers, hidden], 1 or -1, are the weights of the norms before the experts; None: all 1.

    Raises:
        UsageError: more tokens than the hidden size has orthogonal rows.
    """
    check_tokens(tokens, shape.hidden)

    @cache
    def rows() -> torch.Tensor:
        return rows_of(shape, vocabulary, tokens, seed)

    write = _Layers(shape, Noise(seed_of(seed, "noise"), shape.hidden * shape.inner * 4))
    yield given("model.embed_tokens.weight", rows, vocabulary, shape.hidden)
    moe = shape.moe_layers
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield ones(f"{prefix}.input_layernorm.weight", shape.hidden)
        yield from write.latent_attention(prefix) if shape.layout == "deepseek_v2" else write.attention(prefix)
        norm = f"{prefix}.post_attention_layernorm.weight"
        if layer not in moe:
            yield ones(norm, shape.hidden)
            yield from write.mlp(f"{prefix}.mlp", shape.dense_inner)
            continue
        number = layer - moe.start
        own = torch.ones(shape.hidden) if signs is None else signs[number].float()
        yield given(norm, own.clone, shape.hidden)
        router = f"{prefix}.{_ROUTERS.get(shape.layout, 'mlp.gate')}"

        def weight(number: int = number, own: torch.Tensor = own) -> torch.Tensor:
            return router_weight(logits(number), rows()[:tokens] * own)

        yield given(f"{router}.weight", weight, shape.experts, shape.hidden)
        if shape.layout == "gpt_oss":
            yield given(f"{router}.bias", lambda: torch.zeros(shape.experts), shape.experts)
            yield from write.fused_experts(f"{prefix}.mlp.experts")
        else:
            yield from write.experts(prefix)
    yield ones("model.norm.weight", shape.hidden)
    yield given(
        "lm_head.weight", lambda: next_token_head(rows(), tokens, seed_of(seed, "head")), vocabulary, shape.hidden
    )


_ROUTERS = {"mixtral": "block_sparse_moe.gate", "gpt_oss": "mlp.router"}


class _Layers:
    """The tensors of one layer. Inputs of size 1 give inner values of size 1 and outputs of size RESIDUAL."""

    def __init__(self, shape: Shape, noise: Noise) -> None:
        self.shape = shape
        self.noise = noise

    def linear(
        self, name: str, rows: int, columns: int, gain: float = 1.0, bias: bool = False
    ) -> Iterator[TensorToWrite]:
        yield self.noise.tensor(f"{name}.weight", (rows, columns), gain / math.sqrt(columns))
        if bias:
            yield self.noise.tensor(f"{name}.bias", (rows,), gain / math.sqrt(columns))

    def attention(self, prefix: str) -> Iterator[TensorToWrite]:
        shape, name = self.shape, f"{prefix}.self_attn"
        bias = shape.layout == "gpt_oss"
        width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        yield from self.linear(f"{name}.q_proj", width, shape.hidden, bias=bias)
        yield from self.linear(f"{name}.k_proj", kv, shape.hidden, bias=bias)
        yield from self.linear(f"{name}.v_proj", kv, shape.hidden, bias=bias)
        yield from self.linear(f"{name}.o_proj", shape.hidden, width, RESIDUAL, bias=bias)
        if shape.layout == "gpt_oss":
            yield self.noise.tensor(f"{name}.sinks", (shape.heads,), 1.0)
        elif shape.layout == "qwen3_moe":  # of one head
            yield ones(f"{name}.q_norm.weight", shape.head_dim)
            yield ones(f"{name}.k_norm.weight", shape.head_dim)
        elif shape.layout == "olmoe":  # of all heads together
            yield ones(f"{name}.q_norm.weight", width)
            yield ones(f"{name}.k_norm.weight", kv)

    def latent_attention(self, prefix: str) -> Iterator[TensorToWrite]:
        """Keys and values through a narrow layer, as DeepSeek-V2 has them."""
        shape, name, sizes = self.shape, f"{prefix}.self_attn", self.shape.settings
        rope, plain, value = sizes["qk_rope_head_dim"], sizes["qk_nope_head_dim"], sizes["v_head_dim"]
        rank = sizes["kv_lora_rank"]
        yield from self.linear(f"{name}.q_proj", shape.heads * (plain + rope), shape.hidden)
        yield from self.linear(f"{name}.kv_a_proj_with_mqa", rank + rope, shape.hidden)
        yield ones(f"{name}.kv_a_layernorm.weight", rank)
        yield from self.linear(f"{name}.kv_b_proj", shape.heads * (plain + value), rank)
        yield from self.linear(f"{name}.o_proj", shape.hidden, shape.heads * value, RESIDUAL)

    def mlp(
        self, name: str, inner: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> Iterator[TensorToWrite]:
        gate, up, down = names
        yield from self.linear(f"{name}.{gate}", inner, self.shape.hidden)
        yield from self.linear(f"{name}.{up}", inner, self.shape.hidden)
        yield from self.linear(f"{name}.{down}", self.shape.hidden, inner, RESIDUAL)

    def experts(self, prefix: str) -> Iterator[TensorToWrite]:
        """One tensor for each expert and matrix; shared experts are one MLP beside them."""
        shape = self.shape
        for expert in range(shape.experts):
            if shape.layout == "mixtral":
                yield from self.mlp(f"{prefix}.block_sparse_moe.experts.{expert}", shape.inner, ("w1", "w3", "w2"))
            else:
                yield from self.mlp(f"{prefix}.mlp.experts.{expert}", shape.inner)
        if shape.shared:
            yield from self.mlp(f"{prefix}.mlp.shared_experts", shape.shared * shape.inner)

    def fused_experts(self, name: str) -> Iterator[TensorToWrite]:
        """gpt-oss: all experts of a layer in one tensor for each matrix, inputs first."""
        shape, noise = self.shape, self.noise
        into, out = 1 / math.sqrt(shape.hidden), RESIDUAL / math.sqrt(shape.inner)
        yield noise.tensor(f"{name}.gate_up_proj", (shape.experts, shape.hidden, 2 * shape.inner), into)
        yield noise.tensor(f"{name}.gate_up_proj_bias", (shape.experts, 2 * shape.inner), into)
        yield noise.tensor(f"{name}.down_proj", (shape.experts, shape.inner, shape.hidden), out)
        yield noise.tensor(f"{name}.down_proj_bias", (shape.experts, shape.hidden), out)
