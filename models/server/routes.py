"""The OpenAI endpoints."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from models.server.answers import ChatShape, CompletionShape, Shape
from models.server.context import Context, context_of
from models.server.errors import ApiError
from models.server.jobs import Job, Ping, clock
from models.server.planning import chat_job, completion_job, wants_origins
from models.server.responses import EventStream, JsonResponse, until_gone
from models.server.schemas import ChatBody, CompletionBody, GenerationBody
from models.server.stream import ClientGone, streamed, whole

CLIENT_GONE = 499  # nobody reads it
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": about}
    for status, about in {
        400: "The request has no meaning here",
        401: "The API key is missing or wrong",
        404: "There is no such model",
        408: "The body did not come in time",
        413: "The body is too long",
        429: "The queue is full",
        503: "The models are being loaded, or the server is shutting down",
    }.items()
}

router = APIRouter(prefix="/v1", responses=ERRORS)


@router.head("/models", include_in_schema=False)
@router.get("/models")
async def list_models(request: Request) -> Response:
    """The one model that is served."""
    return JsonResponse({"object": "list", "data": [_card(context_of(request))]})


@router.get("/models/{model:path}")
async def show_model(model: str, request: Request) -> Response:
    """The model of this name."""
    context = context_of(request)
    context.check_model(model)
    return JsonResponse(_card(context))


@router.post("/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    arrived, context = clock(), context_of(request)
    context.check_model(body.model)
    llm = context.engine.check_ready()
    job = await chat_job(llm, body, arrived, chats=context.engine.chats)
    shape = ChatShape(context.model, llm.tokenizer, origins=wants_origins(body))
    return await _answer(context, request, body, job, shape)


@router.post("/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Write what follows a prompt."""
    arrived, context = clock(), context_of(request)
    context.check_model(body.model)
    llm = context.engine.check_ready()
    job = await completion_job(llm, body, arrived)
    shape = CompletionShape(context.model, llm.tokenizer, origins=wants_origins(body))
    return await _answer(context, request, body, job, shape)


async def _answer(context: Context, request: Request, body: GenerationBody, job: Job, shape: Shape) -> Response:
    engine, job.name = context.engine, shape.id
    engine.submit(job)
    try:
        if job.stream:
            await job.accepted()
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = streamed(job, shape, usage=usage)
            return EventStream(chunks, lambda: engine.cancel(job), lambda: job.events.put_nowait(Ping()))
        watch = asyncio.ensure_future(until_gone(request.receive))
        watch.add_done_callback(lambda task: None if task.cancelled() else engine.cancel(job))
        try:
            return JsonResponse(await whole(job, shape))
        finally:
            watch.cancel()
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    except BaseException as error:
        if not isinstance(error, ApiError):
            engine.cancel(job)
        raise


def _card(context: Context) -> dict[str, Any]:
    engine, llm = context.engine, context.engine.check_ready()
    return {
        "id": context.model,
        "object": "model",
        "created": context.started,
        "owned_by": "tt-speculative-llama",
        "root": context.model,
        "parent": None,
        "max_model_len": llm.engine.target.limits.positions,
        "chat": engine.chats,
        "speculation": {
            "drafters": list(engine.drafters),
            "default": llm.options.drafter,
            "num_draft_tokens": llm.options.num_draft_tokens,
        },
    }
