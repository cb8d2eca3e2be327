"""Endpoints beside OpenAI's, as vLLM's server has them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from models.errors import UserError
from models.server.context import context_of
from models.server.errors import ApiError, refused
from models.server.metrics import CONTENT_TYPE
from models.server.planning import conversation, encoded
from models.server.responses import JsonResponse
from models.server.routes import ERRORS
from models.server.schemas import DetokenizeBody, TokenizeBody

router = APIRouter()


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """The token ids of a prompt, or of a conversation in the model's chat template."""
    context = context_of(request)
    context.check_model(body.model)
    llm = context.engine.check_ready()
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")
    if body.messages is not None:
        ids = await encoded(llm, conversation(body.messages), "messages")
    else:
        ids = await encoded(llm, body.prompt or "", "prompt")
    tokenizer = llm.tokenizer
    assert tokenizer is not None  # else there was nothing to encode with
    if body.add_special_tokens is False and body.messages is None and tokenizer.begins_with_bos:
        ids = ids[1:]
    answer = {"count": len(ids), "max_model_len": llm.engine.target.limits.positions, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(id) or "" for id in ids]
    return JsonResponse(answer)


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """The text of token ids, without special tokens."""
    context = context_of(request)
    context.check_model(body.model)
    llm = context.engine.check_ready()
    vocabulary = llm.engine.target.limits.vocabulary
    if wrong := [id for id in body.tokens if id >= vocabulary]:
        message = f"token id {wrong[0]}: the vocabulary has {vocabulary}"
        raise ApiError(400, message, param="tokens", code="invalid_value")
    if llm.tokenizer is None:
        raise refused(UserError("this model has no tokenizer.json: its texts are token ids"))
    return JsonResponse({"prompt": llm.tokenizer.decode(body.tokens)})


@router.head("/health", include_in_schema=False)
@router.get("/health", responses={503: {"description": "Loading, shutting down, or failing"}})
async def health(request: Request) -> Response:
    """Whether requests are taken: 503 while the models are loaded and while the server shuts down."""
    state = context_of(request).engine.state
    return JsonResponse({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(context_of(request).metrics.text(), media_type=CONTENT_TYPE)
