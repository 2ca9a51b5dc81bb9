"""What the server answers when the engine refuses, stalls, fails or dies: a named error, never silence."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from emoe.engine.interface import Submission, TokenEvent
from emoe.errors import EmoeError, ReadError, UsageError
from emoe.server.app import create_app
from emoe.server.settings import ServerSettings
from tests.server.conftest import Running, Serve, raw_post, until
from tests.server.stand_ins import Script, ScriptedEngine, finished, tokens
from tests.server.test_chat import events

WORLD = 1183
BAD_READ = ReadError("experts.safetensors: reading 4096 bytes at 0 failed: input/output error; check the disk")


def endless(_: Submission) -> Iterator[Any]:
    while True:
        yield from tokens(WORLD)
        yield 0.002


@pytest.mark.parametrize(
    ("script", "status", "code", "kind"),
    [
        ([*tokens(WORLD), finished("error", BAD_READ)], 500, "read_error", "server_error"),
        ([finished("error", EmoeError("a defect"))], 500, "engine_error", "server_error"),
        ([*tokens(WORLD), finished("timeout")], 504, "request_timeout", "timeout_error"),
        ([finished("cancelled")], 503, "shutting_down", "service_unavailable_error"),
    ],
)
def test_an_answer_that_does_not_finish(serve: Serve, script: list[Any], status: int, code: str, kind: str) -> None:
    server = serve(ScriptedEngine(script))
    whole = server.chat()
    assert whole.status_code == status
    assert (whole.json()["error"]["code"], whole.json()["error"]["type"]) == (code, kind)
    *before, last = events(server.chat(stream=True).text)
    assert last == whole.json()
    assert len(before) == (2 if len(script) > 1 else 0)


def test_the_client_sees_an_error_in_the_middle_of_a_stream(serve: Serve) -> None:
    server = serve(ScriptedEngine([*tokens(WORLD, WORLD), finished("error", BAD_READ)]))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    text = ""
    with pytest.raises(openai.APIError, match="check the disk"):
        for chunk in client.chat.completions.create(
            model="emoe-nano", messages=[{"role": "user", "content": "x"}], stream=True
        ):
            text += chunk.choices[0].delta.content or ""
    assert text == " world world"
    client.close()


def test_who_takes_too_long_is_not_asked_to_try_again(serve: Serve) -> None:
    reply = serve(ScriptedEngine([finished("timeout")]), request_timeout_s=7.0).chat()
    assert reply.headers["x-should-retry"] == "false"
    assert "7 s" in reply.json()["error"]["message"]


def test_one_failing_choice_ends_the_others(serve: Serve) -> None:
    scripts: Iterator[Script] = iter([[*tokens(WORLD), 30.0], [0.05, finished("error", BAD_READ)]])
    engine = ScriptedEngine(lambda _: next(scripts))
    assert serve(engine).chat(n=2).json()["error"]["code"] == "read_error"
    assert "request-1" in engine.cancelled
    assert until(lambda: engine.stats().running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(serve: Serve, stream: bool) -> None:
    engine = ScriptedEngine([*tokens(WORLD), finished()])
    engine.room = 1
    server = serve(engine)
    assert server.chat().status_code == 200
    reply = server.chat(stream=stream)
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "3"
    assert reply.json()["error"]["code"] == "queue_full"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="emoe-nano", prompt="x")
    client.close()
    assert 'emoe:requests_refused_total{code="queue_full",model_name="emoe-nano"} 2.0' in metrics(server)


def metrics(server: Running) -> str:
    return str(server.client.get("/metrics").text)


@pytest.mark.parametrize("stream", [False, True])
def test_if_one_choice_is_refused_none_runs(serve: Serve, stream: bool) -> None:
    engine = ScriptedEngine(endless)
    engine.room = 2
    assert serve(engine).chat(n=3, stream=stream).status_code == 429
    assert set(engine.cancelled) == {"request-1", "request-2"}


def test_more_answers_than_may_ever_wait_are_not_asked_for_again(serve: Serve) -> None:
    engine = ScriptedEngine([*tokens(WORLD), finished()])
    engine.settings = replace(engine.settings, max_waiting=3)
    server = serve(engine)
    assert server.chat(n=3).status_code == 200
    for reply in (server.chat(n=4), server.post("/v1/completions", {"prompt": ["a", "b"], "n": 2})):
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")
        assert "no more than 3 may wait" in reply.json()["error"]["message"]


def test_probes_may_ask_for_the_head(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    assert (server.client.head("/health").status_code, server.client.head("/health").text) == (200, "")
    server.service.draining = True
    assert server.client.head("/health").status_code == 503


def test_a_dead_engine(serve: Serve) -> None:
    engine = ScriptedEngine()
    server = serve(engine)
    assert server.client.get("/health").json() == {"status": "ok"}
    engine.alive, engine.failure = False, EmoeError("out of memory")
    for reply in (server.client.get("/health"), server.chat(), server.chat(stream=True)):
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "engine_dead"
        assert "out of memory" in reply.json()["error"]["message"]
    assert server.client.get("/v1/models").status_code == 200
    assert "emoe:info" in metrics(server)


def test_an_engine_that_stops_between_the_check_and_the_request(serve: Serve) -> None:
    class Stopping(ScriptedEngine):
        def submit(self, submission: Submission, on_event: Any) -> str:
            self.alive = False
            return super().submit(submission, on_event)

    reply = serve(Stopping()).chat()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_stopped")


def test_silence_is_filled_with_comments(serve: Serve) -> None:
    server = serve(ScriptedEngine([0.3, *tokens(WORLD), finished()]), keep_alive_s=0.05)
    text = server.chat(stream=True).text
    before, _, after = text.partition("data: ")
    assert before.count(": keep-alive\n\n") >= 2
    assert "keep-alive" not in after
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.completions.create(model="emoe-nano", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == " world"
    client.close()


def test_a_stop_string_cancels_the_request(serve: Serve) -> None:
    engine = ScriptedEngine(endless)
    server = serve(engine)
    reply = server.chat(stop="d w").json()
    assert reply["choices"][0]["message"]["content"] == " worl"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert engine.cancelled == ["request-1"]
    assert 'emoe:request_success_total{finished_reason="stop",model_name="emoe-nano"} 1.0' in metrics(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_nothing_comes(serve: Serve, stream: bool) -> None:
    engine = ScriptedEngine([60.0])
    server = serve(engine)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
        connection.sendall(raw_post("/v1/chat/completions", body))
        assert until(lambda: engine.stats().running == 1)
    assert until(lambda: engine.stats().running == 0)
    assert engine.cancelled == ["request-1"]


def test_a_client_that_does_not_read(serve: Serve) -> None:
    engine = ScriptedEngine(lambda _: [*tokens(*[WORLD] * 60_000), 60.0])
    server = serve(engine, write_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(raw_post("/v1/completions", {"prompt": "x", "stream": True}))
        assert until(lambda: engine.cancelled == ["request-1"])
        assert until(lambda: engine.stats().running == 0)


def test_stopping_finishes_what_runs_and_refuses_what_comes(serve: Serve) -> None:
    engine = ScriptedEngine([*tokens(WORLD), 0.5, *tokens(WORLD), finished()])
    server = serve(engine)
    with server.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as reply:
        lines = reply.iter_lines()
        assert "world" in next(lines)
        server.service.draining = True
        for other in (server.client.get("/health"), server.chat()):
            assert (other.status_code, other.json()["error"]["code"]) == (503, "shutting_down")
        rest = "\n".join(lines)
    assert '"finish_reason":"stop"' in rest and "[DONE]" in rest


def test_no_tokenizer_no_server() -> None:
    with pytest.raises(UsageError, match="has no tokenizer"):
        create_app(ScriptedEngine(), ServerSettings(), None, "bare")


def test_no_chat_template(tokenizer: Any) -> None:
    import copy

    from tests.server.conftest import running

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with running(ScriptedEngine([*tokens(WORLD), finished()]), ServerSettings(), bare) as server:
        reply = server.chat()
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "chat_template_missing")
        assert "/v1/completions" in reply.json()["error"]["message"]
        assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200
        for template, said in (
            ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
            ("{{ none|length }}", "TypeError: "),
        ):
            bare.chat_template = template
            error = server.chat().json()["error"]
            assert (error["code"], error["param"]) == ("chat_template_refused", "messages")
            assert said in error["message"]
        bare.chat_template = "{{ raise_exception('roles must alternate') }}"
        assert "roles must alternate" in server.chat().json()["error"]["message"]


def test_priority_and_sampling_reach_the_engine(serve: Serve) -> None:
    engine = ScriptedEngine([*tokens(WORLD), finished()])
    server = serve(engine, request_timeout_s=5.0, default_task="qa", temperature=0.7, top_k=40)
    server.chat(priority=-3, top_p=0.5, top_k=-1, ignore_eos=True, seed=-1, n=2)
    server.post("/v1/completions", {"prompt": "x", "logprobs": 0, "temperature": 0})
    first, second, third = engine.submitted
    assert (first.priority, first.task, first.deadline_s, first.max_tokens) == (-3, "qa", 5.0, 1024 - 4)
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (0.7, 0.5, None)
    assert first.sampling.ignore_end and first.sampling.logprobs is None
    assert (first.sampling.seed, second.sampling.seed) == ((1 << 63) - 1, 0)
    assert (third.sampling.temperature, third.sampling.top_k, third.sampling.logprobs) == (0.0, 40, 0)
    assert third.max_tokens == 16 and third.sampling.seed is None


def test_impossible_tokens_have_a_number_too(serve: Serve) -> None:
    event = TokenEvent(WORLD, 0.0, -math.inf, ((WORLD, -math.inf),))
    server = serve(ScriptedEngine([event, finished()]))
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0
    text = server.post("/v1/completions", {"prompt": "x", "logprobs": 1}).json()["choices"][0]["logprobs"]
    assert (text["token_logprobs"], text["top_logprobs"]) == ([-9999.0], [{" world": -9999.0}])


def test_an_answer_is_as_long_as_the_model_says_unless_the_request_does(serve: Serve) -> None:
    engine = ScriptedEngine([*tokens(WORLD), finished()])
    server = serve(engine, max_tokens=200)
    server.chat()
    server.chat(max_tokens=300)
    server.chat(" world" * 900)
    assert [submission.max_tokens for submission in engine.submitted[:2]] == [200, 300]
    last = engine.submitted[2]
    assert last.max_tokens == 1024 - len(last.prompt_ids) < 200


def test_a_defect_is_an_error_in_openais_shape(serve: Serve) -> None:
    class Broken(ScriptedEngine):
        def submit(self, submission: Submission, on_event: Any) -> str:
            raise KeyError("x")

    reply = serve(Broken()).chat()
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert "KeyError" in reply.json()["error"]["message"]


def test_many_streams_leave_nothing_behind(serve: Serve) -> None:
    engine = ScriptedEngine(endless)
    server = serve(engine)
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for connection in connections:
        connection.sendall(raw_post("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 1000}))
    assert until(lambda: engine.stats().running == 20)
    for connection in connections:
        connection.close()
    assert until(lambda: engine.stats().running == 0)
    assert until(lambda: not server.server.server_state.tasks)
