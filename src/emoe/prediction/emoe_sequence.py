"""eMoE-A and eMoE-L: the next prompt's experts by a small language model over routes (paper, section 2.2).

Both read a layer as its k most used experts, most first, and score each layer's experts; softmax of the scores, times
k, is the predicted share. Training minimises the cross entropy against the shares that the prompt really had.

- A reads a task and every layer of the previous prompt, 1 + layers * k tokens, and gives all layers at once.
- L reads a task, a mark and the k experts of layer i - 1, and gives layer i; it is trained on the experts that layer
  i - 1 of the same prompt really used, and predicts by chaining on its own choices. Layer 0 follows from layer 0 of the
  previous prompt, under another mark.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from emoe.errors import UsageError, unknown
from emoe.prediction.counting import PromptCounter, check_shape, need, pack_names, unpack_names
from emoe.prediction.protocol import Array, Report, RoutingShape
from emoe.routing.trace import Trace

if TYPE_CHECKING:
    from emoe.prediction.networks import RouteNetwork, Vocabulary

NETWORKS = ("xlnet", "gpt2", "bert")
_WEIGHT = "weight."


class NotFittedError(UsageError):
    """A predictor that learns offline was asked before it learned anything."""


class SequencePredictor(PromptCounter, ABC):
    """What A and L share: the running prompt, the tasks known, the network and its state."""

    def __init__(self, shape: RoutingShape, name: str, network: str) -> None:
        if network not in NETWORKS:
            raise unknown("network", network, NETWORKS)
        super().__init__(shape)
        self.name, self.kind = name, network
        self._tasks: dict[str, int] = {}
        self._network: RouteNetwork | None = None

    def fit(self, history: Trace, *, seed: int = 0, progress: Report | None = None) -> None:
        """Train on the prompts of `history`, each following the one before it; the last is then the previous prompt.

        The same history and seed give the same weights on the same machine and number of threads.

        Raises:
            UsageError: a trace of another model's shape, or fewer than `fitting.LEAST_PROMPTS` prompts.
        """
        check_shape(self.name, self.shape, history)
        tasks = [history.task_of(prompt) for prompt in range(history.num_prompts)]
        self.fit_counts(history.counts(), tasks, seed=seed, progress=progress)

    def fit_counts(
        self, counts: Array, tasks: list[str | None], *, seed: int = 0, progress: Report | None = None
    ) -> None:
        """`fit` from int [prompts, layers, experts] tokens per expert and the prompts' tasks. Raises as `fit` does."""
        import torch

        from emoe.prediction.fitting import check_length

        used = [prompt for prompt in range(len(counts)) if counts[prompt].any()]
        check_length(self.name, len(used))
        names = sorted({name for name in (tasks[prompt] for prompt in used) if name is not None})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            known = {name: index for index, name in enumerate(names)}
            numbers = [None if (name := tasks[prompt]) is None else known[name] for prompt in used]
            network, vocabulary = self._build(len(known))
            self._train(network, vocabulary, counts[used], numbers, np.random.default_rng(seed), progress)
        self._forget()
        self._network, self._tasks, self._latest = network, known, counts[used[-1]].astype(np.int64)

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]. A task that the history did not have counts as unknown.

        Raises:
            NotFittedError: neither `fit` nor `restore` was called.
        """
        import torch

        if self._network is None:
            raise NotFittedError(
                f"{self.name} predicts with a network and has learned nothing yet: give it a history to fit, or the "
                "state of one that was fitted."
            )
        with torch.inference_mode():
            index = None if task is None else self._tasks.get(task)
            return self.shape.normalised(self._ask(self._network, index))

    @property
    def parameters(self) -> int:
        """Numbers that the network holds; 0 before it learned."""
        return 0 if self._network is None else sum(one.numel() for one in self._network.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of these numbers. The paper's predictor takes 0.24 to 1.3 % of the model's."""
        if self._network is None:
            return 0
        return sum(one.numel() * one.element_size() for one in self._network.parameters())

    def _arrays(self) -> dict[str, Array]:
        if self._network is None:
            return {}
        weights = {_WEIGHT + key: value.numpy().copy() for key, value in self._network.state_dict().items()}
        return {"tasks": pack_names(list(self._tasks)), **weights}

    def _take(self, state: Mapping[str, Array]) -> None:
        import torch

        if not any(key.startswith(_WEIGHT) for key in state):
            self._network, self._tasks = None, {}
            return
        tasks = [name for name in unpack_names(need(state, self.name, "tasks")) if name is not None]
        with torch.random.fork_rng(devices=[]):
            network, _ = self._build(len(tasks))
        held = network.state_dict()
        weights = {
            key: torch.from_numpy(need(state, self.name, _WEIGHT + key, tuple(value.shape)))
            for key, value in held.items()
        }
        network.load_state_dict(weights)
        network.eval()
        self._network, self._tasks = network, {name: index for index, name in enumerate(tasks)}

    def _build(self, tasks: int) -> tuple[RouteNetwork, Vocabulary]:
        from emoe.prediction.networks import RouteNetwork, Vocabulary

        vocabulary = Vocabulary(self.shape, tasks)
        return RouteNetwork(self.kind, vocabulary, self._length()), vocabulary

    @abstractmethod
    def _length(self) -> int:
        """Tokens of an input."""

    @abstractmethod
    def _train(
        self,
        network: RouteNetwork,
        vocabulary: Vocabulary,
        counts: Array,
        tasks: list[int | None],
        rng: np.random.Generator,
        progress: Report | None,
    ) -> None:
        """Train on counts [prompts, layers, experts] of prompts in order."""

    @abstractmethod
    def _ask(self, network: RouteNetwork, task: int | None) -> Array:
        """Unscaled shares [layers, experts] of the prompt after `latest`."""


