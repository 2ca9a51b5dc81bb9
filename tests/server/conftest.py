"""A server on a real socket, with the real engine or a scripted one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from emoe import nano
from emoe.server.app import create_app
from emoe.server.bridge import EngineLike
from emoe.server.running import GracefulServer, address_of, listen
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
    config = uvicorn.Config(app, http="h11", loop="asyncio", ws="none", log_config=None, timeout_graceful_shutdown=2)
    server = GracefulServer(config, app.state.service)
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
