"""Keys, origins, and bodies that are too large or too slow."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import openai
import pytest

from emoe.errors import UsageError
from emoe.server import limits
from emoe.server.settings import ServerSettings
from tests.server.conftest import Serve
from tests.server.stand_ins import ScriptedEngine, finished, tokens


def engine() -> ScriptedEngine:
    return ScriptedEngine([*tokens(1183), finished()])


def test_a_key(serve: Serve) -> None:
    server = serve(engine(), api_key="sécret-1")
    for headers in (
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer secret-1"},
        {"authorization": "Bearer sécret-"},
        {"authorization": "Basic sécret-1"},
        {"authorization": "sécret-1"},
    ):
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            reply = server.client.get(path, headers=encoded)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
    assert server.client.get("/health").status_code == 200
    right = [(b"authorization", "bearer sécret-1".encode("latin-1"))]
    assert server.client.get("/v1/models", headers=right).status_code == 200
    assert not server.service.engine.submitted  # type: ignore[attr-defined]


def test_the_clients_exception_for_a_wrong_key(serve: Serve) -> None:
    server = serve(engine(), api_key="right")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="API key is wrong"):
            client.models.list()
        assert client.with_options(api_key="right").models.list().data[0].id == "emoe-nano"


def test_origins(serve: Serve) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = serve(engine())
    assert "access-control-allow-origin" not in closed.client.get("/health", headers=asked).headers
    assert closed.client.options("/v1/completions", headers=asked).status_code == 405
    opened = serve(engine(), cors_origins=("https://a.example",), api_key="k")
    reply = opened.client.options("/v1/completions", headers=asked)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")
    other = opened.client.get("/health", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    refused = opened.client.get("/v1/models", headers={"origin": "https://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
    assert refused.headers["access-control-expose-headers"] == "*"  # else no page sees Retry-After


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("size", "status"), [(900, 200), (1100, 413), (7000, 413), (100_000, 413)])
def test_the_size_of_a_body(serve: Serve, size: int, status: int, declared: bool) -> None:
    server = serve(engine(), max_body_bytes=1000)
    content = b'{"prompt": "x"' + b" " * (size - 15) + b"}"

    def chunks() -> Iterator[bytes]:
        for at in range(0, size, 500):
            yield content[at : at + 500]

    headers = {"content-type": "application/json"}
    reply = server.client.post("/v1/completions", content=content if declared else chunks(), headers=headers)
    assert reply.status_code == status
    if status == 413:
        assert reply.json()["error"]["code"] == "body_too_large" and "--max-body-size" in reply.text
    assert server.chat().status_code == 200


def test_a_body_that_does_not_come(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.BodyLimit.__init__, "__defaults__", (0.1,))
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        connection.settimeout(10)
        reply = b""
        while part := connection.recv(4096):
            reply += part
    assert reply.startswith(b"HTTP/1.1 408") and b"body_timeout" in reply


def test_a_body_whose_client_goes(serve: Serve) -> None:
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    time.sleep(0.05)
    assert server.chat().status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_alive_s": 0.0},
        {"write_timeout_s": -1.0},
        {"max_body_bytes": 0},
        {"request_timeout_s": 0.0},
        {"shutdown_timeout_s": -1.0},
        {"status_interval_s": float("nan")},
        {"api_key": ""},
    ],
)
def test_settings_that_cannot_be_meant(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).split("_")[0].replace("api", "API")):
        ServerSettings(**wrong)  # type: ignore[arg-type]
