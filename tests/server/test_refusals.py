"""What is refused is refused by name, in OpenAI's shape; what changes nothing is accepted."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from emoe.server.schemas import ChatRequest, TokenizeRequest
from tests.server.conftest import Running

TURN = [{"role": "user", "content": "Hi"}]
JSON = {"content-type": "application/json"}


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error, which has OpenAI's shape."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "user": "me", "store": False},
        {"frequency_penalty": None, "logit_bias": None, "tools": None, "stop": None, "seed": None, "top_p": None},
        {"parallel_tool_calls": True, "response_format": {"type": "text"}, "tool_choice": "none", "tools": []},
        {"service_tier": "auto", "modalities": ["text"], "min_p": 0, "repetition_penalty": 1.0, "top_k": -1},
        {"temperature": 0, "top_p": 1, "top_k": 0, "stop": [], "metadata": {}, "emoe": {}, "stream": False},
        {"model": "emoe-nano", "safety_identifier": "a", "prompt_cache_key": "b", "stream_options": None},
    ],
)
def test_fields_that_change_nothing(server: Running, fields: dict[str, Any]) -> None:
    assert server.chat(max_tokens=1, **fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown_parameter"),
        ({"emoe": {"speed": 3}}, "emoe.speed", "unknown_parameter"),
        ({"messages": [{**TURN[0], "mood": "x"}]}, "messages.0.mood", "unknown_parameter"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "unsupported_parameter"),
        ({"frequency_penalty": False}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"messages": [{**TURN[0], "name": "Bob"}]}, "messages.0.name", "unsupported_parameter"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_value"),
        ({"seed": 1 << 64}, "seed", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
        ({"metadata": {"task": 3}}, "metadata.task", "invalid_value"),
        ({"emoe": {"slo_ttft_ms": 0}}, "emoe.slo_ttft_ms", "invalid_value"),
        ({"emoe": {"task": " x"}}, "emoe.task", "invalid_value"),
        ({"priority": 1 << 40}, "priority", "invalid_value"),
    ],
)
def test_fields_that_are_refused(server: Running, fields: dict[str, Any], param: str, code: str) -> None:
    error = error_of(server.chat(**fields), 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs: true"),
        ({"stream_options": {"include_usage": True}}, "stream_options: it is for streams: set stream to true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens: is the older name of max_completion_tokens"),
        ({"metadata": {"task": "a"}, "emoe": {"task": "b"}}, "metadata.task: it and emoe.task name two tasks"),
        ({"metadata": {"task": ""}}, "metadata.task: must be a label"),
        ({"metadata": {"task": "a "}}, "metadata.task: must be a label"),
        ({"metadata": {"task": "a" * 65}}, "metadata.task: must be a label"),
        ({"metadata": {"task": "a\nb"}}, "metadata.task: has characters that cannot be printed"),
        ({"metadata": {"task": "a\x00b"}}, "metadata.task: has characters that cannot be printed"),
        ({"emoe": {"task": "a\rb"}}, "emoe.task: has characters that cannot be printed"),
        ({"emoe": {"task": ""}}, "emoe.task: string should have at least 1 character"),
        ({"stop": ""}, "stop: string should have at least 1 character"),
        ({"stop": "a" * 1025}, "stop: string should have at most 1024 characters"),
    ],
)
def test_fields_at_odds(server: Running, fields: dict[str, Any], message: str) -> None:
    error = error_of(server.chat(**fields), 400)
    assert error["message"].startswith(message)
    assert (error["param"], error["code"]) == (message.partition(":")[0], "invalid_value")


@pytest.mark.parametrize(
    ("turn", "param", "said"),
    [
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}],
            },
            "messages.1.content.1.type",
            "'image_url' is not supported: the model reads text",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
            "messages.1.content.0.type",
            "'input_audio' is not supported: the model reads text",
        ),
        (
            {"role": "tool", "content": "3", "tool_call_id": "1"},
            "messages.1.role",
            "'tool' is not supported: there are no tools here",
        ),
        ({"role": "function", "content": None, "name": "f"}, "messages.1.role", "'function' is not supported"),
        (
            {"role": "user", "content": [{"type": "x" * 1000}]},
            "messages.1.content.0.type",
            f"'{'x' * 64}' is not supported: the model reads text",
        ),
    ],
)
def test_what_the_model_cannot_read_is_named(server: Running, turn: dict[str, Any], param: str, said: str) -> None:
    """And not the fields that such parts and turns have beside."""
    error = error_of(server.chat(messages=[{"role": "user", "content": "x"}, turn]), 400)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    assert error["message"].startswith(f"{param}: {said}")


def test_fields_that_agree() -> None:
    def chat(**fields: Any) -> ChatRequest:
        return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | fields)

    task = "a" * 64
    assert chat(metadata={"task": task}, emoe={"task": task}).task == task
    assert chat(metadata={"task": "a"}, emoe={}).task == chat(emoe={"task": "a"}).task == "a"
    assert chat(metadata={"other": " "}).task is None
    assert (chat().tops, chat(logprobs=True).tops, chat(logprobs=True, top_logprobs=3).tops) == (None, 0, 3)
    assert TokenizeRequest(prompt="x", add_special_tokens=False).add_special_tokens is False
    both: dict[str, Any] = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    for wrong in ({}, both, {"messages": both["messages"], "add_special_tokens": True}):
        with pytest.raises(ValidationError, match=r"give either|is for prompts"):
            TokenizeRequest.model_validate(wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"best_of": 3},
        {"best_of": 1, "n": 2},
        {"suffix": "x"},
        {"logprobs": 6},
        {"n": 65, "prompt": ["a", "b"]},
    ],
)
def test_completions_refuse_by_name_too(server: Running, fields: dict[str, Any]) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "a", **fields}), 400)
    assert next(iter(fields)) in error["message"]
    assert error["param"] == next(iter(fields))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"\xff\xfe{}",
        b'{"messages": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"seed": ' + b"9" * 6000 + b', "messages": []}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "stop": "\\udfff"}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": "\\udfff"}',
        b'{"messages": [{"role": "user", "content": "x"}], "emoe": {"task": "\\udfff"}}',
        b'{"messages": [{"role": "user", "content": "x"}], "\\udfff": 1}',
    ],
)
def test_bodies_that_are_no_request(server: Running, content: bytes) -> None:
    reply = server.client.post("/v1/chat/completions", content=content, headers=JSON)
    assert error_of(reply, 400)["type"] == "invalid_request_error"


def test_a_body_that_is_not_said_to_be_json(server: Running) -> None:
    reply = server.client.post("/v1/completions", content=b'{"prompt": "a"}')
    assert "Content-Type: application/json" in error_of(reply, 400)["message"]


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["", "soon", "-1", "0", "nan", "inf", "1e12"])
def test_headers_that_are_no_targets(server: Running, name: str, value: str) -> None:
    reply = server.client.post("/v1/chat/completions", json={"messages": TURN}, headers={name: value})
    error = error_of(reply, 400)
    assert (error["param"], error["code"]) == (name, "invalid_header")


def test_paths_methods_and_models_that_do_not_exist(server: Running) -> None:
    assert "GET /v2/nothing" in error_of(server.client.get("/v2/nothing"), 404)["message"]
    wrong = server.client.get("/v1/completions")
    assert "use POST" in error_of(wrong, 405)["message"] and wrong.headers["allow"] == "POST"
    for path, body in (
        ("/v1/chat/completions", {"messages": TURN}),
        ("/v1/completions", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        error = error_of(server.post(path, {"model": "gpt-4", **body}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
