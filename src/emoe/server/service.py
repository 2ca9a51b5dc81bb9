"""What every endpoint works with: the engine, the tokenizer, the settings, and how a request becomes submissions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from emoe.engine.interface import Sampling, Submission
from emoe.server.bridge import EngineLike
from emoe.server.errors import ApiError
from emoe.server.metrics import Metrics
from emoe.server.replies import plain
from emoe.server.schemas import ChatRequest, CompletionRequest, Extras
from emoe.server.settings import ServerSettings
from emoe.server.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets from headers, milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(slots=True)
class Service:
    """Made once by `create_app`. `draining`: the server finishes what runs and takes nothing new."""

    engine: EngineLike
    settings: ServerSettings
    tokens: Tokens
    model_name: str
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    def unhealthy(self) -> ApiError | None:
        """Why no request can be taken, if so."""
        failure = self.engine.failure
        if failure is not None:
            reason, code = f"the engine has died: {failure}; restart the server", "engine_dead"
        elif self.draining:
            reason, code = "the server is shutting down", "shutting_down"
        elif not self.engine.alive:
            reason, code = "the engine is not running", "engine_dead"
        else:
            return None
        return ApiError(503, reason, kind="service_unavailable_error", code=code)

    def check_model(self, name: str | None) -> None:
        """Refuse models that are not served here."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist here; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def submissions(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        tops: int | None,
        targets: Targets,
        param: str,
    ) -> list[Submission]:
        """n for each prompt. A header's target goes before the body's, the engine's default for the task after both.

        Raises:
            ApiError: the server takes no requests, or the context has no room for a prompt.
        """
        if (problem := self.unhealthy()) is not None:
            raise problem
        extras = body.emoe or Extras()
        ttft_ms = extras.slo_ttft_ms if targets.ttft_ms is None else targets.ttft_ms
        tpot_ms = extras.slo_tpot_ms if targets.tpot_ms is None else targets.tpot_ms
        task = self.settings.default_task if body.task is None else body.task
        answers, room = len(prompts) * (body.n or 1), self.engine.settings.max_waiting
        if answers > max(1, room):
            raise ApiError(
                400,
                f"the request asks for {answers} answers at once, and no more than {room} may wait; ask for fewer, or "
                "raise --max-queue",
                param="n" if (body.n or 1) > 1 else param,
                code="invalid_value",
            )
        made: list[Submission] = []
        for ids in prompts:
            most = max_tokens if max_tokens is not None else self._room(ids, param)
            for _ in range(body.n or 1):
                made.append(
                    Submission(
                        prompt_ids=ids,
                        max_tokens=most,
                        sampling=self._sampling(body, tops, len(made)),
                        task=task,
                        priority=body.priority,
                        ttft_slo_s=None if ttft_ms is None else ttft_ms / 1e3,
                        tpot_slo_s=None if tpot_ms is None else tpot_ms / 1e3,
                        deadline_s=self.settings.request_timeout_s,
                    )
                )
        return made

    def engine_holds(self) -> int:
        """The longest prompt and answer together: the context, unless KV memory is less."""
        return min(self.engine.max_context, self.engine.kv_tokens)

    def _room(self, ids: list[int], param: str) -> int:
        """The longest answer of a request that does not say: what the context leaves, or the model's own default."""
        most = self.engine_holds()
        room = most - len(ids)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, and there is room for {most} with the answer; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return room if self.settings.max_tokens is None else min(room, self.settings.max_tokens)

    def _sampling(self, body: ChatRequest | CompletionRequest, tops: int | None, index: int) -> Sampling:
        settings = self.settings
        top_k = settings.top_k if body.top_k is None else body.top_k
        return Sampling(
            temperature=settings.temperature if body.temperature is None else body.temperature,
            top_p=settings.top_p if body.top_p is None else body.top_p,
            top_k=top_k if top_k is not None and top_k > 0 else None,
            # With one seed for all, n answers would be n times the same.
            seed=None if body.seed is None else (body.seed + index) % (1 << 63),
            logprobs=tops,
            ignore_end=bool(body.ignore_eos),
        )

    def headers(self, submission: Submission) -> dict[str, str]:
        """What is known before the first token of a request that the engine has taken."""
        known = {"x-emoe-mode": self.engine.mode, "x-emoe-lossy": str(self.engine.lossy).lower()}
        if submission.task is not None:
            known["x-emoe-task"] = plain(self.engine.labels(submission.task))
        return known
