"""Training a RouteNetwork on recorded prompts: AdamW, a fifth held out, the best epoch kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from emoe.errors import UsageError
from emoe.prediction.protocol import Array, Report

LEAST_PROMPTS = 10
MAX_EPOCHS = 80
PATIENCE = 12
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
FORGET = 0.1
"""Share of the training samples whose task is hidden, as it may be unknown."""
OTHER_PAIR = 0.5
"""Share of eMoE-A's training samples whose previous prompt is replaced by another one of the history. A few hundred
pairs are soon known by heart: on a half of gpt-oss-20b, this and `thinned` took eMoE-A's accuracy from 0.478 to 0.532
and `thinned` eMoE-L's from 0.484 to 0.501; replacing all gave 0.493."""
MAX_SECONDS = 600.0
"""After this long the best epoch so far is taken, and the report says so; below it, a seed gives the same weights."""

Loss = Callable[[Array, bool], Tensor]
"""(sample numbers, training) -> the mean loss of these samples."""


def check_length(name: str, prompts: int) -> None:
    """Raise UsageError if that many recorded prompts are too few to learn from."""
    if prompts < LEAST_PROMPTS:
        raise UsageError(
            f"{name} learns from at least {LEAST_PROMPTS} prompts with routed tokens, and the history holds "
            f"{prompts}: record more, or choose a predictor that works without training, such as task-popularity."
        )


def split(samples: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Sample numbers for training and, about a fifth of them and at least one, for choosing the epoch."""
    order = rng.permutation(samples)
    held = max(1, samples // 5)
    return order[held:], order[:held]


def thinned(counts: Array, rng: np.random.Generator) -> Array:
    """Counts [samples, ..., experts] of a random part of each sample's tokens, mostly a small one.

    A short prompt, and eMoE-L's own prediction, say less surely than a long prompt which experts are used most.
    """
    part = rng.uniform(0, 1, (len(counts), *[1] * (counts.ndim - 1))) ** 2
    kept: Array = rng.binomial(counts, part)
    return kept


def cross_entropy(logits: Tensor, shares: Tensor, known: Tensor) -> Tensor:
    """Mean cross entropy of shares [..., experts] that sum to 1, where `known` [...] is 1 and not 0."""
    losses = -(shares * log_softmax(logits, dim=-1)).sum(-1)
    return (losses * known).sum() / known.sum().clamp(min=1)


@torch.enable_grad()
def train(
    name: str,
    network: nn.Module,
    loss: Loss,
    sides: tuple[Array, Array],
    batch: int,
    rng: np.random.Generator,
    progress: Report | None,
) -> None:
    """Train in place and leave the weights of the epoch with the lowest held-out loss, the untrained one included.

    Whoever asks may be computing without gradients, as everything that runs a model does.
    """
    trained, held = sides
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best = _held_out_loss(network, loss, held, batch)
    kept, kept_epoch, started = _copy(network), 0, time.monotonic()
    for epoch in range(1, MAX_EPOCHS + 1):
        network.train()
        for part in _parts(rng.permutation(trained), batch):
            optimiser.zero_grad()
            loss(part, True).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
        now = _held_out_loss(network, loss, held, batch)
        if now < best:
            best, kept, kept_epoch = now, _copy(network), epoch
        late = time.monotonic() - started > MAX_SECONDS
        if progress is not None and (epoch % 5 == 0 or late):
            stopped = f", stopped after {MAX_SECONDS:.0f} s" if late else ""
            progress(f"{name}: epoch {epoch}, held-out loss {now:.4f}, best {best:.4f} in epoch {kept_epoch}{stopped}")
        if late or epoch - kept_epoch >= PATIENCE:
            break
    network.load_state_dict(kept)
    network.eval()


@torch.no_grad()
def _held_out_loss(network: nn.Module, loss: Loss, held: Array, batch: int) -> float:
    network.eval()
    parts = _parts(held, batch)
    return sum(float(loss(part, False)) * len(part) for part in parts) / len(held)


def _parts(samples: Array, batch: int) -> Sequence[Array]:
    return [samples[start : start + batch] for start in range(0, len(samples), batch)]


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}
