"""/v1/chat/completions"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from emoe.engine.interface import TokenEvent
from emoe.server.answering import Answering, Piece, answer_stream, answer_whole
from emoe.server.replies import ChatLogprobs, ChosenToken, TopToken, Usage
from emoe.server.schemas import ChatRequest
from emoe.server.service import Service, Targets
from emoe.server.tokens import Tokens


async def chat(service: Service, body: ChatRequest, request: Request, targets: Targets) -> Response:
    """Answer a conversation.

    Raises:
        ApiError: it was refused, or an answer could not be finished.
    """
    service.check_model(body.model)
    ids = await service.tokens.chat(body.messages)
    shape = ChatShape(service.tokens, service.model_name, body.tops)
    submissions = service.submissions(body, [ids], body.tokens_at_most, body.tops, targets, shape.param)
    answering = Answering(service, shape, submissions, body.stops)
    if not body.stream:
        return await answer_whole(answering, shape, request, 1)
    answering.submit()
    headers = service.headers(submissions[0])
    return answer_stream(answering, shape, 1, body.include_usage, headers, service.settings.write_timeout_s)


class ChatShape:
    """OpenAI's shape of chat answers."""

    param = "messages"

    def __init__(self, tokens: Tokens, model: str, tops: int | None) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._tokens = tokens
        self._tops = tops
        self._base = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": "emoe"}

    def opening(self, index: int) -> dict[str, Any]:
        """Says whose turn it is."""
        return self._stream([self._choice(index, {"role": "assistant", "content": ""}, None, None)])

    def chunk(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A piece of the answer, or its end."""
        delta = {"content": piece.text} if reason is None else {}
        return self._stream([self._choice(index, delta, self._logprobs(piece) if piece.tokens else None, reason)])

    def closing(self, used: Usage) -> dict[str, Any]:
        """The number of tokens."""
        return self._stream([]) | {"usage": used}

    def whole(self, answers: Sequence[tuple[Piece, str]], used: Usage) -> dict[str, Any]:
        """All answers."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": reason,
            }
            for index, (piece, reason) in enumerate(answers)
        ]
        return self._base | {"object": "chat.completion", "choices": choices, "usage": used}

    def _stream(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._base | {"object": "chat.completion.chunk", "choices": choices}

    @staticmethod
    def _choice(index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self._tops is None:
            return None
        return {"content": [self._chosen(event) for event in piece.tokens], "refusal": None}

    def _chosen(self, event: TokenEvent) -> ChosenToken:
        tops = [self._top(token, logprob) for token, logprob in event.top[: self._tops]]
        return {**self._top(event.token, event.logprob), "top_logprobs": tops}

    def _top(self, token: int, logprob: float | None) -> TopToken:
        text, raw = self._tokens.one(token)
        return {"token": text, "logprob": self._tokens.logprob(logprob), "bytes": raw}
