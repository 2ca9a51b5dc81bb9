"""What the server answers, as OpenAI's clients expect it, and what emoe says beside it."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from emoe.engine.interface import Report


class Usage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Told(TypedDict):
    """What became of one answer (`emoe` in a reply). Milliseconds; null where there is no such figure or target."""

    task: str | None
    task_source: str
    queue_ms: float
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float
    slo_ttft_ms: float | None
    slo_tpot_ms: float | None
    ttft_met: bool | None
    tpot_met: bool | None
    slo_met: bool | None
    hits: int
    misses: int
    experts_loaded: int
    bytes_loaded: int
    rerouted_tokens: int
    preemptions: int
    mode: str
    lossy: bool
    choices: NotRequired[list[Any]]


class Turn(TypedDict):
    """A message of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None


class TopToken(TypedDict):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TopToken):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopToken]


class ChatLogprobs(TypedDict):
    """Of a chat answer or a piece of it."""

    content: list[ChosenToken]
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: Turn
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(TypedDict):
    """The reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    emoe: Told


class TextLogprobs(TypedDict):
    """Of a completion or a piece of it."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One answer."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(TypedDict):
    """The reply of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str
    emoe: Told


class ModelCard(TypedDict):
    """The model that is served. `max_model_len`: the context, as vLLM says it.

    `emoe`: mode, lossy, expert dtype, budget, context, scheduler, KV memory.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    emoe: dict[str, Any]


class ModelList(TypedDict):
    """The reply of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(TypedDict):
    """The reply of /health when all is well."""

    status: Literal["ok"]


class Version(TypedDict):
    """The reply of /version."""

    version: str


class Tokenized(TypedDict):
    """The reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The reply of /detokenize."""

    prompt: str


def told(report: Report) -> Told:
    """The report in milliseconds."""
    return {
        "task": report.task,
        "task_source": report.task_source,
        "queue_ms": round(report.queue_s * 1e3, 3),
        "ttft_ms": _ms(report.ttft_s),
        "tpot_ms": _ms(report.tpot_s),
        "e2e_ms": round(report.e2e_s * 1e3, 3),
        "slo_ttft_ms": _ms(report.ttft_slo_s),
        "slo_tpot_ms": _ms(report.tpot_slo_s),
        "ttft_met": report.ttft_met,
        "tpot_met": report.tpot_met,
        "slo_met": report.slo_met,
        "hits": report.hits,
        "misses": report.misses,
        "experts_loaded": report.experts_loaded,
        "bytes_loaded": report.bytes_loaded,
        "rerouted_tokens": report.rerouted_tokens,
        "preemptions": report.preemptions,
        "mode": report.mode,
        "lossy": report.lossy,
    }


def told_of(reports: list[Report]) -> Told:
    """Of the first answer; of several, all of them under `choices`."""
    first = told(reports[0])
    if len(reports) > 1:
        first["choices"] = [told(report) for report in reports]
    return first


def told_headers(said: Told) -> dict[str, str]:
    """The same for clients that look at headers."""
    shown = ("task", "task_source", "queue_ms", "ttft_ms", "slo_met", "experts_loaded", "mode", "lossy")
    return {f"x-emoe-{name.replace('_', '-')}": plain(value) for name in shown if (value := said.get(name)) is not None}


def plain(value: object) -> str:
    """The value of a header."""
    if isinstance(value, bool):
        return str(value).lower()
    # Task labels may hold any character, headers may not.
    return str(value).encode("ascii", "backslashreplace").decode()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Tokens read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
