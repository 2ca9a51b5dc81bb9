"""What is known of every expert key before a token runs. Nothing here depends on a model's size or on labels.

Of the running token, the routes of the layers that have run are known when an expert of layer l must go; so everything
about layer l may use the token's own routes in layers up to l.

*Copies*: text repeats itself, and so do routes. Earlier tokens whose routes (and whose predecessors' routes) match
those of the running token vote for what was used shortly after them. It is the induction head of language models,
over routes in place of words (docs/log.md says what each part is worth).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emoe.prediction.protocol import RoutingShape

HALF_LIVES = (2.0, 6.0, 20.0, 60.0, 200.0)
"""Tokens after which a use counts half, for each decayed frequency."""

COPY_HORIZONS = (1, 4, 16)
"""Tokens after a matching one in which a use counts as having followed it."""

FEATURES = len(HALF_LIVES) + 4 + len(COPY_HORIZONS)
"""Decayed frequencies, time since the last use, shares of the prompt, of all tokens and of the task's, copies."""

MAX_CHUNK = 256
"""Tokens looked at together at most."""

NEVER = 1000.0
MATCH = 25 / 153, 25 / 153, 15 / 153
"""Log-weight of one matching choice of the running token, of the one before and of the one before that, where 96
choices (24 layers, top-4) are made for a token, scaled to other shapes. The first guess, never tuned."""
_CHOICES = 96
_PRIOR_TOKENS = 4.0
_TASK_PRIOR_TOKENS = 200.0
_WINDOW_KEYS = 3 << 20


@dataclass(slots=True)
class Chunk:
    """Tokens being looked at: [n, layers, experts] routes as 0 and 1, of which the first `done` layers are in `match`.

    raw: [n, FEATURES - copies, layers, experts]; before: [n, layers * experts] routes of the token before each;
    match: [n, window + n] log-weights of earlier tokens; allowed: for each copy horizon, which of them may vote;
    followed: [layers, window + n, experts], for each copy horizon, what they vote for.
    """

    routes: Tensor
    raw: Tensor
    before: Tensor
    keys: Tensor
    match: Tensor
    allowed: tuple[Tensor, ...]
    followed: tuple[Tensor, ...]
    done: int = 0


def _alike(tokens: Tensor, others: Tensor) -> Tensor:
    """[n, m]: choices that tokens [layers, n, experts] share with others [layers, m, experts]."""
    return torch.bmm(tokens, others.transpose(1, 2)).sum(0)


