"""From submissions to an HTTP answer, whole or streamed; the endpoints differ in the shape of what they say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from emoe.engine.interface import Event, FinishedEvent, Report, Submission, TokenEvent
from emoe.errors import EmoeError
from emoe.server.bridge import ClientGoneError, Requests
from emoe.server.errors import ApiError, as_event, from_engine, from_finish
from emoe.server.replies import Usage, told, told_headers, told_of, usage
from emoe.server.service import Service
from emoe.server.streaming import AnswerText

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
CLIENT_GONE = 499


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, or all of it: text, its tokens, and where in the text each begins."""

    text: str
    tokens: Sequence[TokenEvent] = ()
    begins: Sequence[int] = ()


class Shape(Protocol):
    """How an endpoint says things."""

    id: str
    param: str

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chunk that goes before the first of an answer."""
        ...

    def chunk(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """One chunk of a stream."""
        ...

    def closing(self, used: Usage) -> dict[str, Any]:
        """The chunk that tells the number of tokens."""
        ...

    def whole(self, answers: Sequence[tuple[Piece, str]], used: Usage) -> dict[str, Any]:
        """The answer at once: for each choice everything, and its reason."""
        ...


@dataclass(slots=True)
class Answer:
    """One answer as it grows. `sent`: how many of its tokens have gone out."""

    text: AnswerText
    tokens: list[TokenEvent] = field(default_factory=list)
    sent: int = 0
    report: Report | None = None
    reason: str = ""

    def add(self, event: TokenEvent) -> Piece:
        """What can go out with this token."""
        self.tokens.append(event)
        return self._piece(self.text.add(event.token))

    def finish(self, event: FinishedEvent) -> Piece:
        """The rest."""
        self.report = event.report
        self.reason = "stop" if self.text.stopped else event.reason
        return self._piece(self.text.finish())

    def _piece(self, text: str) -> Piece:
        """Tokens go out with the text that they begin in; those of a stop string do not."""
        begins, start = self.text.begins, self.sent
        while self.sent < len(self.tokens) and begins[self.sent] < self.text.length:
            self.sent += 1
        return Piece(text, self.tokens[start : self.sent], begins[start : self.sent])


class Answering:
    """The answers of one HTTP request."""

    def __init__(self, service: Service, shape: Shape, submissions: Sequence[Submission], stops: list[str]) -> None:
        self._service = service
        self._shape = shape
        self._submissions = submissions
        self.answers = [Answer(AnswerText(service.tokens.decode, stops)) for _ in submissions]
        self.requests = Requests(service.engine, self._measure)
        self._last: list[TokenEvent | None] = [None] * len(submissions)

    def _measure(self, index: int, event: Event) -> None:
        """Every event, also of answers that nobody waits for any more."""
        if isinstance(event, FinishedEvent):
            # The engine was told to end what a stop string has ended.
            reason = "stop" if self.answers[index].text.stopped else event.reason
            self._service.metrics.ended(event.report, reason)
        else:
            self._service.metrics.token(event, self._last[index])
            self._last[index] = event

    def submit(self) -> None:
        """Give the requests to the engine.

        Raises:
            ApiError: one of them was refused.
        """
        try:
            self.requests.submit(self._submissions)
        except EmoeError as error:
            raise from_engine(error, self._shape.param) from error

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece] | None, None]:
        """(answer, what is new of it) in order of arrival, None when nothing came for a while.

        Raises:
            ApiError: an answer ended that had not finished.
            ClientGoneError: the client has hung up.
        """
        settings = self._service.settings
        left = len(self.answers)
        while left:
            got = await self.requests.next(settings.keep_alive_s)
            if got is None:
                yield None
                continue
            index, event = got
            answer = self.answers[index]
            if isinstance(event, FinishedEvent):
                left -= 1
                if event.reason not in {"stop", "length"} and not answer.text.stopped:
                    raise from_finish(event, settings.request_timeout_s)
                yield index, answer.finish(event)
            elif not answer.text.stopped:
                piece = answer.add(event)
                if answer.text.stopped:
                    self.requests.cancel(index)
                yield index, piece

    def used(self, prompts: int) -> Usage:
        """Tokens of all answers; a prompt counts once, however many answers it has."""
        each = len(self._submissions) // prompts
        read = sum(len(submission.prompt_ids) for submission in self._submissions[::each])
        return usage(read, sum(len(answer.tokens) for answer in self.answers))


async def answer_whole(answering: Answering, shape: Shape, request: Request, prompts: int) -> Response:
    """Everything at once. When the client hangs up, the requests are cancelled."""
    pieces: list[list[Piece]] = [[] for _ in answering.answers]
    with answering.requests:
        answering.submit()
        answering.requests.watch(request.receive)
        try:
            async for got in answering.pieces():
                if got is not None:
                    pieces[got[0]].append(got[1])
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
    wholes = [(_joined(parts), answer.reason) for parts, answer in zip(pieces, answering.answers, strict=True)]
    said = told_of([answer.report for answer in answering.answers if answer.report is not None])
    body = shape.whole(wholes, answering.used(prompts)) | {"emoe": said}
    return JSONResponse(body, headers=told_headers(said) | {"x-request-id": shape.id})


def _joined(parts: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(part.text for part in parts),
        [token for part in parts for token in part.tokens],
        [begin for part in parts for begin in part.begins],
    )


def answer_stream(
    answering: Answering, shape: Shape, prompts: int, include_usage: bool, headers: Mapping[str, str], write_s: float
) -> Response:
    """A stream of server-sent events. The requests must have been submitted."""
    chunks = _chunks(answering, shape, prompts, include_usage)
    return EventStream(answering.requests, chunks, {**headers, "x-request-id": shape.id}, write_s)


async def _chunks(answering: Answering, shape: Shape, prompts: int, include_usage: bool) -> AsyncGenerator[bytes, None]:
    opened: set[int] = set()
    try:
        async for got in answering.pieces():
            if got is None:
                yield KEEP_ALIVE
                continue
            index, piece = got
            answer = answering.answers[index]
            over = answer.report is not None
            if not over and not piece.text:
                continue
            if index not in opened and (opening := shape.opening(index)) is not None:
                yield _event(opening, include_usage)
            opened.add(index)
            if piece.text or piece.tokens:
                yield _event(shape.chunk(index, piece, None), include_usage)
            if answer.report is not None:
                last = shape.chunk(index, Piece(""), answer.reason)
                yield _event(last | {"emoe": told(answer.report)}, include_usage)
        if include_usage:
            yield _event(shape.closing(answering.used(prompts)), False)
    except ApiError as error:
        yield as_event(error)
    yield DONE


def _event(body: Mapping[str, Any], usage_null: bool) -> bytes:
    """One event. With include_usage, every chunk but the last says that it has none."""
    if usage_null:
        body = {**body, "usage": None}
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends chunks as they come, and ends the requests when the client hangs up or stops reading."""

    media_type = "text/event-stream"

    def __init__(
        self, requests: Requests, chunks: AsyncGenerator[bytes, None], headers: Mapping[str, str], write_s: float
    ) -> None:
        self._requests = requests
        self._chunks = chunks
        self._write_s = write_s
        self.status_code = 200
        self.background = None
        # Proxies must pass on every piece at once.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        with self._requests:
            self._requests.watch(receive)
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async with aclosing(self._chunks) as chunks:
                    async for chunk in chunks:
                        message = {"type": "http.response.body", "body": chunk, "more_body": True}
                        async with asyncio.timeout(self._write_s):
                            await send(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (ClientGoneError, TimeoutError, OSError):
                # Nobody reads this any more. An answer without its end closes the connection.
                return
