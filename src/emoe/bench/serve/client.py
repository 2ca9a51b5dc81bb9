"""One request at a time to a server that speaks OpenAI's HTTP, and when each part of its answer came."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import httpx

from emoe.bench.serve.stream import DONE, EventParser, error_of, read_part
from emoe.bench.serve.targets import Targets
from emoe.bench.serve.workload import Planned
from emoe.errors import EmoeError, UsageError

Endpoint = Literal["chat", "completions"]
PATHS: dict[str, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

OURS = "emoe"
"""Who /v1/models says a model is owned by where emoe's own fields are understood."""

REJECTED = 429
INTERRUPTED = "interrupted"
"""The error of a request that the benchmark itself gave up."""

_KEEP_ALIVE_S = 2.0  # shorter than servers keep a connection (uvicorn: 5 s), so that none is found closed


class ServerUnusableError(EmoeError):
    """The server cannot be reached, or does not answer as OpenAI's would."""


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request. Times are seconds on `time.perf_counter`'s clock.

    Attributes:
        number, task, label: as planned.
        due_s: when it was to be sent.
        sent_s: when it was.
        first_s: when its first text came (where there was no text at all: its end).
        last_s: when the answer ended: its finish reason, else its last text.
        ended_s: when the connection was done, also of what failed.
        events_s: when each piece of text came.
        input_tokens, output_tokens: by the server's usage; without one, unknown and the number of pieces.
        counted: whether the server's usage told the tokens.
        status: HTTP status, None: there was no answer.
        error: its name, None: the answer is whole.
        message: the error's text.
        finish: the server's finish reason.
        text: the answer.
        told: what an emoe server says of it.
        met: whether it kept its targets.
    """

    number: int
    task: str | None
    label: str | None = None
    due_s: float = 0.0
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    ended_s: float = 0.0
    events_s: list[float] = field(default_factory=list)
    input_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    status: int | None = None
    error: str | None = None
    message: str = ""
    finish: str | None = None
    text: str = ""
    told: dict[str, Any] | None = None
    met: bool = False

    @property
    def ok(self) -> bool:
        """Whether the answer is whole."""
        return self.error is None

    @property
    def late_s(self) -> float:
        """How late the generator was."""
        return max(0.0, self.sent_s - self.due_s)

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first text."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def e2e_s(self) -> float | None:
        """From sending to the end of the answer."""
        return None if self.last_s is None else self.last_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of each token after the first; None where there is only one."""
        if self.first_s is None or self.last_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Times between pieces of text."""
        return [after - before for before, after in zip(self.events_s, self.events_s[1:], strict=False)]

    def as_dict(self, start_s: float) -> dict[str, Any]:
        """For JSON; times relative to `start_s`. Neither text nor the times of all pieces."""
        return {
            "number": self.number,
            "task": self.task,
            "label": self.label,
            "sent_s": self.sent_s - start_s,
            "late_s": self.late_s,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "e2e_s": self.e2e_s,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "status": self.status,
            "error": self.error,
            "message": self.message,
            "finish": self.finish,
            "met": self.met,
            "emoe": self.told,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Who is asked. `ours`: it says that it is emoe; `context`: the longest prompt and answer, where it says so."""

    model: str
    ours: bool = False
    context: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What every request has in common."""

    endpoint: Endpoint = "chat"
    temperature: float = 0.0
    ignore_eos: bool = False
    timeout_s: float = 600.0
    usage: bool = True


def base_url(url: str) -> str:
    """The server's address without a trailing /v1. Raises UsageError."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError(f"{url!r} is no address of a server; write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


