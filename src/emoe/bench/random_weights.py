"""Random-weight checkpoints of named shapes, to measure on: written tensor by tensor, in hub layout.

Routing would be uniform, and independent from token to token, if all weights were plain noise: a cache would then see
the worst case, which no trained model shows. Here every token's embedding is a sum of three random directions,

    embedding(token) = common * u  +  topical * v[topic of the token]  +  own * w[token],

and routers are plain noise over it, so that each has a popularity that holds for all text (through u), one that holds
for a topic (through v) and a choice of the token's own. The output projection prefers tokens of the topic it sees, so
generated text stays in the topic of its prompt for a while, as real text does; it is blind to u, so no token
dominates. The weights of the three are chosen so that caches find about what they find on the recorded routes of
gpt-oss-20b (4 of 32 experts). Over 16 prompts of 32 new tokens each, an LRU of 20, 40, 60 and 80 % of each layer's
experts hits .39, .75, .89 and .95 here and .46, .72, .87 and .96 there; a token shares .34 of its experts with the
one before here and .40 there; a layer's favourite fifth of experts takes .46 here and .42 there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from emoe.bench.shapes import Shape
from emoe.bench.writing import Progress, TensorToWrite, write_checkpoint, write_json
from emoe.errors import UsageError

CARD = "emoe_bench.json"
"""Written last into a checkpoint's folder: what it is, and that it is complete."""

SHARD_BYTES = 10**9
BLOCK_ELEMENTS = 2**22  # 16 MiB of float32 at a time
TOPICS = 8
COMMON, TOPICAL = 0.4, 0.52
OWN = math.sqrt(1 - COMMON**2 - TOPICAL**2)
"""How much of an embedding is of each direction: the squares add up to 1."""

DTYPE = torch.bfloat16
GENERATION = {"do_sample": False, "repetition_penalty": 5.0}
"""Greedy, and in effect no token twice: left alone, random weights soon repeat a handful of tokens, whose experts any
cache would then hold."""

Blocks = Callable[[int, int], torch.Tensor]
"""Rows [start, end) of a matrix, float32."""


_SETTINGS = {"max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}


def _qwen(inner: int, top_k: int) -> dict[str, Any]:
    """Settings; layers without experts, of which there are none, would compute as much as those with."""
    return _SETTINGS | {"intermediate_size": inner * top_k}


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen3-moe-2.5gb", "", "qwen3_moe", 1024, 12, 64, 512, 8, 8192, 16, 4, 64, _qwen(512, 8)),
        Shape("qwen3-moe-0.4gb", "", "qwen3_moe", 512, 8, 64, 256, 8, 8192, 8, 2, 64, _qwen(256, 8)),
        Shape("mixtral-1.2gb", "", "mixtral", 1024, 8, 8, 2816, 2, 8192, 16, 4, 64, _SETTINGS),
        Shape("tiny", "", "qwen3_moe", 64, 3, 16, 32, 2, 256, 4, 2, 16, _qwen(32, 2)),
        Shape("tiny-mixtral", "", "mixtral", 64, 2, 8, 48, 2, 256, 4, 2, 16, _SETTINGS),
    )
}
"""Shapes by name. Adding one is one entry here."""


def total_bytes(shape: Shape) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(shape, seed=0))


def shape_of(name: str) -> Shape:
    """The shape called `name`. Raises UsageError for any other."""
    if name not in SHAPES:
        raise UsageError(f"no shape is called {name!r}; use one of {', '.join(SHAPES)}")
    return SHAPES[name]


def make_checkpoint(shape: str | Shape, folder: str | Path, seed: int = 0, progress: Progress | None = None) -> Path:
    """Write a checkpoint of `shape` to `folder` and return it; if it is there already, only return it.

    The same shape and seed give the same bytes. Memory use is a few tens of MiB whatever the shape. The folder appears
    under its name only when it is complete.

    Args:
        shape: a name of `SHAPES`, or a shape of one's own.
        folder: where to; it must not exist, be empty, or hold the same shape and seed.
        seed: of the weights.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: no such shape, or `folder` holds something else.
        CheckpointError: the disk has not that much room.
    """
    shape = shape_of(shape) if isinstance(shape, str) else shape
    folder = Path(folder)
    card = card_of(folder)
    if card is not None and (card["shape"], card["seed"]) == (shape.name, seed):
        return folder

    def others(work: Path) -> None:
        write_json(shape.config(), work / "config.json")
        write_json(GENERATION, work / "generation_config.json")
        write_json({"shape": shape.name, "seed": seed, "topics": TOPICS}, work / CARD)

    what = f"a {shape.name} checkpoint of seed {seed}"
    return write_checkpoint(folder, what, list(tensors_of(shape, seed)), others, SHARD_BYTES, progress)


def card_of(folder: Path) -> dict[str, Any] | None:
    """What `make_checkpoint` noted in `folder`: shape, seed, topics; None where it made nothing."""
    try:
        card = json.loads((folder / CARD).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return card if isinstance(card, dict) and {"shape", "seed", "topics"} <= card.keys() else None


# -- tensors ------------------------------------------------------------------------------------------------


def tensors_of(shape: Shape, seed: int) -> Iterator[TensorToWrite]:
    """Every tensor of the checkpoint, in the order of the file. Values are made when their blocks are asked for."""
    make = _Maker(shape, seed)
    hidden, width = shape.hidden, shape.heads * shape.head_dim
    kv = shape.kv_heads * shape.head_dim
    yield make.matrix("model.embed_tokens.weight", shape.vocabulary, hidden, make.embedding)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield make.ones(f"{prefix}.input_layernorm.weight", hidden)
        yield make.noise(f"{prefix}.self_attn.q_proj.weight", width, hidden)
        yield make.noise(f"{prefix}.self_attn.k_proj.weight", kv, hidden)
        yield make.noise(f"{prefix}.self_attn.v_proj.weight", kv, hidden)
        yield make.noise(f"{prefix}.self_attn.o_proj.weight", hidden, width, gain=make.residual_gain)
        if shape.layout == "qwen3_moe":
            yield make.ones(f"{prefix}.self_attn.q_norm.weight", shape.head_dim)
            yield make.ones(f"{prefix}.self_attn.k_norm.weight", shape.head_dim)
        yield make.ones(f"{prefix}.post_attention_layernorm.weight", hidden)
        block = "block_sparse_moe" if shape.layout == "mixtral" else "mlp"
        gate, down, up = ("w1", "w2", "w3") if shape.layout == "mixtral" else ("gate_proj", "down_proj", "up_proj")
        yield make.noise(f"{prefix}.{block}.gate.weight", shape.experts, hidden, gain=make.router_gain)
        for expert in range(shape.experts):
            name = f"{prefix}.{block}.experts.{expert}"
            yield make.noise(f"{name}.{gate}.weight", shape.inner, hidden)
            yield make.noise(f"{name}.{up}.weight", shape.inner, hidden)
            yield make.noise(f"{name}.{down}.weight", hidden, shape.inner, gain=make.residual_gain)
    yield make.ones("model.norm.weight", hidden)
    yield make.matrix("lm_head.weight", shape.vocabulary, hidden, make.head)


class _Maker:
    """Values by name and seed, whatever the order they are asked for in."""

    router_gain = 1.5  # spread of router logits: the best of 8 chosen experts gets about a third of the weight

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.seed = seed
        self.residual_gain = 1 / math.sqrt(2 * shape.layers)  # keeps the residual stream from drowning the token
        self._basis: torch.Tensor | None = None

    def rng(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @property
    def basis(self) -> torch.Tensor:
        """[1 + TOPICS, hidden]: the common direction, then one for each topic. Orthogonal, elements of size about 1."""
        if self._basis is None:
            noise = torch.randn(self.shape.hidden, 1 + TOPICS, generator=self.rng("basis"))
            self._basis = torch.linalg.qr(noise).Q.T * math.sqrt(self.shape.hidden)
        return self._basis

    def ones(self, name: str, size: int) -> TensorToWrite:
        return TensorToWrite(name, (size,), DTYPE, lambda: [torch.ones(size)])

    def noise(self, name: str, rows: int, columns: int, gain: float = 1.0) -> TensorToWrite:
        """Inputs of size 1 give outputs of size `gain`."""
        std = gain / math.sqrt(columns)
        return self.matrix(
            name, rows, columns, lambda rng, _, count: torch.empty(count, columns).normal_(0, std, generator=rng)
        )

    def matrix(
        self, name: str, rows: int, columns: int, fill: Callable[[torch.Generator, int, int], torch.Tensor]
    ) -> TensorToWrite:
        step = max(1, BLOCK_ELEMENTS // columns)

        def blocks() -> Iterator[torch.Tensor]:
            rng = self.rng(name)
            for start in range(0, rows, step):
                yield fill(rng, start, min(step, rows - start))

        return TensorToWrite(name, (rows, columns), DTYPE, blocks)

    def embedding(self, rng: torch.Generator, start: int, count: int) -> torch.Tensor:
        topics = self.basis[1 + torch.arange(start, start + count) % TOPICS]
        own = torch.randn(count, self.shape.hidden, generator=rng)
        return COMMON * self.basis[0] + TOPICAL * topics + OWN * own

    def head(self, rng: torch.Generator, start: int, count: int) -> torch.Tensor:
        """Noise that does not see the common and topical directions, and a liking for the token's own topic."""
        hidden = self.shape.hidden
        noise = torch.randn(count, hidden, generator=rng)
        noise -= (noise @ self.basis.T / hidden) @ self.basis
        topics = self.basis[1 + torch.arange(start, start + count) % TOPICS]
        # An input wholly of the topic adds up to 4 to logits that are otherwise spread by 1.
        return noise / math.sqrt(hidden) + topics * (4 / hidden)
