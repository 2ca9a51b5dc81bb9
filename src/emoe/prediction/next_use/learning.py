"""Fitting the network: to recorded prompts, and on to the running ones as their labels become known."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from emoe.errors import UsageError
from emoe.prediction.next_use.adamw import AdamW
from emoe.prediction.next_use.features import FEATURES, MAX_CHUNK, Stream
from emoe.prediction.next_use.network import HORIZONS, Network
from emoe.prediction.protocol import Array, Report, RoutingShape
from emoe.routing.trace import Trace

BATCH = 128
EPOCHS = 3
FIT_KEYS = 300e6
"""Key-tokens that a fit looks at, at most: about five minutes of one core. Long histories are sampled."""
FIT_RATE = 1e-3
ONLINE_RATE = 3e-4
WEIGHT_DECAY = 0.05
WARM_UP_STEPS = 50
FEWEST_TOKENS = 512
"""Below this a history teaches nothing."""
STEP_KEYS = 32 * 768
"""Key-tokens computed at once within a step: bounds its memory, and stays in the processor's caches."""
FIT_BYTES = 192 << 20
"""Samples held while a history is learned; more are drawn from with less repetition."""
ONLINE_BYTES = 48 << 20
"""Samples held beside a model that runs."""
_REPORT_S = 5.0


def multi_hot(routes: Array, shape: RoutingShape) -> Tensor:
    """[tokens, layers, experts] of 0 and 1; ids that are no expert's mean "not computed"."""
    n = len(routes)
    hot = torch.zeros(n, shape.layers, shape.experts + 1)
    ids = torch.from_numpy(np.minimum(routes.astype(np.int64), shape.experts))
    hot.scatter_(2, ids, 1.0)
    return hot[:, :, : shape.experts].contiguous()


def whole_raw(stream: Stream, routes: Tensor) -> tuple[Tensor, Tensor]:
    """All features [n, FEATURES, layers, experts] of tokens whose routes are known, and the routes before each;
    the stream moves past them."""
    chunk = stream.open(routes)
    copies = torch.stack([stream.copies(chunk, rank) for rank in range(stream.shape.layers)], 2)
    raw, before = torch.cat([chunk.raw, copies], 1), chunk.before.clone()
    stream.close(chunk)
    return raw, before


@dataclass(slots=True)
class _Tokens:
    """Some tokens' features in few bytes: raw float16, routes before and of each uint8."""

    raw: Tensor
    before: Tensor
    routes: Tensor

    def __len__(self) -> int:
        return len(self.raw)


