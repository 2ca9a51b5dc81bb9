"""The scorer `next-use`: an expert key's score is the sum of its chances to be used within 1, 4, 16 and 64 tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from emoe.errors import UsageError
from emoe.prediction.next_use.features import MAX_CHUNK, Chunk, Stream
from emoe.prediction.next_use.learning import (
    BATCH,
    FIT_BYTES,
    FIT_RATE,
    ONLINE_BYTES,
    ONLINE_RATE,
    Learner,
    check_history,
    count_prompts,
    fit,
    multi_hot,
    one_thread,
    whole_raw,
)
from emoe.prediction.next_use.network import Network
from emoe.prediction.protocol import Array, Report, RoutingShape, missing_id
from emoe.routing.trace import Trace


class NextUse:
    """Learns from a history, and goes on learning from what it observes.

    Without a history it starts from what all models share, and learns as it goes.
    """

    name = "next-use"

    def __init__(self, shape: RoutingShape, *, learn: bool = True, seed: int = 0, shared_only: bool = False) -> None:
        """Start knowing nothing of this model.

        Args:
            shape: how it routes.
            learn: whether to learn from what is observed.
            seed: of the first weights and of the order of learning.
            shared_only: learn only what all models share, from nothing (bench/next_use_start.py).
        """
        self.shape = shape
        self.stream = Stream(shape)
        self.learn = learn
        self._seed = seed
        self._shared_only = shared_only
        self._network = self._new_network(seed)
        self._learner = Learner(self._network, seed, FIT_RATE, ONLINE_BYTES)
        self._owed = 0
        self._fitted = False
        self._running: tuple[Chunk, Tensor] | None = None

    def _new_network(self, seed: int) -> Network:
        return Network(self.shape, torch.Generator().manual_seed(seed), self._shared_only)

    # -- learning -------------------------------------------------------------------------------------------

    def fit(self, history: Trace, *, seed: int = 0, progress: Report | None = None) -> None:
        """Learn from recorded prompts: at most about five minutes of one core, whatever their number.

        Raises:
            UsageError: the history is another model's, or too short.
        """
        check_history(history, self.shape)
        counts = count_prompts(history)
        stream = Stream(self.shape)
        for prompt in range(history.num_prompts):
            tokens = int(history.offsets[prompt + 1] - history.offsets[prompt])
            stream.add_prior(counts[prompt], history.task_of(prompt), tokens)
        self._network = self._new_network(seed)
        self._learner = Learner(self._network, seed, FIT_RATE, FIT_BYTES)
        with torch.no_grad(), one_thread():
            fit(self._learner, stream, history, seed, progress)
        stream.begin_prompt(None)
        self.stream = Stream(self.shape)  # only the priors go on; what was read last is of no special interest
        self.stream.total, self.stream.total_tokens = stream.total, stream.total_tokens
        self.stream.tasks = stream.tasks
        self._running = None
        self._fitted = True
        self._learner.set_rate(ONLINE_RATE)

    def state(self) -> dict[str, Array]:
        """Network and priors; what was observed lately is not part of it."""
        found = {f"network.{name}": value.numpy().copy() for name, value in self._network.state_dict().items()}
        found["prior.total"] = self.stream.total.numpy().copy()
        found["prior.tokens"] = np.array([self.stream.total_tokens], dtype=np.int64)
        for task, (counts, tokens) in self.stream.tasks.items():
            found[f"task.{task}.counts"] = counts.numpy().copy()
            found[f"task.{task}.tokens"] = np.array([tokens], dtype=np.int64)
        return found

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what `state` returned.

        Raises:
            UsageError: it is not a state of this scorer for this model.
        """
        network = self._new_network(self._seed)
        parts = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        if {name: tuple(value.shape) for name, value in parts.items()} != wanted or "prior.total" not in state:
            raise UsageError("this is no state of next-use for a model of this shape: make the profile anew.")
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in parts.items()})
        self.stream = Stream(self.shape)
        self.stream.total = torch.from_numpy(np.array(state["prior.total"], dtype=np.float32))
        self.stream.total_tokens = int(state["prior.tokens"][0])
        for name, counts in state.items():
            if name.startswith("task.") and name.endswith(".counts"):
                task = name.removeprefix("task.").removesuffix(".counts")
                tokens = int(state[f"task.{task}.tokens"][0])
                self.stream.tasks[task] = (torch.from_numpy(np.array(counts, dtype=np.float32)), tokens)
        self._network = network
        self._learner = Learner(network, self._seed, ONLINE_RATE, ONLINE_BYTES)
        self._fitted = True
        self._running = None

    def _take_steps(self, raw: Tensor, before: Tensor, routes: Tensor) -> None:
        """Every MAX_CHUNK tokens, one step for each BATCH of them (two without a history: all is to be learned)."""
        self._learner.add(raw, before, routes)
        if self.stream.tokens % MAX_CHUNK:
            return
        self._owed += self._learner.settle() * (1 if self._fitted else 2)
        with one_thread():
            while self._owed >= BATCH:
                self._owed -= BATCH
                self._learner.step()

    # -- scoring --------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def begin_prompt(self, task: str | None) -> None:
        """A prompt of this task starts."""
        self._running = None
        self.stream.begin_prompt(task)

    @torch.inference_mode(False)  # what is learned from must be ordinary tensors, whatever mode the model runs in
    @torch.no_grad()
    def observe(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> None:
        """Note tokens that ran; weights and token ids tell nothing more, so they are not used (docs/log.md)."""
        self._running = None
        for part in self._parts(routes):
            hot = multi_hot(part, self.shape)
            if self.learn:
                self._take_steps(*whole_raw(self.stream, hot), hot)
            else:
                self.stream.close(self.stream.open(hot))

    @torch.inference_mode(False)
    @torch.no_grad()
    def scores_of(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> Array:
        """float32 [tokens, layers, experts]: what `scores_at` returns for each layer of each token in turn."""
        found = []
        for part in self._parts(routes):
            hot = multi_hot(part, self.shape)
            raw, before = whole_raw(self.stream, hot)
            found.append(torch.sigmoid(self._network.of_tokens(raw, before, hot)).sum(1))
            if self.learn:
                self._take_steps(raw, before, hot)
        if not found:
            return np.zeros((0, self.shape.layers, self.shape.experts), dtype=np.float32)
        return torch.cat(found).numpy()

    def _parts(self, routes: Array) -> list[Array]:
        """Cut so that steps are taken after the same tokens, however many are observed at once."""
        parts = []
        at = 0
        while at < len(routes):
            room = MAX_CHUNK - (self.stream.tokens + at) % MAX_CHUNK
            parts.append(routes[at : at + room])
            at += room
        return parts

    def scores(self) -> Array:
        """float32 [layers, experts] from what was observed, nothing being known of the running token."""
        nothing = np.full((self.shape.layers, self.shape.top_k), missing_id(np.dtype(np.uint16)), dtype=np.uint16)
        return np.stack([self.scores_at(rank, nothing) for rank in range(self.shape.layers)])

    @torch.inference_mode(False)
    @torch.no_grad()
    def scores_at(self, rank: int, routes: Array) -> Array:
        """float32 [experts] of one layer, from what was observed and the running token's routes.

        Args:
            rank: the layer.
            routes: [layers, k] of the running token; those of layers after `rank` are not looked at.
        """
        hot = multi_hot(routes[None, : rank + 1], RoutingShape(rank + 1, self.shape.experts, self.shape.top_k))
        running, context = self._open_running(hot)
        running.routes[:, : rank + 1] = hot
        raw = torch.cat([running.raw[:, :, rank], self.stream.copies(running, rank)], 1)[:, :, None]
        own = torch.einsum("nle,lec->nc", hot, self._network.running[: rank + 1])
        hidden = (context + own)[:, None]
        logits = self._network.logits(raw, hidden, slice(rank, rank + 1))
        return torch.sigmoid(logits).sum(1)[0, 0].numpy()

    def _open_running(self, known: Tensor) -> tuple[Chunk, Tensor]:
        """The running token as looked at before, if its routes are those, and no layer after `known` was looked at."""
        if self._running is not None:
            chunk, _ = self._running
            if chunk.done < known.shape[1] and torch.equal(chunk.routes[:, : chunk.done], known[:, : chunk.done]):
                return self._running
        chunk = self.stream.open(torch.zeros(1, self.shape.layers, self.shape.experts))
        self._running = chunk, self._network.context(chunk.raw, chunk.before)
        return self._running
