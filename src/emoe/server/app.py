"""The HTTP application: routes, errors, middleware."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import emoe
from emoe.server import errors
from emoe.server.bridge import EngineLike
from emoe.server.chat import chat
from emoe.server.completions import complete
from emoe.server.errors import ApiError, ErrorBody
from emoe.server.limits import ApiKey, BodyLimit, CrowdLimit, OneLength
from emoe.server.log import log_status
from emoe.server.metrics import Metrics
from emoe.server.replies import (
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    ModelCard,
    ModelList,
    Tokenized,
    Version,
)
from emoe.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, Milliseconds, TokenizeRequest
from emoe.server.service import Service, Targets
from emoe.server.settings import ServerSettings
from emoe.server.tokens import Tokens

Refusals = dict[int | str, dict[str, Any]]
FAILS: Refusals = {
    "4XX": {"model": ErrorBody, "description": "Refused; the error names the field or the limit."},
    "5XX": {"model": ErrorBody, "description": "Failed, timed out, or the server is stopping."},
}
STREAMS: Refusals = {
    200: {
        "description": "The answer, or with `stream` its pieces as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

Ttft = Annotated[Milliseconds | None, Header(alias="x-slo-ttft-ms", description="goes before `emoe.slo_ttft_ms`")]
Tpot = Annotated[Milliseconds | None, Header(alias="x-slo-tpot-ms", description="goes before `emoe.slo_tpot_ms`")]


def create_app(engine: EngineLike, settings: ServerSettings, tokenizer: Any, model_name: str) -> FastAPI:
    """The application for a started engine; `app.state.service` is what its endpoints work with.

    Raises:
        UsageError: there is no tokenizer.
    """
    tokens = Tokens(tokenizer, model_name)
    service = Service(engine, settings, tokens, model_name, Metrics(model_name, engine))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        task = asyncio.create_task(_status(service)) if settings.status_interval_s else None
        yield
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        tokens.close()

    app = FastAPI(
        title="emoe",
        version=emoe.__version__,
        summary="Mixture-of-Experts models in a fraction of their memory, behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_facts(app, service)
    _add_errors(app, service)
    refused = service.metrics.refused
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, refused=refused)
    if settings.api_key is not None:
        app.add_middleware(ApiKey, key=settings.api_key, max_bytes=settings.max_body_bytes, refused=refused)
    app.add_middleware(CrowdLimit, max_bytes=settings.max_body_bytes, refused=refused)
    if settings.cors_origins:  # outside of those, so that a page may read why
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],  # Retry-After, x-request-id, x-emoe-...: pages see no others than are named
        )
    app.add_middleware(OneLength, max_bytes=settings.max_body_bytes, refused=refused)
    return app


async def _status(service: Service) -> None:
    metrics = service.metrics
    await log_status(
        lambda: (service.engine.stats(), metrics.slo_met, metrics.slo_asked), service.settings.status_interval_s
    )


def _add_generation(app: FastAPI, service: Service) -> None:
    """The endpoints that generate."""

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=FAILS | STREAMS)
    async def chat_completions(
        body: ChatRequest, request: Request, x_slo_ttft_ms: Ttft = None, x_slo_tpot_ms: Tpot = None
    ) -> Response:
        """Answer a conversation."""
        return await chat(service, body, request, Targets(x_slo_ttft_ms, x_slo_tpot_ms))

    @app.post("/v1/completions", response_model=Completion, responses=FAILS | STREAMS)
    async def completions(
        body: CompletionRequest, request: Request, x_slo_ttft_ms: Ttft = None, x_slo_tpot_ms: Tpot = None
    ) -> Response:
        """Go on from prompts."""
        return await complete(service, body, request, Targets(x_slo_ttft_ms, x_slo_tpot_ms))


def _add_tokens(app: FastAPI, service: Service) -> None:
    """The tokenizer's endpoints, in vLLM's shapes."""
    tokens = service.tokens

    @app.post("/tokenize", response_model=Tokenized, responses=FAILS)
    async def tokenize(body: TokenizeRequest) -> JSONResponse:
        """Tokens of a prompt, or of a conversation in the chat template."""
        service.check_model(body.model)
        if body.messages is not None:
            ids = await tokens.chat(body.messages, generation_prompt=body.add_generation_prompt)
        else:
            ids = await tokens.text(body.prompt or "", special=body.add_special_tokens is not False)
        strings = tokens.strings(ids) if body.return_token_strs else None
        most = service.engine_holds()
        return JSONResponse({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})

    @app.post("/detokenize", response_model=Detokenized, responses=FAILS)
    async def detokenize(body: DetokenizeRequest) -> JSONResponse:
        """The text of tokens, special ones included."""
        service.check_model(body.model)
        tokens.check(body.tokens, "tokens")
        return JSONResponse({"prompt": tokens.decode_all(body.tokens)})


def _add_facts(app: FastAPI, service: Service) -> None:
    """What is served, and how it fares."""

    def card() -> ModelCard:
        engine, settings = service.engine, service.settings
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "emoe",
            "max_model_len": service.engine_holds(),
            "emoe": {
                "mode": engine.mode,
                "lossy": engine.lossy,
                "expert_dtype": engine.expert_dtype,
                "scheduler": engine.scheduler_name,
                "context": service.engine_holds(),
                "expert_budget_bytes": engine.stats().budget_bytes,
                "kv_tokens": engine.kv_tokens,
                "max_running": engine.settings.max_running,
                "max_waiting": engine.settings.max_waiting,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
                "max_tokens": settings.max_tokens,
            },
        }

    @app.get("/v1/models", response_model=ModelList, responses=FAILS)
    async def models() -> JSONResponse:
        """The one model."""
        return JSONResponse({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=FAILS)
    async def model(model: str) -> JSONResponse:
        """The model of that name."""
        service.check_model(model)
        return JSONResponse(card())

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Health, responses=FAILS)
    async def health() -> JSONResponse:
        """200 while requests are taken; 503 with the reason otherwise."""
        problem = service.unhealthy()
        return JSONResponse({"status": "ok"}) if problem is None else problem.response()

    @app.get("/metrics", response_class=PlainTextResponse, responses=FAILS)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", response_model=Version, responses=FAILS)
    async def version() -> JSONResponse:
        """emoe's version."""
        return JSONResponse({"version": emoe.__version__})


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error in OpenAI's shape."""

    async def refuse(request: Request, error: Exception) -> Response:
        refusal = errors.as_api_error(request, error)
        if not refusal.taken:
            service.metrics.refused(refusal.code)
        return refusal.response()

    for kind in (ApiError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(Exception, errors.on_defect)
