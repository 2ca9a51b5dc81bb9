"""Continuous batching on transformers' manager: every contact with its internals is in this file.

What is used, and why not more of it: the paged cache, the packing of a step, the forward pass and the bookkeeping of
requests are transformers'. The loop is ours, because the manager's own thread ends at the first exception, and which
requests are admitted is ours (`emoe.scheduling`). `emoe.engine.moved` lists what is touched here, and names what has
moved when a release of transformers changes any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import scheduler as tf_scheduler
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from emoe.engine.attention import ATTENDS, IMPLEMENTATION, Packed, places_of, slides
from emoe.engine.moved import KNOWS_FLASH, PAGE_SIZE, check
from emoe.errors import UnsupportedModelError
from emoe.model.attention import INSTEAD_OF

SCHEDULER = "emoe"
ALL_MEMORY = 1e6
"""Share of the "available memory" that transformers may use: how much KV memory there is has been decided already."""

Rank = tuple[int, float]
Sample = Callable[[torch.Tensor, Sequence[str]], Sequence[int]]
"""Given the logits [rows, vocabulary] of the step's requests with a new token, and their ids, choose the tokens."""


class ScheduledOnly(tf_scheduler.Scheduler):  # type: ignore[misc]
    """Runs what was admitted, decoding requests first; what is preempted leaves, and is not taken back by itself."""

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
        """As transformers makes schedulers."""
        self.only: Collection[str] | None = None
        self.preempted: list[str] = []
        self.ranks: dict[str, Rank] = {}
        self.page_tokens = 0  # 0: windows, whose pages cannot be foreseen here
        self.free_tokens: Callable[[], int] = lambda: 0
        super().__init__(cache, safety_margin or 0.0, max_requests_per_batch)

    def enqueue(self, state: RequestState, rank: Rank) -> None:
        """Take an admitted request; of two, the one with the higher rank loses its pages first."""
        self.ranks[state.request_id] = rank
        super().add_waiting_request(state)

    def add_waiting_request(self, state: RequestState) -> None:
        """Called by the offloading manager with a request whose pages it took."""
        self.preempted.append(state.request_id)

    def preempt(self, request: str) -> None:
        """Take a request's pages."""
        self.set_request_cancellation(request)
        self.clear_cancelled_requests()
        self.preempted.append(request)

    def _make_room(self, decoding: Sequence[RequestState]) -> None:
        """Before transformers does: it would preempt whoever needs a page just now, be it the first that came."""
        while self.page_tokens and len(self.active_requests) > 1:
            pages = sum(
                state.position_offset % self.page_tokens == 0
                for state in decoding
                if state.request_id in self.active_requests
            )
            if pages * self.page_tokens <= self.free_tokens():
                return
            self.preempt(max(self.active_requests, key=lambda request: self.ranks[request]))

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[Any] | None, bool, int, int]:
        """The next step: decoding, then begun prompts, then new ones, in the order of admission."""
        among = [s for s in self.active_requests.values() if self.only is None or s.request_id in self.only]
        self._make_room([state for state in among if state.status == RequestStatus.DECODING])
        active = [state for state in among if state.request_id in self.active_requests]
        candidates = [state for state in active if state.status == RequestStatus.DECODING]
        candidates += [state for state in active if state.status == RequestStatus.PREFILLING]
        waiting = [self.waiting_requests[request] for request in self.waiting_requests_order]
        candidates += [state for state in waiting if self.only is None or state.request_id in self.only]
        left: set[str] = set()
        scheduled, failed, fast, queries, keys = self._process_candidates(candidates, token_budget, cache_budget, left)
        self._cleanup_waiting_queue(left)
        return (None, fast, 0, 0) if failed and not scheduled else (scheduled, fast, queries, keys)


tf_scheduler.SCHEDULER_MAPPING[SCHEDULER] = ScheduledOnly


@dataclass(frozen=True, slots=True)
class Slice:
    """One request's part of a step: `queries` tokens from position `past` on; `answers`: it gets a token."""

    id: str
    past: int
    queries: int
    answers: bool


@dataclass(frozen=True, slots=True)
class _State:
    """What a step changes of a request before its forward pass, to put it back if that fails."""

    state: RequestState
    status: RequestStatus
    position: int
    tokens: list[int]
    remaining: list[int]
    active: bool


