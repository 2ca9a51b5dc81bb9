"""Clients of every kind on plain sockets: patient, impatient, slow, confused and hostile ones."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

from emoe.bench.serve.stream import DONE, EventParser, read_part

PATH = "/v1/chat/completions"
PATIENCE_S = 90.0


@dataclass
class Told:
    """What a client saw. `gone`: it hung up itself; `whole`: the answer came to its end."""

    status: int | None = None
    text: str = ""
    error: str | None = None
    message: str = ""
    whole: bool = False
    gone: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        """An answer, or an error with a name: not silence."""
        return self.whole or self.error is not None


def chat(prompt: str, **fields: Any) -> bytes:
    """The body of a greedy conversation."""
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "stream": True}
    return json.dumps(body | fields).encode()


def request(body: bytes, key: str | None = None, length: int | None = None) -> bytes:
    """Head and body of a POST; the server closes afterwards. `length`: another one than the body's."""
    lines = [f"POST {PATH} HTTP/1.1", "Host: here", "Content-Type: application/json", "Connection: close"]
    lines += [f"Content-Length: {len(body) if length is None else length}"]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def talk(
    port: int, sent: bytes, *, hang_up_s: float | None = None, events: int | None = None, pause_s: float = 0.0
) -> Told:
    """Send `sent` and read what comes.

    hang_up_s: hang up so long after sending; events: hang up after so many; pause_s: rest before each read.
    """
    told = Told()
    try:
        async with asyncio.timeout(PATIENCE_S if hang_up_s is None else hang_up_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12 if pause_s else 1 << 16)
            try:
                writer.write(sent)
                await writer.drain()
                await _read(reader, told, events, pause_s)
            finally:
                writer.close()
    except TimeoutError:
        told.gone = True
        assert hang_up_s is not None, "a client waited for nothing"
    except ConnectionError as error:
        told.error, told.message = "connection", f"{type(error).__name__}: {error}"
    return told


async def _read(reader: asyncio.StreamReader, told: Told, events: int | None, pause_s: float) -> None:
    line = await reader.readline()
    if not line:
        raise ConnectionResetError("closed without an answer")
    told.status = int(line.split()[1])
    while row := (await reader.readline()).strip():
        name, _, value = row.decode().partition(":")
        told.headers[name.lower()] = value.strip()
    parser, plain = EventParser(), b""
    streamed = told.headers.get("content-type", "").startswith("text/event-stream")
    while piece := await _piece(reader, told):
        if pause_s:
            await asyncio.sleep(pause_s)
        if not streamed:
            plain += piece
            continue
        for data in parser.feed(piece):
            _note(told, data)
            events = events - 1 if events is not None else None
        if events is not None and events <= 0:
            told.gone = True
            return
    if not streamed:
        _whole(told, plain)


async def _piece(reader: asyncio.StreamReader, told: Told) -> bytes:
    if told.headers.get("transfer-encoding") != "chunked":
        return await reader.read(1 << 12)
    size = int((await reader.readline()).strip() or b"0", 16)
    piece = await reader.readexactly(size) if size else b""
    await reader.readline()
    return piece


def _note(told: Told, data: str) -> None:
    if data == DONE:
        told.whole = told.error is None
        return
    part = read_part(data)
    told.text += part.text
    if part.error is not None:
        told.error, told.message = part.error


def _whole(told: Told, plain: bytes) -> None:
    value = json.loads(plain)
    if told.status == 200:
        told.text, told.whole = value["choices"][0]["message"]["content"], True
        return
    # Exactly OpenAI's shape.
    assert set(value) == {"error"}, value
    assert set(value["error"]) == {"message", "type", "param", "code"}, value
    assert value["error"]["message"] and value["error"]["type"]
    told.error, told.message = value["error"]["code"] or value["error"]["type"], value["error"]["message"]


BROKEN: tuple[tuple[str, bytes, str], ...] = (
    ("no JSON", b"{" * 50, "invalid_json"),
    ("no object", b"[1, 2]", "invalid_json"),
    ("nothing", b"", "invalid_json"),
    ("no UTF-8", b'{"messages": [{"role": "user", "content": "\xff\xfe\xc3"}]}', "invalid_json"),
    ("half a surrogate", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
    ("deep", b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", ""),
    ("no messages", b"{}", "missing_required_parameter"),
    ("a misspelt field", b'{"messages": [{"role": "user", "content": "x"}], "temprature": 1}', "unknown_parameter"),
    ("a number too large", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e999}', ""),
)
"""(what it is, the body, the error's code or "" for any)."""


def shuffled(seed: int, clients: list[Any]) -> list[Any]:
    """In an order that the seed makes."""
    random.Random(seed).shuffle(clients)
    return clients
