"""A server on a real socket, with the real engine or a scripted one."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from emoe import nano
from emoe.server.app import create_app
from emoe.server.bridge import EngineLike
from emoe.server.running import GracefulServer, address_of, config_of, listen
from emoe.server.service import Service
from emoe.server.settings import ServerSettings

Serve = Callable[..., "Running"]


class Running:
    """A server in a thread: where it is, and what is behind it."""

    def __init__(self, url: str, service: Service, server: GracefulServer, bound: socket.socket) -> None:
        self.url = url
        self.service = service
        self.server = server
        self.port: int = bound.getsockname()[1]
        self.client = httpx.Client(base_url=url, timeout=60)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return self.client.post(path, json=body, **kwargs)

    def chat(self, text: str = "Hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})


@contextmanager
def running(engine: EngineLike, settings: ServerSettings, tokenizer: Any, name: str = "emoe-nano") -> Iterator[Running]:
    app = create_app(engine, settings, tokenizer, name)
    bound = listen("127.0.0.1", 0)
    server = GracefulServer(config_of(app, flush_s=2), app.state.service)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
        time.sleep(0.005)
    made = Running(address_of(bound), app.state.service, server, bound)
    try:
        yield made
    finally:
        made.client.close()
        server.should_exit = True
        thread.join(30)
        bound.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(nano.path())


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Serve]:
    """`serve(engine, **settings)`: a server for the length of the test."""
    with ExitStack() as stack:

        def start(engine: EngineLike, **settings: Any) -> Running:
            return stack.enter_context(running(engine, ServerSettings(**settings), tokenizer))

        yield start


@pytest.fixture(scope="session")
def nano_engine() -> Iterator[Any]:
    """The embedded model with 40 % of its experts, behind the real engine."""
    import emoe
    from emoe.engine.engine import Engine
    from emoe.engine.interface import EngineSettings, TaskTargets

    model, tokenizer = emoe.load(expert_memory="40%", profile=nano.profile_path())
    targets: dict[str | None, TaskTargets] = {"code": TaskTargets(ttft_slo_s=100.0, tpot_slo_s=100.0)}
    engine = Engine(model, tokenizer, EngineSettings(kv_tokens=4096, targets=targets))
    engine.start()
    yield engine
    engine.stop()
    emoe.close(model)


@pytest.fixture(scope="session")
def server(nano_engine: Any, tokenizer: Any) -> Iterator[Running]:
    """A server for the real engine, greedy unless a request says otherwise."""
    settings = ServerSettings(temperature=0.0, status_interval_s=0.1, max_body_bytes=1 << 20)
    with running(nano_engine, settings, tokenizer) as made:
        yield made


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[Any]:
    """The official client."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for something that happens soon; whether it did."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def raw_post(path: str, body: Any, **headers: str) -> bytes:
    """A request as it goes over the socket."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content
