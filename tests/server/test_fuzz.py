"""Requests that schemathesis makes of the server's own OpenAPI document, right ones and wrong ones.

Whatever comes, the answer is a success or an error in OpenAI's shape, and never a 5xx: 503 (stopping) and 504 (took too
long) are documented, but this server neither stops nor waits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.server.conftest import Running, Serve
from tests.server.stand_ins import ScriptedEngine, finished, tokens

schemathesis = pytest.importorskip("schemathesis")

GENERATE = ("/v1/chat/completions", "/v1/completions")
OTHERS = (
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/health", "GET"),
    ("/version", "GET"),
    ("/metrics", "GET"),
)
WORLD = 1183


def document(server: Running) -> Any:
    """What /openapi.json says, with cases that fit it and cases that do not."""
    made = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    made.config.generation.update(modes=list(schemathesis.GenerationMode))
    return made


def fuzz(schema: Any, path: str, method: str, examples: int, change: Callable[[Any], None] | None = None) -> set[int]:
    """Send so many requests and check every answer; the statuses there were."""
    seen: set[int] = set()
    modes = list(schemathesis.GenerationMode)
    if method == "GET":
        modes = [schemathesis.GenerationMode.POSITIVE]  # no parameter but a text: none can be wrong
    for mode in modes:

        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def run(case: Any) -> None:
            if change is not None:
                change(case)
            seen.add(check(case))

        run()
    return seen


def check(case: Any) -> int:
    """Send it; what must hold of its answer. Returns the status."""
    reply = case.call()
    said = (reply.status_code, reply.text[:500], case.body)
    assert reply.status_code < 500, said
    kind = reply.headers.get("content-type", [""])[0]
    if reply.status_code == 200:
        if kind.startswith("text/event-stream"):
            assert reply.text.endswith("data: [DONE]\n\n"), said
        elif kind.startswith("application/json"):
            assert isinstance(json.loads(reply.text), dict), said
        return 200
    assert reply.status_code >= 400, said
    assert kind.startswith("application/json"), said
    body = json.loads(reply.text)
    assert set(body) == {"error"}, said
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, said
    assert error["message"] and error["type"] and error["code"], said
    assert error["param"] is None or isinstance(error["param"], str), said
    return int(reply.status_code)


@pytest.mark.parametrize("path", GENERATE)
def test_generation_with_an_engine_that_answers_at_once(serve: Serve, path: str) -> None:
    server = serve(ScriptedEngine([*tokens(WORLD), finished()]))
    seen = fuzz(document(server), path, "POST", 60)
    assert {200, 400} <= seen


@pytest.mark.parametrize("path", GENERATE)
def test_generation_with_the_real_engine(server: Running, path: str) -> None:
    def shorten(case: Any) -> None:
        """Right or wrong as it was, but soon done."""
        body = case.body
        if isinstance(body, dict):
            for name, most in (("max_tokens", 2), ("max_completion_tokens", 2), ("n", 2)):
                if isinstance(body.get(name), int) and body[name] > most:
                    body[name] = most
            if "max_tokens" not in body and "max_completion_tokens" not in body:
                body["max_tokens"] = 2

    assert 400 in fuzz(document(server), path, "POST", 15, shorten)
    assert server.service.engine.alive


@pytest.mark.parametrize(("path", "method"), OTHERS)
def test_other_paths(server: Running, path: str, method: str) -> None:
    assert fuzz(document(server), path, method, 30)
