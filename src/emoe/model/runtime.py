"""The bound model at run time: it turns each MoE layer's routes into slots, loads and kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from emoe.config import Mode
from emoe.errors import UsageError
from emoe.kernels.chunks import grouped, many_tokens
from emoe.kernels.combining import Workspace
from emoe.kernels.experts import FirstOnly, Weights, one_token, one_token_arriving
from emoe.kernels.slots import sent
from emoe.model.final import Final
from emoe.model.layer import LayerRuntime
from emoe.model.passes import Pass
from emoe.residency.prefetches import Taking
from emoe.residency.retention import kept_after

IMPLEMENTATION = "emoe"
"""The name under which transformers finds `experts_forward`."""

RouteObserver = Callable[["Pass", int, torch.Tensor, torch.Tensor], None]
"""Called with (pass, layer, ids [tokens, k], weights [tokens, k]): the model's own route, before any rerouting."""


class _Mine(threading.local):
    """The pass that this thread is in: several threads may ask one model, and their layers take turns.

    `answering`: the tokens that get logits; None: all, or no pass is under way.
    """

    now = Pass()
    answering: npt.NDArray[np.int64] | None = None


class Runtime:
    """All MoE layers of one model, and what is common to them: the pass, the mode, the counters, the lock."""

    def __init__(self, mode: Mode, replan_prompts: int = 1, task: str | None = None) -> None:
        """Start with no layers.

        `replan_prompts` is p: a mode that reroutes plans anew at every p-th prompt. `task` labels the prompts to come.
        Those who look ahead set `tasks_of` (the task of each sequence of a pass), `reads_own_routes` (whether the
        prompt of that number is read with its own routes), `at_pass_start` and `after_take` (a layer's experts are
        there and about to be run).
        """
        self.task = task
        self.mode: Mode = mode
        self.tasks: list[str | None] = []
        self.tasks_of: Callable[[Pass], list[str | None]] | None = None
        self.reads_own_routes: Callable[[int], bool] = lambda prompt: prompt % replan_prompts == 0
        self.at_pass_start: list[Callable[[Pass], None]] = []
        self.after_take: Callable[[LayerRuntime], None] | None = None
        self.layers: dict[int, LayerRuntime] = {}
        self.now = Pass()
        self.prompts = 0
        self.observers: list[RouteObserver] = []
        self.observing = mode != "exact"
        self.lock = threading.RLock()
        self.workspace = Workspace()
        self.closed = False
        self.final: Final | None = None
        self.dense_only = False
        """Passes leave no trace and experts give 0: for finding out whether the rest of the model runs."""
        self.end_tokens: frozenset[int] = frozenset()
        self._announced: Pass | None = None
        self._mine = _Mine()
        self._reading: set[int] = set()  # announced sequences whose prompt is being read with its own routes

    def __reduce_ex__(self, protocol: object) -> str:
        """Refuse `copy.deepcopy` and pickle, which come by here for every model that emoe loads."""
        raise UsageError(
            "a model made by emoe.load reads its experts through threads and open files, which cannot be copied or "
            "pickled. Call emoe.load again, also in another process."
        )

    # -- passes ---------------------------------------------------------------------------------------------

    def watch(self, model: PreTrainedModel) -> None:
        """Follow the model's forward passes: which are prompts, how many sequences, which tokens are padding."""
        model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        model.register_forward_hook(self._after_pass, always_call=True)

    def announce(self, now: Pass | None) -> None:
        """Say what the next forward pass is, which otherwise is read off its arguments; None takes it back."""
        self._announced = now

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.dense_only:
            return
        if self._announced is not None:
            now, self._announced = self._announced, None
            self.begin(now)
            return
        now = Pass.of_call(args, kwargs)
        now.kept = None if self.final is None else self.final.kept(kwargs)
        self.begin(now)

    def _after_pass(self, module: nn.Module, args: object, output: object) -> None:
        """Calls that go past the model's own, to what is inside it, run every token."""
        self._mine.answering = None

    def begin(self, now: Pass) -> None:
        """Start a forward pass."""
        with self.lock:
            self.now = now
            if now.announced:
                self._begin_announced(now)
            elif now.new_prompt:
                label = [self.task] * now.batch
                self.tasks = label if self.tasks_of is None else self.tasks_of(now)
                self.observing = self._begin_prompt()
            elif now.phase == "decode":
                self.observing = False
            final, answering = self.final, now.answering()
            if final is None or answering is None or final.watched():
                final, answering = None, None
            self._mine.now, self._mine.answering = now, answering
            pools = {id(pool): pool for layer in self.layers.values() for pool in layer.pools}.values()
            for pool in pools:
                pool.table.begin_pass()
                pool.early.few = None if final is None else final.layer
            for start in self.at_pass_start:
                start(now)
            if now.phase == "prefill" and (self.mode == "exact" or self.observing):
                for pool in pools:
                    if pool.transfers is None:
                        pool.early.open(now.batch * now.tokens)

    def _begin_prompt(self) -> bool:
        """Number a new prompt (or batch of prompts); whether it is read with its own routes."""
        own = self.mode != "exact" and self.reads_own_routes(self.prompts)
        self.prompts += 1
        if own and not self._reading:
            for layer in self.layers.values():
                layer.prompt_counts = [0] * layer.experts
        return own

    def _begin_announced(self, now: Pass) -> None:
        """Every token of a pass in which some prompt is read with its own routes keeps its own."""
        self.tasks = [segment.task for segment in now.segments]
        self._reading -= now.ended
        for segment in now.segments:
            if segment.new and self._begin_prompt():
                self._reading.add(segment.sequence)
            elif segment.phase == "decode":
                self._reading.discard(segment.sequence)
        self.observing = any(segment.sequence in self._reading for segment in now.segments)

    def counts(self, layer: LayerRuntime) -> bool:
        """Whether the pool counts hits and misses: not where the route it sees has been rerouted already."""
        return self.mode == "exact" or layer.keeps_route

    @property
    def narrows(self) -> bool:
        """Whether this pass runs its final layer for some of its tokens alone: those that get logits."""
        return self._mine.answering is not None

    def answering_of(self, layer: LayerRuntime, rows: int) -> npt.NDArray[np.int64] | None:
        """Which of the `rows` tokens that `layer` is given need its experts; None: all.

        All of them where a model routes other rows than the pass's tokens.
        """
        now, answering = self._mine.now, self._mine.answering
        if self.final is None or answering is None or layer.layer != self.final.layer:
            return None
        return answering if rows == now.batch * now.tokens else None

    # -- routes ---------------------------------------------------------------------------------------------

    def observe(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Tell the observers (traces, statistics) what the model's own router chose."""
        for observer in self.observers:
            observer(self.now, layer, ids, weights)

    def note_route(self, layer: LayerRuntime, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Where misses are rerouted: count what the router wanted against what is there, before that happens."""
        if self.dense_only:
            return
        with self.lock:
            layer.pool.prefetches.poll()
            layer.keeps_route = self.observing or layer.waits or not layer.pool.table.resident(layer.layer)
            self.observe(layer.layer, ids, weights)
            if layer.keeps_route:
                return  # nothing is rerouted; the pool counts
            rows = self.answering_of(layer, ids.shape[0])
            ran = ids if rows is None else ids[sent(torch.from_numpy(rows), ids.device)]
            layer.noted = layer.pool.bank.home.fetch(*self._to_note(layer, ran))

    def _to_note(self, layer: LayerRuntime, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `_count_noted` has to know: one token's route, else which experts a chunk chose, and tokens rerouted."""
        if ids.shape[0] == 1:
            return (ids,)
        chosen = torch.zeros(layer.experts, dtype=torch.bool, device=ids.device).index_fill_(0, ids.reshape(-1), True)
        allowed = layer.allowed()
        return (chosen,) if allowed is None else (chosen, (~allowed[ids]).any(dim=-1).sum())

    def _count_noted(self, layer: LayerRuntime) -> None:
        """Count what was rerouted, now that the program has waited for the layer's route: this is there, too."""
        if layer.noted is None:
            return
        (chosen, *rerouted), layer.noted = layer.noted(), None
        table, counters = layer.pool.table, layer.pool.table.counters[layer.layer]
        one = chosen.dim() == 2
        experts: list[int] = chosen.tolist()[0] if one else [e for e, was in enumerate(chosen.tolist()) if was]
        missing = sum(not table.is_resident((layer.layer, expert)) for expert in experts)
        counters.hits += len(experts) - missing
        counters.misses += missing
        counters.rerouted += bool(missing) if one else sum(int(each) for each in rerouted)

    def run(self, layer: LayerRuntime, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Compute one MoE layer.

        Args:
            layer: the layer.
            hidden: [tokens, hidden].
            ids: [tokens, k] experts to run.
            gates: [tokens, k] their weights.

        Returns:
            [tokens, hidden].

        Raises:
            UsageError: the model was closed, or a gradient is asked for.
            ReadError: an expert could not be read.
        """
        if self.closed:
            raise UsageError("this model was closed with emoe.close: load it again with emoe.load.")
        if self.dense_only:
            return torch.zeros_like(hidden)
        if hidden.requires_grad and torch.is_grad_enabled():
            raise UsageError("emoe runs inference only: call the model under torch.no_grad(), and do not train it.")
        if hidden.device != layer.pool.bank.device:
            raise UsageError(
                f"the model was moved to {hidden.device} and its experts lie on {layer.pool.bank.device}. Load it "
                f"where it is to run: emoe.load(..., device_map={str(hidden.device)!r})."
            )
        if hidden.dtype != layer.dtype:  # as transformers' own implementations do, under autocast or after .half()
            return self.run(layer, hidden.to(layer.dtype), ids, gates).to(hidden.dtype)
        with self.lock:
            rows = self.answering_of(layer, hidden.shape[0])
            if rows is None:
                return self._run(layer, hidden, ids, gates, self.mode == "exact" and bool(self.observers))
            if self.mode == "exact":
                self.observe(layer.layer, ids, gates)
            filling, counts = self.filling(layer, ids), layer.counts_with(ids) if self.observing else []
            at = sent(torch.from_numpy(rows), hidden.device)
            out = torch.zeros_like(hidden)
            out[at] = self._run(layer, hidden[at], ids[at], gates[at], False)
            if filling:  # last, so that no expert of these tokens takes the place of one that is to stay
                layer.prompt_counts = counts
                layer.pool.fill(layer.layer, filling, layer.wanted() if counts else None)
            return out

    def filling(self, layer: LayerRuntime, ids: torch.Tensor) -> frozenset[int]:
        """What the final layer, which runs few of these tokens, is to load besides: what would stay if it ran all.

        Nothing where its slots are full already, but for a prompt that is to fill them anew.
        """
        table = layer.pool.table
        if layer.spread is not None:
            return frozenset()
        if self.observing:
            counts = layer.counts_with(ids)
            return frozenset(expert for expert in layer.wanted(counts) if counts[expert])
        if self.mode == "exact" and table.below_quota(layer.layer):
            routes = ids.cpu().numpy()
            return kept_after(routes, self._mine.now.behind(), layer.experts, table.share(layer.layer))
        return frozenset()

    def _run(
        self, layer: LayerRuntime, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, observed: bool
    ) -> torch.Tensor:
        """Compute these tokens; tell the observers of them where they are to be `observed`."""
        table = layer.pool.table
        table.counters[layer.layer].tokens += hidden.shape[0]
        if self.mode == "exact":  # elsewhere `note_route` has done so, before it read off what is resident
            layer.pool.prefetches.poll()
        if hidden.shape[0] == 1:
            return self._run_one(layer, hidden, ids, gates, observed)
        if observed:
            self.observe(layer.layer, ids, gates)
        return self._run_chunk(layer, hidden, ids, gates)

    def _run_one(
        self, layer: LayerRuntime, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor, observed: bool
    ) -> torch.Tensor:
        beside = () if layer.hybrid is None else (hidden,)  # the CPU may need it
        arrived, *at_home = layer.pool.bank.home.fetch(ids, *beside)()
        if observed:
            self.observe(layer.layer, arrived, gates)
        self._count_noted(layer)
        experts: list[int] = arrived.tolist()[0]
        if layer.spread is not None:
            return layer.spread.one_token(hidden, experts, gates, self.counts(layer))
        aside = [] if layer.hybrid is None else layer.hybrid.aside(layer.layer, experts)
        here = [e for e in experts if e not in aside] if aside else experts
        taking = layer.pool.begin(layer.layer, here, count=self.counts(layer))
        try:
            if taking.flights and layer.kernels is None and not aside:
                return one_token_arriving(layer.math, hidden, self._arriving(layer, taking), gates)
            while taking.flights:
                layer.pool.arrive(taking)
            slots = taking.slots
            if self.after_take is not None:
                self.after_take(layer)
            if layer.hybrid is not None and aside:
                there = (slots, [layer.weights[s] for s in slots], layer.kernels)
                return layer.hybrid.one_token(layer.layer, (hidden, at_home[0]), experts, aside, there, gates)
            if layer.kernels is not None:
                return layer.kernels.one_token(hidden, slots, gates)
            return one_token(layer.math, hidden, [layer.weights[s] for s in slots], gates)
        finally:
            layer.pool.end(taking)

    def _arriving(self, layer: LayerRuntime, taking: Taking) -> Iterator[tuple[list[int], list[Weights]]]:
        """Places among one token's choices and the experts for them, as they are there; loads go on meanwhile."""
        there = [place for place, slot in enumerate(taking.slots) if slot >= 0]
        if there:
            yield there, [layer.weights[taking.slots[place]] for place in there]
        while taking.flights:
            begun = layer.pool.arrive_first(taking)
            if begun is not None:
                yield begun[0], FirstOnly([layer.weights[begun[1]]] * len(begun[0]))
            places = layer.pool.arrive(taking)
            if not taking.flights and self.after_take is not None:
                self.after_take(layer)
            yield places, [layer.weights[taking.slots[place]] for place in places]

    def _run_chunk(
        self, layer: LayerRuntime, hidden: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        fetch = layer.pool.bank.home.fetch
        grouping = grouped(layer.math, layer.weights[0], hidden.dtype, ids, layer.experts, fetch)
        self._count_noted(layer)
        prefill = self.now.phase == "prefill"
        if layer.spread is not None:
            return layer.spread.chunk(hidden, grouping, gates, prefill, self.counts(layer))
        wanted = None
        if prefill and self.observing:
            if not layer.prompt_counts:
                layer.prompt_counts = [0] * layer.experts
            for expert, n in grouping.counts.items():
                layer.prompt_counts[expert] += n
            wanted = layer.wanted()
        keep = self._kept_after(layer, ids) if prefill and self.mode == "exact" else frozenset()
        together = layer.kernels is not None
        stream = layer.pool.stream(
            layer.layer,
            grouping.by_count(),
            prefill=prefill,
            wanted=wanted,
            keep=keep,
            count=self.counts(layer),
            together=together,
            ahead=self.mode == "exact" or wanted is not None,
        )
        try:
            if layer.kernels is not None:
                return layer.kernels.many_tokens(hidden, grouping, stream, gates, self.workspace)
            ready = ((expert, layer.weights[slot]) for wave in stream for expert, slot in wave)
            return many_tokens(layer.math, hidden, grouping, ready, gates, self.workspace)
        finally:
            stream.close()  # type: ignore[attr-defined]
            self.workspace.trim()

    def _kept_after(self, layer: LayerRuntime, ids: torch.Tensor) -> frozenset[int]:
        """Which experts are to stay after a prompt: none in particular where all do, or where a device holds them."""
        table = layer.pool.table
        if table.all_fit or layer.pool.transfers is not None:
            return frozenset()
        behind = self.now.behind()
        if len(behind) != len(ids):  # a model that routes other rows than the pass's tokens: all count alike
            behind = np.zeros(len(ids), dtype=np.int64)
        return kept_after(ids.numpy(), behind, layer.experts, table.staying(layer.layer))


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts implementation that transformers calls in place of an experts module's own forward."""
    layer = getattr(self, "_emoe_layer", None)
    if layer is None:
        raise UsageError(
            f"experts_implementation={IMPLEMENTATION!r} works only on models made by emoe.load, not on a plain "
            f"{type(self).__name__}."
        )
    bound = cast(LayerRuntime, layer)
    return bound.owner.run(bound, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
