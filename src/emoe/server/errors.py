"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from typing_extensions import TypedDict

from emoe.engine.interface import EngineStoppedError, FinishedEvent, QueueFullError, TooLongError
from emoe.errors import EmoeError, ReadError, UsageError

INVALID = "invalid_request_error"
_MESSAGES_AT_MOST = 3
_FIRST = ("of_field", "extra_forbidden")


class ErrorDetail(TypedDict):
    """What OpenAI's clients read: `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success. `headers` go with it where nothing has been sent yet.

    `taken`: of a request that the engine had begun with, and whose end it counts itself.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.taken = False

    def body(self) -> ErrorBody:
        """The JSON value."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def from_engine(error: EmoeError, param: str | None = None) -> ApiError:
    """What the engine refused or what befell it. `param`: the field that holds the prompt."""
    text = str(error)
    if isinstance(error, QueueFullError):
        # Whole seconds, and never 0: that would ask for a retry at once.
        wait = max(1, math.ceil(error.retry_after_s))
        return ApiError(429, text, kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(wait)})
    if isinstance(error, TooLongError):
        return ApiError(400, text, param=param, code="context_length_exceeded")
    if isinstance(error, UsageError):
        return ApiError(400, text, param=param, code="invalid_value")
    if isinstance(error, EngineStoppedError):
        return ApiError(503, text, kind="service_unavailable_error", code="engine_stopped")
    code = "read_error" if isinstance(error, ReadError) else "engine_error"
    return ApiError(500, text, kind="server_error", code=code)


def from_finish(event: FinishedEvent, timeout_s: float | None) -> ApiError:
    """Why a request ended that neither finished nor was given up by its client."""
    error = _ended(event, timeout_s)
    error.taken = True
    return error


def _ended(event: FinishedEvent, timeout_s: float | None) -> ApiError:
    if event.error is not None:
        return from_engine(event.error)
    if event.reason == "timeout":
        # The client libraries repeat what ends with a 5xx; a request that takes too long would take so again.
        return ApiError(
            504,
            f"the request took longer than the server's {timeout_s:g} s, waiting included; ask for fewer tokens, or "
            "raise --request-timeout"
            if timeout_s is not None
            else "the request took longer than it may",
            kind="timeout_error",
            code="request_timeout",
            headers={"x-should-retry": "false"},
        )
    return ApiError(
        503,
        "the server is shutting down and ended the request before it was finished; send it again to another",
        kind="service_unavailable_error",
        code="shutting_down",
    )


def as_api_error(request: Request, error: Exception) -> ApiError:
    """What is answered to what an endpoint, routing or validation refused."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return explain(error.errors())
    if isinstance(error, HTTPException):
        return _of_routing(request, error)
    raise error


def _of_routing(request: Request, error: HTTPException) -> ApiError:
    """Paths and methods that do not exist, bodies that cannot be parsed."""
    where = f"{request.method} {request.url.path}"
    headers = error.headers
    if error.status_code == 404:
        return ApiError(404, f"unknown request URL: {where}; see /openapi.json", code="unknown_url")
    if error.status_code == 405:
        allowed = (headers or {}).get("Allow", "another")
        message = f"{where} is not allowed; use {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers=headers)
    if error.status_code == 400:
        return ApiError(400, "the body is not valid JSON in UTF-8", code="invalid_json")
    return ApiError(error.status_code, str(error.detail), headers=headers)


async def on_defect(_: Request, error: Exception) -> JSONResponse:
    """Handler for what should not happen: the log gets the traceback, the client the kind of error."""
    message = f"an error in the server ({type(error).__name__}); its log says more"
    return ApiError(500, message, kind="server_error", code="internal_error").response()


def explain(found: Sequence[Mapping[str, Any]]) -> ApiError:
    """One error for what validation found wrong with the first field that is wrong.

    What the schema itself says of a field (`of_field`) goes first, then fields that do not exist: where one is
    misspelt, the others' messages are noise.
    """
    first = next((entry for each in _FIRST for entry in found if entry["type"] == each), found[0])
    kind, place = first["type"], tuple(first["loc"])
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    param = _param([*place[1:], *([first["ctx"]["field"]] if kind == "of_field" else [])])
    if place[:1] == ("header",):
        param = ".".join(map(str, place[1:2]))
        return ApiError(400, f"header {param}: {_text(first)}", param=param, code="invalid_header")
    if not param:
        return ApiError(400, "the body must be a JSON object (Content-Type: application/json)", code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"missing required parameter: {param}", param=param, code="missing_required_parameter")
    same = [entry for entry in found if _param(tuple(entry["loc"])[1:2]) == _param(place[1:2])]
    same = [first] if kind == "of_field" else same
    texts = list(dict.fromkeys(_text(entry) for entry in same))[:_MESSAGES_AT_MOST]
    code = "unsupported_parameter" if any("not supported" in text for text in texts) else "invalid_value"
    return ApiError(400, f"{param}: {' or '.join(texts)}", param=param, code=code)


def _param(place: Iterable[Any]) -> str:
    """A field's path, dotted, without the names that pydantic gives to the branches of a union."""
    steps = (str(step) for step in place if isinstance(step, int) or _is_field(step))
    return ".".join(steps)


def _is_field(step: str) -> bool:
    return (
        step not in {"str", "int", "float", "bool", "none"}
        and not any(c in step for c in "[(-")
        and (step[:1].islower() or not step.isidentifier())
    )


def _text(entry: Mapping[str, Any]) -> str:
    text = str(entry["msg"]).removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def as_event(error: ApiError) -> bytes:
    """The error in the middle of a stream."""
    return b"data: " + json.dumps(error.body(), ensure_ascii=False).encode() + b"\n\n"
