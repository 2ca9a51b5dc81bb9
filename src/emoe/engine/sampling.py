"""Choosing tokens, for each request by its own settings and its own chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emoe.engine.interface import Sampling

_MASK = (1 << 64) - 1
_FEW = 1024


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token. `top`: (token, log-probability) of the likeliest, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Draw:
    """One choice to be made: how, with which seed, and for which place of the answer (0: its first token)."""

    sampling: Sampling
    seed: int
    position: int


def choose(logits: torch.Tensor, draws: Sequence[Draw], scores: torch.Tensor | None = None) -> list[Choice]:
    """Choose one token per row of `logits` [rows, vocabulary] (float32, unscaled); row i by `draws[i]`.

    `scores`, of the same shape, is what to choose from where a model's rules have changed the logits
    (`emoe.engine.rules`); log-probabilities are those of the logits. What a row gives depends on its logits, its
    settings and (seed, position) alone: neither on its neighbours nor on how often the request was preempted.
    """
    scores = logits if scores is None else scores
    greedy: list[int] = scores.argmax(dim=-1).tolist()
    chosen = []
    for row, draw in enumerate(draws):
        token = greedy[row] if draw.sampling.temperature == 0 else _sample(scores[row], draw)
        if draw.sampling.logprobs is None:
            chosen.append(Choice(token))
            continue
        logprobs = torch.log_softmax(logits[row], dim=-1)
        best = torch.topk(logprobs, min(draw.sampling.logprobs, logprobs.numel()))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        chosen.append(Choice(token, float(logprobs[token]), top))
    return chosen


def _sample(logits: torch.Tensor, draw: Draw) -> int:
    """Inverse of the cumulated probabilities at one uniform number."""
    sampling, u = draw.sampling, uniform(draw.seed, draw.position)
    scores = logits.double() / sampling.temperature
    if sampling.top_k is None and sampling.top_p >= 1:
        return _at(torch.softmax(scores, dim=-1).cumsum(dim=-1), u)
    most = scores.numel() if sampling.top_k is None else min(sampling.top_k, scores.numel())
    # Sorting a whole vocabulary takes ten times as long as the largest few, which nearly always reach top_p.
    for count in (min(most, _FEW), most):
        best = torch.topk(scores, count)
        whole = torch.logsumexp(scores if sampling.top_k is None else best.values, dim=-1)
        cumulated = (best.values - whole).exp().cumsum(dim=-1)
        if cumulated[-1] >= sampling.top_p:
            break
    if sampling.top_p < 1:  # those that together reach top_p: the one that reaches it is the last
        cumulated = cumulated[: int(torch.searchsorted(cumulated, sampling.top_p)) + 1]
    return int(best.indices[_at(cumulated, u)])


def _at(cumulated: torch.Tensor, u: float) -> int:
    place = int(torch.searchsorted(cumulated, cumulated[-1] * u, right=True))
    return min(place, cumulated.numel() - 1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that only (seed, position) decide: neighbouring seeds and positions are unrelated.

    SplitMix64's mixing function, twice, and the upper 53 bits.
    """
    return (_mix(_mix(seed & _MASK) + position) >> 11) / 2.0**53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
