"""A server on a real socket that says what a test told it to, when it told it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one request gets: `first_s` until the first piece, `gap_s` between pieces, then the end."""

    pieces: tuple[str, ...] = ("a", "b", "c")
    first_s: float = 0.0
    gap_s: float = 0.0
    status: int = 200
    body: bytes = b""  # of another status
    usage: tuple[int, int] | None = (7, 3)
    end: str = "done"  # done | cut | error | nonsense
    comment: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


Script = Callable[[dict[str, Any], dict[str, str]], Answer]
"""(body, headers) -> the answer."""


class ScriptedServer:
    """`card`: of the model; empty: the list of models fails.

    `with ScriptedServer(script) as server: server.url`; `server.seen` holds (body, headers) of every request."""

    def __init__(self, script: Script, card: dict[str, Any] | None = None) -> None:
        self._script = script
        self._card = card if card is not None else {"id": "scripted", "object": "model", "owned_by": "a test"}
        self.seen: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.most_at_once = 0
        self._now = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = starting.result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (line := await reader.readline()).strip():
                headers = {}
                while row := (await reader.readline()).decode().strip():
                    name, _, value = row.partition(":")
                    headers[name.lower()] = value.strip()
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                self._now += 1
                self.most_at_once = max(self.most_at_once, self._now)
                try:
                    whole = await self._reply(line.decode().split()[1], content, headers, writer)
                finally:
                    self._now -= 1
                if not whole:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(self, path: str, content: bytes, headers: dict[str, str], writer: asyncio.StreamWriter) -> bool:
        if path == "/v1/models" and not self._card:
            return await _plain(writer, 500, b"Internal Server Error")
        if path == "/v1/models":
            return await _plain(writer, 200, json.dumps({"object": "list", "data": [self._card]}).encode())
        body = json.loads(content)
        self.seen.append((body, headers))
        answer = self._script(body, headers)
        if answer.status != 200:
            await asyncio.sleep(answer.first_s)
            return await _plain(writer, answer.status, answer.body)
        chat = path.startswith("/v1/chat")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if chat:
            await _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for number, piece in enumerate(answer.pieces):
            await asyncio.sleep(answer.gap_s if number else answer.first_s)
            if answer.comment:
                await _chunk(writer, b": keep-alive\r\n\r\n")
            said = {"delta": {"content": piece}} if chat else {"text": piece}
            await _event(writer, {"choices": [{"index": 0, **said}]})
        if not answer.pieces:
            await asyncio.sleep(answer.first_s)
        if answer.end == "cut":
            return False
        if answer.end == "error":
            await _event(
                writer, {"error": {"message": "the store broke", "type": "server_error", "code": "read_error"}}
            )
        elif answer.end == "nonsense":
            await _chunk(writer, b"data: {nonsense\n\n")
        else:
            last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            await _event(writer, {"choices": [{"index": 0, **last, "finish_reason": "stop"}], **answer.extra})
            if answer.usage is not None and (body.get("stream_options") or {}).get("include_usage"):
                counted = dict(zip(("prompt_tokens", "completion_tokens"), answer.usage, strict=True))
                await _event(writer, {"choices": [], "usage": counted})
            await _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def _plain(writer: asyncio.StreamWriter, status: int, body: bytes) -> bool:
    writer.write(b"HTTP/1.1 %d Said\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
    await writer.drain()
    return True


async def _event(writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
    await _chunk(writer, f"data: {json.dumps(value)}\n\n".encode())


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
    await writer.drain()
