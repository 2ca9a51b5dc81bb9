"""/v1/completions"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from emoe.server.answering import Answering, Piece, answer_stream, answer_whole
from emoe.server.errors import ApiError
from emoe.server.replies import TextLogprobs, Usage
from emoe.server.schemas import CompletionRequest
from emoe.server.service import Service, Targets
from emoe.server.tokens import Tokens


async def complete(service: Service, body: CompletionRequest, request: Request, targets: Targets) -> Response:
    """Go on from one or several prompts; choices are in the prompts' order, those of one prompt together.

    Raises:
        ApiError: one was refused, or an answer could not be finished.
    """
    service.check_model(body.model)
    prompts = [await _encode(service.tokens, prompt) for prompt in body.prompts]
    shape = TextShape(service.tokens, service.model_name, body.logprobs)
    submissions = service.submissions(body, prompts, body.tokens_at_most, body.logprobs, targets, shape.param)
    answering = Answering(service, shape, submissions, body.stops)
    if not body.stream:
        return await answer_whole(answering, shape, request, len(prompts))
    answering.submit()
    headers, write_s = service.headers(submissions[0]), service.settings.write_timeout_s
    return answer_stream(answering, shape, len(prompts), body.include_usage, headers, write_s)


async def _encode(tokens: Tokens, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        ids = await tokens.text(prompt)
    else:
        tokens.check(prompt, "prompt")
        ids = prompt
    if not ids:
        raise ApiError(400, "prompt: it is empty", param="prompt", code="invalid_value")
    return ids


class TextShape:
    """OpenAI's shape of completions."""

    param = "prompt"

    def __init__(self, tokens: Tokens, model: str, tops: int | None) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._tokens = tokens
        self._tops = tops
        self._base = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": "emoe",
        }

    def opening(self, index: int) -> None:
        """Completions have none."""
        return

    def chunk(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A piece of the answer, or its end."""
        logprobs = self._logprobs(piece) if piece.tokens else None
        return self._base | {"choices": [self._choice(index, piece.text, logprobs, reason)]}

    def closing(self, used: Usage) -> dict[str, Any]:
        """The number of tokens."""
        return self._base | {"choices": [], "usage": used}

    def whole(self, answers: Sequence[tuple[Piece, str]], used: Usage) -> dict[str, Any]:
        """All answers."""
        choices = [
            self._choice(index, piece.text, self._logprobs(piece), reason)
            for index, (piece, reason) in enumerate(answers)
        ]
        return self._base | {"choices": choices, "usage": used}

    @staticmethod
    def _choice(index: int, text: str, logprobs: TextLogprobs | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> TextLogprobs | None:
        if self._tops is None:
            return None
        return {
            "tokens": [self._tokens.one(event.token)[0] for event in piece.tokens],
            "token_logprobs": [self._tokens.logprob(event.logprob) for event in piece.tokens],
            "top_logprobs": [
                {
                    self._tokens.one(token)[0]: self._tokens.logprob(logprob)
                    for token, logprob in event.top[: self._tops]
                }
                for event in piece.tokens
            ],
            "text_offset": list(piece.begins),
        }