class Learner:
    """Keeps samples whose future is known and takes steps on random ones."""

    def __init__(self, network: Network, seed: int, rate: float, nbytes: int) -> None:
        """Start with no samples, `nbytes` of them at most (but 512)."""
        self._network = network
        self._random = np.random.default_rng(seed)
        self._dropout = torch.Generator().manual_seed(seed)
        learnable = [p for p in network.parameters() if p.requires_grad]
        self._optimiser = AdamW(learnable, rate, WEIGHT_DECAY)
        keys = network.shape.layers * network.shape.experts
        self._room = int(min(8192, max(512, nbytes // (keys * (2 * FEATURES + 3)))))
        self._waiting: list[_Tokens] = []
        self._held: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.steps = 0

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        self._optimiser.rate = rate

    def add(self, raw: Tensor, before: Tensor, routes: Tensor) -> None:
        """Note tokens in order: their features, the routes before each, and their own."""
        self._waiting.append(_Tokens(raw.half(), before.to(torch.uint8), routes.to(torch.uint8)))

    def settle(self, share: float = 1.0) -> int:
        """Make samples of the noted tokens whose next uses are known by now; `share` of them, at random.

        Returns:
            New samples.
        """
        if sum(map(len, self._waiting)) <= HORIZONS[-1]:
            return 0
        noted = _Tokens(*(torch.cat([getattr(t, name) for t in self._waiting]) for name in ("raw", "before", "routes")))
        ready = len(noted) - HORIZONS[-1]
        self._waiting = [_Tokens(noted.raw[ready:], noted.before[ready:], noted.routes[ready:])]
        # distance[t]: tokens from t to the next use after it, 255 where none is in sight.
        at = torch.arange(len(noted), dtype=torch.int16)[:, None, None]
        used = torch.where(noted.routes > 0, at, torch.full((), 10_000, dtype=torch.int16))
        following = used.flip(0).cummin(0).values.flip(0)
        distance = (following[1 : ready + 1] - at[:ready]).clamp(max=255).to(torch.uint8)
        kept = np.arange(ready) if share >= 1 else np.flatnonzero(self._random.random(ready) < share)
        for i in kept:
            sample = (noted.raw[i].clone(), noted.before[i].clone(), noted.routes[i].clone(), distance[i].clone())
            if len(self._held) < self._room:
                self._held.append(sample)
            else:
                self._held[int(self._random.integers(self._room))] = sample
        return len(kept)

    def end(self) -> None:
        """Forget tokens whose future is not known: another sequence follows."""
        self._waiting.clear()

    @property
    def samples(self) -> int:
        """Samples held."""
        return len(self._held)

    def step(self) -> float:
        """Take one step on a random batch and return its loss."""
        chosen = [self._held[i] for i in self._random.integers(len(self._held), size=BATCH)]
        keys = self._network.shape.layers * self._network.shape.experts
        part = min(BATCH, max(4, STEP_KEYS // keys))
        total = 0.0
        self._network.dropout = self._dropout
        with torch.enable_grad():
            for start in range(0, BATCH, part):
                samples = zip(*chosen[start : start + part], strict=True)
                raw, before, routes, distance = (torch.stack(each) for each in samples)
                within = (distance[:, None] <= torch.tensor(HORIZONS)[:, None, None]).float()
                logits = self._network.of_tokens(raw.float(), before.float(), routes.float())
                loss = functional.binary_cross_entropy_with_logits(logits, within) * (len(raw) / BATCH)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        self._optimiser.step()
        self._network.dropout = None
        self.steps += 1
        return total


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread. The tensors are small: with two threads beside another busy process learning a history
    took sixty times as long, for waiting at each operation's end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_history(history: Trace, shape: RoutingShape) -> None:
    """Raises UsageError where a history is another model's, or too short to learn from."""
    if RoutingShape.of(history) != shape:
        raise UsageError(
            f"the history was routed as {RoutingShape.of(history)}, not as {shape}: give the same model's."
        )
    if len(history) < FEWEST_TOKENS:
        raise UsageError(f"a history of {len(history)} tokens teaches nothing: give at least {FEWEST_TOKENS}.")


def count_prompts(history: Trace) -> Tensor:
    """float32 [prompts, layers, experts]: each prompt's tokens by expert."""
    return torch.from_numpy(history.counts().astype(np.float32))


def fit(learner: Learner, stream: Stream, history: Trace, seed: int, progress: Report | None) -> None:
    """Fit the network to a history whose prompts' counts are the stream's priors.

    Each prompt is left out of the priors while it is read, as it will be when it is new.
    """
    counts = count_prompts(history)
    keys = len(history) * counts[0].numel()
    epochs = max(1, min(EPOCHS, int(FIT_KEYS / keys)))
    share = min(1.0, FIT_KEYS / (keys * epochs))
    total = max(1, int(len(history) * share * epochs / BATCH))
    order = np.random.default_rng(seed)
    owed, loss, told, start = 0.0, 0.0, time.monotonic(), time.monotonic()
    for epoch in range(epochs):
        for prompt in order.permutation(history.num_prompts):
            rows = slice(int(history.offsets[prompt]), int(history.offsets[prompt + 1]))
            task = history.task_of(int(prompt))
            stream.leave_out(counts[prompt], task, rows.stop - rows.start)
            stream.begin_prompt(task)
            for at in range(rows.start, rows.stop, MAX_CHUNK):
                routes = multi_hot(history.experts[at : min(at + MAX_CHUNK, rows.stop)], stream.shape)
                raw, before = whole_raw(stream, routes)
                learner.add(raw, before, routes)
                owed += learner.settle(share)
                if learner.samples < min(8 * BATCH, len(history) // 2):
                    continue
                while owed >= BATCH:
                    owed -= BATCH
                    done = min(1.0, learner.steps / total)
                    warm = min(1.0, (learner.steps + 1) / WARM_UP_STEPS)
                    learner.set_rate(FIT_RATE * warm * 0.5 * (1 + math.cos(math.pi * done)) + 1e-6)
                    value = learner.step()
                    loss = value if not loss else 0.98 * loss + 0.02 * value
                if progress is not None and time.monotonic() - told > _REPORT_S:
                    told = time.monotonic()
                    done = max(1e-9, learner.steps / total)
                    left = (told - start) * (1 - done) / done
                    progress(
                        f"next-use: epoch {epoch + 1} of {epochs}, step {learner.steps} of {total}, "
                        f"loss {loss:.4f}, {max(0.0, left):.0f} s left"
                    )
    learner.end()