class Batcher:
    """A model's paged cache and the requests in it. One thread drives it: `add`, `prepare`, `run`, `finish`, ..."""

    def __init__(
        self,
        model: PreTrainedModel,
        sample: Sample,
        *,
        page_tokens: int,
        kv_tokens: int,
        max_batch_tokens: int,
        max_running: int,
    ) -> None:
        """Make the cache and set the model's attention; `close` puts it back.

        Raises:
            UnsupportedModelError: this transformers, or this model, cannot batch continuously.
        """
        check()
        self._model = model
        self._sample = sample
        self._attention = model.config._attn_implementation
        self._page_tokens = page_tokens
        config = ContinuousBatchingConfig(
            **{PAGE_SIZE: page_tokens},
            **({"auto_switch_to_flash": False} if KNOWS_FLASH else {}),
            num_blocks=max(1, kv_tokens // page_tokens),
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_running,
            max_memory_percent=ALL_MEMORY,
            max_blocks_per_request=0,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            scheduler_type=SCHEDULER,
            safety_margin=0.0,
        )
        attend = ATTENDS.get(self._attention)
        try:
            if self._attention in INSTEAD_OF:  # a name that continuous batching does not know
                model.set_attn_implementation(INSTEAD_OF[self._attention])
            if not KNOWS_FLASH and "|" not in self._attention:  # else it would choose flash where there is one
                model.set_attn_implementation(f"paged|{model.config._attn_implementation}")
            manager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                continuous_batching_config=config,
            )
            self.sliding = slides(model)
            if attend is not None:
                model.set_attn_implementation(IMPLEMENTATION)
            self._manager: Any = manager
            self._processor: Any = manager._create_batch_processor()
            manager.batch_processor = self._processor
        except (ValueError, AttributeError, MemoryError, RuntimeError) as error:
            self._restore()
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be batched continuously by transformers {transformers.__version__}: "
                f"{error}"
            ) from error
        self._cache: Any = self._processor.cache
        self._scheduler: ScheduledOnly = self._processor.scheduler
        self._packed = None if attend is None else Packed(places_of(self._cache), attend)
        self._cache.emoe = self._packed
        self._processor.model_runner._sample = self._choose
        self.kv_tokens = self._capacity()
        self._scheduler.page_tokens = 0 if self.sliding else page_tokens
        self._scheduler.free_tokens = lambda: self.free_tokens
        self._before: list[_State] = []
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    def _probe(self) -> None:
        """Run the dense part once, a prompt and a token, and find out now what this model's attention cannot do.

        Raises:
            UnsupportedModelError: with what went wrong.
        """
        sample, self._sample = self._sample, lambda logits, requests: logits.argmax(dim=-1).tolist()
        try:
            self.add("probe", [0, 0], 2, ())
            for _ in range(2):
                self.prepare()
                self.run()
                self.finish()
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} cannot be batched continuously by transformers "
                f"{transformers.__version__}: its attention does not fit the paged cache ({error}). Use generate()."
            ) from error
        finally:
            self.remove("probe")
            self._sample = sample

    # -- requests -------------------------------------------------------------------------------------------

    def add(
        self, request: str, tokens: Sequence[int], max_tokens: int, ends: Collection[int], rank: Rank = (0, 0.0)
    ) -> None:
        """Take an admitted request: its prompt (with what it answered before a preemption) and its end tokens.

        Where KV memory is short, the request of the highest `rank` (priority, arrival) is preempted.
        """
        state = RequestState(
            request_id=request,
            initial_tokens=list(tokens),
            max_new_tokens=max_tokens,
            eos_token_id=sorted(ends) or None,
        )
        self._scheduler.enqueue(state, rank)

    def remove(self, request: str) -> None:
        """Forget a request and free its pages."""
        self._scheduler.set_request_cancellation(request)
        self._scheduler.clear_cancelled_requests()
        self._scheduler.ranks.pop(request, None)

    def take_preempted(self) -> list[str]:
        """The requests that lost their pages since the last call: add them again, with what they have answered."""
        lost, self._scheduler.preempted = self._scheduler.preempted, []
        return lost

    @property
    def free_tokens(self) -> int:
        """Tokens for which KV memory is free."""
        if hasattr(self._cache, "compute_free_capacity"):
            self._cache.pool.try_to_free_sectors()
            return int(self._cache.compute_free_capacity() * self.kv_tokens)
        return int(self._cache.get_num_free_blocks()) * self._page_tokens  # transformers < 5.19

    @property
    def empty(self) -> bool:
        """Whether no request is in the cache or waits for it."""
        return not self._scheduler.has_pending_requests()

    # -- steps ----------------------------------------------------------------------------------------------

    def prepare(self, only: Collection[str] | None = None) -> list[Slice]:
        """Choose and pack the next step, preempting if KV memory is short; empty if there is nothing to run.

        `only`: run none but these.
        """
        scheduler = self._scheduler
        scheduler.only = only
        self._before = [
            _State(s, s.status, s.position_offset, s.tokens_to_process, s.remaining_prefill_tokens, True)
            for s in scheduler.active_requests.values()
        ] + [
            _State(s, s.status, s.position_offset, s.tokens_to_process, s.remaining_prefill_tokens, False)
            for s in scheduler.waiting_requests.values()
        ]
        if not self._processor.prepare_next_batch():
            return []
        parts = [
            Slice(str(f.state.request_id), f.state.position_offset - f.query_length, f.query_length, f.has_new_token)
            for f in self._processor.inputs_and_outputs.requests_in_batch
        ]
        if self._packed is not None:
            self._packed.begin([part.queries for part in parts], [part.past for part in parts])
        return parts

    def input_ids(self, tokens: int) -> torch.Tensor:
        """int [1, tokens], the packed step; overwritten by the next."""
        ids: torch.Tensor = self._processor.inputs_and_outputs.input_ids[:tokens].unsqueeze(0)
        return ids

    def run(self) -> None:
        """The forward pass and the choice of tokens."""
        self._processor._generation_step(self._model)

    def finish(self) -> set[str]:
        """Note the step's tokens; return the requests that are done, whose pages are free then."""
        parts = list(self._processor.inputs_and_outputs.requests_in_batch)
        self._processor.update_batch()
        self._drop_outputs()
        return {str(f.state.request_id) for f in parts if f.state.status == RequestStatus.FINISHED}

    def undo(self) -> None:
        """After a step that failed: put its requests back to where they were before it.

        Pages written by it are written again. Sliding windows have overwritten what they still need: those requests
        are preempted instead, and read anew.
        """
        scheduler = self._scheduler
        for before in self._before:
            state, request = before.state, before.state.request_id
            if request not in scheduler.active_requests and request not in scheduler.waiting_requests:
                continue  # preempted before the step
            if self.sliding:
                scheduler.preempt(str(request))
                continue
            if not before.active and request in scheduler.active_requests:
                del scheduler.active_requests[request]
                self._cache.free_blocks(request)
                state.allocated_blocks = 0
                scheduler.enqueue(state, scheduler.ranks[request])
            state._status = before.status
            state.position_offset = before.position
            state.tokens_to_process = before.tokens
            state.remaining_prefill_tokens = before.remaining
        self._before = []
        self._drop_outputs()

    def close(self) -> None:
        """Free the cache and give the model its own attention back."""
        for request in [*self._scheduler.active_requests, *self._scheduler.waiting_requests]:
            self.remove(str(request))
        self._processor.model_runner._sample = None
        self._manager.batch_processor = None
        self._cache.emoe = None
        self._restore()

    # -- inside ---------------------------------------------------------------------------------------------

    def _choose(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """In place of the model runner's own: one choice per request with a new token."""
        requests = self._processor.inputs_and_outputs.requests_in_batch
        answering = [str(f.state.request_id) for f in requests if f.has_new_token]
        if answering:
            tokens = self._sample(scores[0, : len(answering)], answering)
            output_ids[0, : len(answering)] = torch.tensor(tokens, dtype=output_ids.dtype, device=output_ids.device)

    def _drop_outputs(self) -> None:
        outputs = self._manager.output_router.output_queue
        while not outputs.empty():
            outputs.get_nowait()

    def _capacity(self) -> int:
        """The longest request that fits alone."""
        if not self.sliding or not hasattr(self._cache, "can_store_request_tokens"):
            return int(self._cache.num_blocks) * self._page_tokens
        probe = RequestState(request_id="", initial_tokens=[])
        low, high = 0, int(self._cache.max_tokens_read)
        while low < high:
            middle = (low + high + 1) // 2
            if self._cache.can_store_request_tokens(probe, middle, dry_run=True):
                low = middle
            else:
                high = middle - 1
        return low

    def _restore(self) -> None:
        if self._model.config._attn_implementation != self._attention:
            self._model.set_attn_implementation(self._attention)
