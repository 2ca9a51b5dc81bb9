"""What goes into the engine and what comes out of it. No torch: the server and the simulator read these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from emoe.config import Mode
from emoe.errors import EmoeError, UsageError

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
TaskSource = Literal["label", "keywords", "none"]


class QueueFullError(EmoeError):
    """The queue holds as many requests as it may. `retry_after_s`: when there is likely room."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooLongError(UsageError):
    """The prompt, or prompt and answer, are longer than the model or its KV memory has room for."""


class EngineStoppedError(EmoeError):
    """The engine is stopping, has stopped or has died, and takes no requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens of this share.
        top_k: sample from this many likeliest tokens, None: all.
        seed: with it, the same request gives the same tokens whatever else runs, except where rounding decides (another
            batch rounds the logits differently, in bf16 visibly so); None: drawn anew.
        logprobs: None: none; n: of the chosen token and of the n likeliest, from the unscaled logits.
        ignore_end: go on after the model's end token, to `max_tokens` (for benchmarks).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    logprobs: int | None = None
    ignore_end: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One request for one answer.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_tokens: the longest answer, in tokens.
        sampling: how tokens are chosen.
        task: its label, None: extract it from the prompt's keywords where there is a profile. The engine tells so many
            labels apart (`emoe.tasks.labels`), and takes further ones as "other".
        priority: lower goes first.
        ttft_slo_s, tpot_slo_s: targets; None: the engine's default for the task, if there is one.
        deadline_s: seconds after submission when it ends with reason "timeout", None: never.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    task: str | None = None
    priority: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of an answer. `at_s` on time.perf_counter's clock; `top`: (token, log-probability), best first."""

    token: int
    at_s: float
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of one request. Seconds; `None` where it did not get that far, or has no such target.

    `experts_loaded` counts expert keys that were not there when this request's tokens wanted them and that were loaded;
    a load that several requests of one step wanted counts for each of them. `hits` and `misses`: expert keys
    wanted per layer and step. `rerouted_tokens`: tokens (per layer) of which a chosen expert was replaced.
    """

    id: str
    task: str | None
    task_source: TaskSource
    input_tokens: int
    output_tokens: int
    arrived_s: float
    queue_s: float
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    preemptions: int
    hits: int
    misses: int
    experts_loaded: int
    bytes_loaded: int
    rerouted_tokens: int
    ttft_slo_s: float | None
    tpot_slo_s: float | None
    ttft_met: bool | None
    tpot_met: bool | None
    slo_met: bool | None
    mode: Mode
    lossy: bool


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of an answer: always the last event, and always one. `error` only with reason "error"."""

    reason: FinishReason
    report: Report
    error: EmoeError | None = None


Event = TokenEvent | FinishedEvent
OnEvent = Callable[[Event], None]
"""Called from the engine's thread, in order; must return at once and not raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTargets:
    """Default targets of a task, seconds."""

    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How the engine runs.

    Attributes:
        scheduler: fifo, edf, emoe or affinity.
        max_running: requests in a step at most.
        max_batch_tokens: tokens of a step at most; longer prompts are read in chunks.
        kv_tokens: tokens that KV memory holds for all requests together.
        page_tokens: tokens of a page of KV memory.
        max_waiting: requests that may wait; one more is refused with QueueFullError.
        context: the longest prompt and answer together.
        max_input_tokens: of all running requests together (T_max of Algorithm 1), None: as many as KV memory holds.
        targets: defaults by task; the key None is for all others.

    Raises:
        UsageError: settings that cannot be meant.
    """

    scheduler: str = "affinity"
    max_running: int = 32
    max_batch_tokens: int = 512
    kv_tokens: int = 16384
    page_tokens: int = 32
    max_waiting: int = 256
    context: int | None = None
    max_input_tokens: int | None = None
    targets: dict[str | None, TaskTargets] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_waiting < 0 or self.kv_tokens < 1:
            raise UsageError("max_running and kv_tokens are at least 1, and max_waiting at least 0.")
        if self.max_batch_tokens < self.max_running:
            raise UsageError(
                f"a step of {self.max_batch_tokens} tokens cannot hold {self.max_running} requests: raise "
                "max_batch_tokens (--max-num-batched-tokens) or lower max_running (--max-num-seqs)."
            )
        if self.page_tokens < 4:  # transformers' least
            raise UsageError(f"a page of {self.page_tokens} tokens is too small: give at least 4.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the start, and what is the case now. `hits` and `misses` by (task, MoE layer)."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens: int
    steps: int
    busy_s: float
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    hits: dict[tuple[str, int], int]
    misses: dict[tuple[str, int], int]
    rerouted_tokens: dict[str, int]
    routed_tokens: dict[str, int]
    loads: int
    bytes_loaded: int
    load_wait_s: float
    prefetches_unused: int
    prefetch_bytes_unused: int
    resident_bytes: int
    budget_bytes: int
    predictor_calls: int
    predictor_s: float
    predictor_hit_rate: float | None
    plans: int
