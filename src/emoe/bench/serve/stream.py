"""Server-sent events, and what those of an OpenAI stream mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

DONE = "[DONE]"
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


class EventParser:
    """Cuts bytes as they come into the data of whole events; comments and other fields are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of the events that `piece` completes."""
        found = []
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if not line:
                if self._data:
                    found.append("\n".join(self._data))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """What one event says. `usage`: (prompt, completion) tokens; `error`: its name and text; `told`: emoe's own."""

    text: str = ""
    finish: str | None = None
    usage: tuple[int, int] | None = None
    error: tuple[str, str] | None = None
    told: dict[str, Any] | None = None


def read_part(data: str) -> Part:
    """The meaning of an event of /v1/chat/completions or /v1/completions; text of all choices joined.

    Raises:
        ValueError: no JSON object.
    """
    value: Any = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"no JSON object: {data[:80]!r}")
    if value.get("error") is not None:
        return Part(error=error_of(value, "stream"))
    texts: list[str] = []
    finish: str | None = None
    for choice in value.get("choices") or ():
        delta = choice.get("delta")
        if isinstance(delta, dict):
            texts += [delta[name] for name in _TEXTS if isinstance(delta.get(name), str)]
        elif isinstance(choice.get("text"), str):
            texts.append(choice["text"])
        finish = choice.get("finish_reason") or finish
    told = value.get("emoe")
    return Part("".join(texts), finish, _usage(value.get("usage")), told=told if isinstance(told, dict) else None)


def _usage(value: Any) -> tuple[int, int] | None:
    if not isinstance(value, dict):
        return None
    counted = value.get("prompt_tokens"), value.get("completion_tokens")
    return counted if all(isinstance(tokens, int) for tokens in counted) else None  # type: ignore[return-value]


def error_of(value: Any, otherwise: str) -> tuple[str, str]:
    """(name, text) of an error in OpenAI's shape or another: its code or type, and its message."""
    found = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(found, dict):
        name = found.get("code") or found.get("type") or otherwise
        return str(name), str(found.get("message") or found.get("detail") or found)
    return otherwise, str(found)