def _own_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Client:
    """An asynchronous context manager. Nothing is ever sent twice."""

    def __init__(self, url: str, asking: Asking, api_key: str | None = None) -> None:
        self.url = base_url(url)
        self.asking = asking
        self.server = Server(model="")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=None,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=not _own_machine(self.url),  # a proxy has no business on the way to this machine
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def look(self, model: str | None) -> Server:
        """Ask who is there, for `model` if one is named, else for the first that is served.

        A server that cannot list its models is asked for the one that is named, as one that is not emoe.

        Raises:
            ServerUnusableError: nobody answers, or not like an OpenAI server.
        """
        try:
            answer = await self._http.get("/v1/models", timeout=min(30.0, self.asking.timeout_s))
        except httpx.HTTPError as error:
            raise ServerUnusableError(f"no server answers at {self.url}: {error or type(error).__name__}") from error
        if answer.status_code != 200:
            if model is not None:
                self.server = Server(model=model)
                return self.server
            name, text = _refusal(answer.content, "no reason")
            raise ServerUnusableError(f"{self.url}/v1/models answers {answer.status_code} ({name}): {text}")
        try:
            cards = {str(card["id"]): card for card in answer.json()["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ServerUnusableError(f"{self.url}/v1/models is not a list of models as OpenAI's") from error
        if model is None:
            if not cards:
                raise ServerUnusableError(f"{self.url} lists no model; name one with --model")
            model = next(iter(cards))
        card = cards.get(model, {})
        told = card.get("emoe") if isinstance(card.get("emoe"), dict) else {}
        context = card.get("max_model_len") or told.get("context")
        ours = card.get("owned_by") == OURS or bool(told)
        self.server = Server(model=model, ours=ours, context=context, facts=card)
        return self.server

    def body(self, planned: Planned) -> dict[str, Any]:
        """The JSON to send. emoe's own fields only where the server says that it is emoe."""
        body: dict[str, Any] = {
            "model": self.server.model,
            "max_tokens": planned.max_tokens,
            "temperature": self.asking.temperature,
            "stream": True,
        }
        if self.asking.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": planned.prompt}]
        else:
            body["prompt"] = planned.prompt
        if self.asking.usage:
            body["stream_options"] = {"include_usage": True}
        if self.asking.ignore_eos:
            body["ignore_eos"] = True
        if self.server.ours and planned.label is not None:
            body["metadata"] = {"task": planned.label}
        return body

    def headers(self, targets: Targets) -> dict[str, str]:
        """An emoe server is told the targets, to the microsecond."""
        if not self.server.ours:
            return {}
        given = {"x-slo-ttft-ms": targets.ttft_s, "x-slo-tpot-ms": targets.tpot_s}
        return {name: f"{seconds * 1e3:.3f}" for name, seconds in given.items() if seconds is not None}

    async def ask(self, planned: Planned, targets: Targets, record: Record | None = None) -> Record:
        """Send one request and read its answer to the end. Failures are in the record, by name; none is raised.

        Whoever may cancel this gives the record, and finds in it what came until then.
        """
        if record is None:
            record = Record(number=planned.number, task=planned.task, label=planned.label, due_s=time.perf_counter())
        record.sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(self.asking.timeout_s):
                await self._exchange(planned, targets, record)
        except TimeoutError:
            record.error = "timeout"
            record.message = f"no whole answer within {self.asking.timeout_s:g} s (--timeout)"
        except httpx.ConnectError as error:
            record.error, record.message = "no connection", str(error)
        except httpx.HTTPError as error:
            record.error, record.message = "connection lost", f"{type(error).__name__}: {error}".rstrip(": ")
        finally:
            record.ended_s = time.perf_counter()
        record.met = record.ok and record.ttft_s is not None and targets.met(record.ttft_s, record.tpot_s)
        return record

    async def _exchange(self, planned: Planned, targets: Targets, record: Record) -> None:
        content = json.dumps(self.body(planned)).encode()
        headers = {"Content-Type": "application/json", **self.headers(targets)}
        record.sent_s = time.perf_counter()
        async with self._http.stream("POST", PATHS[self.asking.endpoint], content=content, headers=headers) as answer:
            record.status = answer.status_code
            if answer.status_code != 200:
                name, record.message = _refusal(await answer.aread(), answer.reason_phrase or "no reason")
                record.error = f"{'rejected, ' if answer.status_code == REJECTED else ''}{answer.status_code} {name}"
                return
            parser, reader = EventParser(), _Reader(record)
            # To its very end, or the connection could not be used again.
            async for piece in answer.aiter_bytes():
                now = time.perf_counter()
                for data in parser.feed(piece):
                    reader.note(data, now)
            reader.end()


class _Reader:
    """Notes the events of one stream in its record."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._done_s: float | None = None

    def note(self, data: str, now: float) -> None:
        """One event; what comes after an error or the end is passed over."""
        record = self._record
        if self._done_s is not None or record.error is not None:
            return
        if data == DONE:
            self._done_s = now
            return
        try:
            part = read_part(data)
        except ValueError as error:
            record.error, record.message = "malformed stream", str(error)
            return
        if part.error is not None:
            name, record.message = part.error
            record.error = f"stream {name}"
            return
        if part.text:
            record.events_s.append(now)
            record.text += part.text
            record.first_s = now if record.first_s is None else record.first_s
            if not record.counted:
                record.output_tokens += 1
        if part.finish is not None and record.finish is None:
            record.finish, record.last_s = part.finish, now
        if part.usage is not None:
            record.input_tokens, record.output_tokens = part.usage
            record.counted = True
        record.told = part.told or record.told

    def end(self) -> None:
        """Nothing more comes."""
        record = self._record
        if record.error is not None:
            return
        if record.finish is None and (self._done_s is None or not record.text):
            record.error, record.message = "stream cut", "the stream ended without an end of the answer"
            return
        if record.last_s is None:
            record.last_s = record.events_s[-1]
        if record.first_s is None:
            record.first_s = record.last_s


def _refusal(content: bytes, otherwise: str) -> tuple[str, str]:
    """Name and text of an answer that is no success."""
    text = content.decode("utf-8", "replace")
    try:
        return error_of(json.loads(text), otherwise)
    except ValueError:
        return otherwise, text[:200]