class Stream:
    """The state of one sequence of tokens after another."""

    def __init__(self, shape: RoutingShape) -> None:
        """Start before the first token."""
        layers, experts = shape.layers, shape.experts
        self.shape = shape
        self.base = shape.top_k / experts
        self.window = max(128, min(1024, _WINDOW_KEYS // (layers * experts)))
        self._scale = _CHOICES / (layers * shape.top_k)
        self._decay = torch.tensor([0.5 ** (1 / half) for half in HALF_LIVES])
        self._powers: dict[int, tuple[Tensor, Tensor]] = {}
        self.ema = torch.full((len(HALF_LIVES), layers, experts), self.base)
        self.last = torch.full((layers, experts), -NEVER)
        self.tokens = 0
        self.prompt = torch.zeros(layers, experts)
        self.prompt_tokens = 0
        self.total = torch.zeros(layers, experts)
        self.total_tokens = 0
        self.tasks: dict[str, tuple[Tensor, int]] = {}
        self.task: str | None = None
        # Layer by layer, so that one layer's are read without a copy.
        self._room = torch.zeros(layers, 2 * self.window + MAX_CHUNK, experts)
        self._followed = [torch.zeros_like(self._room) for _ in COPY_HORIZONS]
        self._end = self.window  # the window before the first token is empty

    def begin_prompt(self, task: str | None) -> None:
        """A prompt starts: shares of the prompt start anew, all else goes on."""
        self._end_prompt()
        self.task = task
        self.prompt.zero_()
        self.prompt_tokens = 0

    def _end_prompt(self) -> None:
        """Priors learn from whole prompts, so that a prompt does not count as its own prior."""
        if self.prompt_tokens:
            self.add_prior(self.prompt, self.task, self.prompt_tokens)

    def add_prior(self, counts: Tensor, task: str | None, tokens: int) -> None:
        """Count a prompt's uses [layers, experts] among the priors."""
        self.total = self.total + counts
        self.total_tokens += tokens
        if task is not None:
            before, earlier = self.tasks.get(task, (torch.zeros_like(counts), 0))
            self.tasks[task] = (before + counts, earlier + tokens)

    def leave_out(self, counts: Tensor, task: str | None, tokens: int) -> None:
        """The inverse of `add_prior`, for a prompt that is read again."""
        self._end_prompt()
        self.prompt_tokens = 0
        self.add_prior(-counts, task, -tokens)

    def priors(self) -> tuple[Tensor, Tensor]:
        """[layers, experts] shares of all earlier prompts' tokens, and of those of the running task."""
        prior = _PRIOR_TOKENS * 16
        everything = (self.total + prior * self.base) / (self.total_tokens + prior)
        if self.task not in self.tasks:
            return everything, everything
        counts, tokens = self.tasks[self.task or ""]
        return everything, (counts + _TASK_PRIOR_TOKENS * everything) / (tokens + _TASK_PRIOR_TOKENS)

    def _decayed(self, n: int) -> tuple[Tensor, Tensor]:
        """Weights of the state [S, n] and of the chunk's tokens [S, n, n] in the frequencies before each token."""
        if n not in self._powers:
            i = torch.arange(n)
            age = (i[:, None] - 1 - i[None]).float()
            d = self._decay[:, None, None]
            inner = torch.where(age >= 0, (1 - d) * d ** age.clamp(min=0), torch.zeros(()))
            self._powers[n] = (self._decay[:, None] ** i, inner)
        return self._powers[n]

    def open(self, routes: Tensor) -> Chunk:
        """Look at the tokens that come next, [n, layers, experts], at most MAX_CHUNK.

        A single token's routes may be unknown: zeros, to be written into `Chunk.routes` layer by layer.
        """
        n, layers, experts = routes.shape
        flat = routes.view(n, -1)
        outer, inner = self._decayed(n)
        ema = outer[:, :, None] * self.ema.view(len(HALF_LIVES), 1, -1) + inner @ flat
        at = torch.arange(self.tokens, self.tokens + n, dtype=torch.float32)[:, None, None]
        used = torch.where(routes > 0, at, torch.full((), -NEVER))
        last = torch.cat([self.last[None], used[:-1]]).cummax(0).values
        since = torch.log((at - last).clamp(max=NEVER))
        counts = torch.cat([torch.zeros(1, layers, experts), routes[:-1]]).cumsum(0) + self.prompt
        seen = self.prompt_tokens + torch.arange(n, dtype=torch.float32)[:, None, None]
        share = (counts + _PRIOR_TOKENS * self.base) / (seen + _PRIOR_TOKENS)
        everything, task = (prior.expand(n, layers, experts) for prior in self.priors())
        raw = torch.cat(
            [
                ema.view(len(HALF_LIVES), n, layers, experts).transpose(0, 1),
                torch.stack([since, share, everything, task], 1),
            ],
            1,
        )
        keys, followed = self._recent(routes)
        before = keys[:, self.window - 1 : self.window - 1 + n].transpose(0, 1).flatten(1)
        match, allowed = self._matches(keys, n)
        return Chunk(routes, raw, before, keys, match, allowed, followed)

    def _recent(self, routes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[layers, window + n, experts] routes of the window and of the chunk, and for each copy horizon what was used
        within it after each of them (where that is known; the rest is masked)."""
        n = len(routes)
        if self._end + n > self._room.shape[1]:
            moved = slice(self._end - self.window, self._end)
            for held in (self._room, *self._followed):
                held[:, : self.window] = held[:, moved].clone()
            self._end = self.window
        room, end = self._room, self._end
        room[:, end : end + n] = routes.transpose(0, 1)
        for horizon, held in zip(COPY_HORIZONS, self._followed, strict=True):
            # Used within `horizon` after j: known, and final, once token j + horizon has run.
            first = end - horizon
            windows = room[:, first + 1 : end + n].unfold(1, horizon, 1)
            held[:, first : first + windows.shape[1]] = windows.amax(-1)
        part = slice(end - self.window, end + n)
        return room[:, part], tuple(held[:, part] for held in self._followed)

    def _matches(self, keys: Tensor, n: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """How well the two tokens before each of the chunk match earlier tokens' two, and which may vote."""
        window, scale = self.window, self._scale
        full = _alike(keys[:, window - 2 : window + n - 1], keys)  # rows: tokens window-2 ... window+n-2
        # Token t matches j by its own routes, t-1 matches j-1, t-2 matches j-2.
        match = torch.zeros(n, window + n)
        match[:, 1:] = full[1:, :-1] * (MATCH[1] * scale)
        match[:, 2:] += full[:-1, :-2] * (MATCH[2] * scale)
        t = torch.arange(window, window + n)[:, None]
        j = torch.arange(window + n)[None]
        real = (j >= max(0, window - self.tokens)) & (j >= t - window)
        return match, tuple(real & (j + horizon <= t - 1) for horizon in COPY_HORIZONS)

    def extend(self, chunk: Chunk, rank: int) -> Tensor:
        """Bring `chunk.match` up to the layer before `rank`; return it with that layer's own routes.

        Ranks are asked for in ascending order.
        """
        weight = MATCH[0] * self._scale
        if chunk.done < rank:
            part = slice(chunk.done, rank)
            chunk.match += _alike(chunk.routes[:, part].transpose(0, 1), chunk.keys[part]) * weight
            chunk.done = rank
        return chunk.match + chunk.routes[:, rank] @ chunk.keys[rank].T * weight

    def copies(self, chunk: Chunk, rank: int) -> Tensor:
        """[n, horizons, experts]: what followed matching tokens in one layer, shares of the vote."""
        match = self.extend(chunk, rank)
        # The shortest horizon allows all that the others allow, so one exponential serves for every horizon.
        peak = match.masked_fill(~chunk.allowed[0], -1e4).amax(1, keepdim=True)
        weight = torch.exp((match - peak).clamp(max=0))  # above 0 are only those that may not vote
        votes = []
        for allowed, followed in zip(chunk.allowed, chunk.followed, strict=True):
            vote = weight * allowed
            votes.append(vote @ followed[rank] / vote.sum(1, keepdim=True).clamp(min=1e-30))
        return torch.stack(votes, 1)

    def close(self, chunk: Chunk) -> None:
        """The chunk's tokens have run, all their routes known: move past them."""
        routes = chunk.routes
        n = len(routes)
        self._end += n
        outer, inner = self._decayed(n + 1)
        flat = torch.cat([routes.view(n, -1), torch.zeros(1, routes[0].numel())])
        new = outer[:, -1, None] * self.ema.view(len(HALF_LIVES), -1) + (inner[:, -1:] @ flat)[:, 0]
        self.ema = new.view_as(self.ema)
        at = torch.arange(self.tokens, self.tokens + n, dtype=torch.float32)[:, None, None]
        used = torch.where(routes > 0, at, torch.full((), -NEVER)).max(0).values
        self.last = torch.maximum(self.last, used)
        self.prompt += routes.sum(0)
        self.prompt_tokens += n
        self.tokens += n