class EmoeA(SequencePredictor):
    """All layers of the next prompt from all layers of the previous one."""

    def _length(self) -> int:
        return 1 + self.shape.layers * self.shape.top_k

    def _train(
        self,
        network: RouteNetwork,
        vocabulary: Vocabulary,
        counts: Array,
        tasks: list[int | None],
        rng: np.random.Generator,
        progress: Report | None,
    ) -> None:
        import torch

        from emoe.prediction import fitting

        labels = np.array([vocabulary.task(task) for task in tasks[1:]])
        shares, known = _targets(counts[1:])
        sides = fitting.split(len(counts) - 1, rng)
        _start_from_popularity(network, shares[sides[0]])

        def loss(part: Array, training: bool) -> Any:
            task, before = labels[part], counts[part]
            if training:
                task = np.where(rng.random(len(part)) < fitting.FORGET, vocabulary.unknown_task, task)
                other = counts[rng.choice(sides[0], len(part))]
                before = np.where(rng.random((len(part), 1, 1)) < fitting.OTHER_PAIR, other, before)
                before = fitting.thinned(before, rng)
            previous = vocabulary.most_used(before).reshape(len(part), -1)
            ids = torch.from_numpy(np.concatenate([task[:, None], previous], axis=1))
            return fitting.cross_entropy(network.all_layers(ids), shares[part], known[part])

        fitting.train(self.name, network, loss, sides, 16, rng, progress)

    def _ask(self, network: RouteNetwork, task: int | None) -> Array:
        import torch

        from emoe.prediction.networks import Vocabulary

        vocabulary = Vocabulary(self.shape, len(self._tasks))
        ids = np.concatenate([[vocabulary.task(task)], vocabulary.most_used(self.latest).reshape(-1)])
        return _softmax(network.all_layers(torch.from_numpy(ids[None]))[0].numpy())


class EmoeL(SequencePredictor):
    """Each layer of the next prompt from the layer before it, the first from the previous prompt's first."""

    def _length(self) -> int:
        return 2 + self.shape.top_k

    def _train(
        self,
        network: RouteNetwork,
        vocabulary: Vocabulary,
        counts: Array,
        tasks: list[int | None],
        rng: np.random.Generator,
        progress: Report | None,
    ) -> None:
        import torch

        from emoe.prediction import fitting

        layers, prompts = self.shape.layers, len(counts) - 1
        before = np.concatenate([counts[:-1, :1], counts[1:, :-1]], axis=1)
        labels = np.array([vocabulary.task(task) for task in tasks[1:]])
        shares, known = _targets(counts[1:])
        chosen, held = fitting.split(prompts, rng)
        _start_from_popularity(network, shares[chosen])
        # A sample is one layer of one prompt; the layers of a prompt are on one side.
        sides = tuple((side[:, None] * layers + np.arange(layers)).reshape(-1) for side in (chosen, held))

        def loss(part: Array, training: bool) -> Any:
            prompt, layer = part // layers, part % layers
            task, used = labels[prompt], before[prompt, layer]
            if training:
                task = np.where(rng.random(len(part)) < fitting.FORGET, vocabulary.unknown_task, task)
                used = fitting.thinned(used, rng)
            previous = vocabulary.most_used_in(np.maximum(layer - 1, 0), used)
            mark = np.where(layer == 0, vocabulary.first, vocabulary.onward)
            ids = torch.from_numpy(np.concatenate([task[:, None], mark[:, None], previous], axis=1))
            logits = network.one_layer(ids, torch.from_numpy(layer))
            return fitting.cross_entropy(logits, shares[prompt, layer], known[prompt, layer])

        fitting.train(self.name, network, loss, (sides[0], sides[1]), 128, rng, progress)

    def _ask(self, network: RouteNetwork, task: int | None) -> Array:
        import torch

        from emoe.prediction.networks import Vocabulary

        vocabulary = Vocabulary(self.shape, len(self._tasks))
        shares = np.zeros((self.shape.layers, self.shape.experts))
        tokens, mark = vocabulary.most_used(self.latest)[0], vocabulary.first
        for layer in range(self.shape.layers):
            ids = torch.from_numpy(np.concatenate([[vocabulary.task(task), mark], tokens])[None])
            shares[layer] = _softmax(network.one_layer(ids, torch.tensor([layer]))[0].numpy())
            tokens, mark = vocabulary.most_used(shares)[layer], vocabulary.onward
        return shares


def _targets(counts: Array) -> tuple[Any, Any]:
    """Tensors: float32 [prompts, layers, experts] shares that sum to 1, and [prompts, layers] 1 where any token was."""
    import torch

    total = counts.sum(axis=2, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    return torch.from_numpy(shares.astype(np.float32)), torch.from_numpy((total[:, :, 0] > 0).astype(np.float32))


def _start_from_popularity(network: RouteNetwork, shares: Any) -> None:
    """Let the untrained network predict the mean shares, so that training starts at the static baseline."""
    import torch

    with torch.no_grad():
        network.popularity.copy_(torch.log(shares.mean(0) + 1e-4))


def _softmax(logits: Array) -> Array:
    """float64 rows that sum to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares
