"""From features to the chance that an expert key is used within the next 1, 4, 16 and 64 tokens.

Two terms are added. The first looks at one key's own features, with the same small network for all keys. The second
looks at everything at once: decayed frequencies of all layers, the routes of the token before and, layer by layer,
those of the running token, through one hidden layer and a read-out of each layer's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional

from emoe.prediction.next_use.features import FEATURES, HALF_LIVES
from emoe.prediction.protocol import RoutingShape

HORIZONS = (1, 4, 16, 64)
"""Tokens; an expert key's score is the sum of the chances to be used within each."""

HIDDEN = 128
CELL = 32
DROPOUT = 0.3
_SINCE = len(HALF_LIVES)
_START = HALF_LIVES.index(20.0)


SHARED = ("first", "first_bias", "second", "direct", "common")
"""The parameters that all keys share: they fit a model of any shape."""

START_FILE = Path(__file__).parent / "start.safetensors"


class Network(nn.Module):
    """The start is what all keys share, as learned from another model (bench/next_use_start.py)."""

    def __init__(self, shape: RoutingShape, generator: torch.Generator, shared_only: bool = False) -> None:
        """Draw the first weights from `generator`. With `shared_only` nothing but the shared part learns, from nothing:
        it begins as the decayed frequency with a half-life of 20 tokens."""
        super().__init__()
        layers, experts = shape.layers, shape.experts
        self.shape = shape
        self.base = shape.top_k / experts
        keys = layers * experts
        self.dropout: torch.Generator | None = None
        """While learning, where dropout draws from: never from torch's own stream, which sampling text draws from."""

        def drawn(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * scale)

        self.first = drawn(CELL, FEATURES, scale=FEATURES**-0.5)
        self.first_bias = nn.Parameter(torch.zeros(CELL))
        self.second = nn.Parameter(torch.zeros(len(HORIZONS), CELL))
        self.direct = nn.Parameter(torch.ones(len(HORIZONS)))
        self.common = nn.Parameter(torch.zeros(len(HORIZONS)))
        self.bias = nn.Parameter(torch.zeros(len(HORIZONS), layers, experts))
        self.past = drawn(HIDDEN, keys * (len(HALF_LIVES) + 1), scale=(keys * 6) ** -0.5)
        self.running = drawn(layers, experts, HIDDEN, scale=0.05)
        self.layer = nn.Parameter(torch.zeros(layers, HIDDEN))
        self.read = nn.Parameter(torch.zeros(layers, HIDDEN, len(HORIZONS) * experts))
        if shared_only:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name in SHARED)
        else:
            start = {name: torch.from_numpy(value) for name, value in load_file(START_FILE).items()}
            self.load_state_dict(start, strict=False)

    def log_odds(self, share: Tensor) -> Tensor:
        """Log-odds of shares, 0 at the share of a router that chooses at random."""
        share = share.clamp(0.01 * self.base, 1 - 0.01 * self.base)
        return torch.log(share / (1 - share)) - torch.log(torch.tensor(self.base / (1 - self.base + 1e-9)))

    def context(self, raw: Tensor, before: Tensor) -> Tensor:
        """[n, HIDDEN]: everything before the running token, of raw [n, FEATURES, layers, experts]."""
        frequencies = raw[:, :_SINCE].flatten(1) * (0.5 / self.base) - 0.5
        return functional.linear(torch.cat([frequencies, before], 1), self.past)

    def logits(self, raw: Tensor, hidden: Tensor, layers: slice) -> Tensor:
        """[n, HORIZONS, these layers, experts].

        Args:
            raw: [n, FEATURES, these layers, experts].
            hidden: [n, these layers, HIDDEN] the context of each, with the running token's routes up to it.
            layers: which.
        """
        since = raw[:, _SINCE : _SINCE + 1] * 0.5 - 1.5
        shares = self.log_odds(torch.cat([raw[:, :_SINCE], raw[:, _SINCE + 1 :]], 1))
        cells = torch.cat([shares[:, :_SINCE], since, shares[:, _SINCE:]], 1).permute(0, 2, 3, 1)
        inner = functional.gelu(functional.linear(cells, self.first, self.first_bias))
        own = functional.linear(inner, self.second).permute(0, 3, 1, 2)
        own = own + shares[:, _START, None] * self.direct[:, None, None]
        own = own + self.bias[:, layers] + self.common[:, None, None]
        active = functional.gelu(hidden + self.layer[layers])
        if self.dropout is not None:
            kept = torch.rand(active.shape, generator=self.dropout) >= DROPOUT
            active = active * kept / (1 - DROPOUT)
        read = torch.einsum("nlc,lcf->nlf", active, self.read[layers])
        split = read.view(len(read), read.shape[1], len(HORIZONS), self.shape.experts)
        logits: Tensor = own + split.transpose(1, 2)
        return logits

    def of_tokens(self, raw: Tensor, before: Tensor, routes: Tensor) -> Tensor:
        """[n, HORIZONS, layers, experts] logits of tokens whose routes [n, layers, experts] are known."""
        own = torch.einsum("nle,lec->nlc", routes, self.running).cumsum(1)
        hidden = self.context(raw, before)[:, None] + own
        return self.logits(raw, hidden, slice(0, self.shape.layers))
