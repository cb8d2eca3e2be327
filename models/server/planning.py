"""From a request's body to a `Job`: everything that can be found wrong without the engine's thread."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from models.errors import UserError
from models.llm import LLM, Prompt
from models.server.errors import ApiError, refused
from models.server.jobs import Choice, Job
from models.server.schemas import MAX_CHOICES, ChatBody, CompletionBody, GenerationBody, Message, SpeculationBody
from models.speculative.sampling import SamplingParams

COMPLETION_TOKENS = 16  # of /v1/completions where none are asked for, as with OpenAI
INLINE_CHARACTERS = 4096  # longer texts are tokenized beside the event loop


async def chat_job(llm: LLM, body: ChatBody, arrived: float, *, chats: bool) -> Job:
    """What a body of /v1/chat/completions asks for. Raises ApiError.

    chats: whether the model has a chat template.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if not chats:
        message = "this model has no chat template: use /v1/completions, or serve an Instruct checkpoint"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        message = "max_tokens and max_completion_tokens say different things: give one of them"
        raise ApiError(400, message, param="max_completion_tokens", code="invalid_value")
    ids = await encoded(llm, conversation(body.messages), "messages")
    top = (body.top_logprobs or 0) if body.logprobs else None
    return _job(llm, body, [ids], "messages", limits.pop() if limits else None, top, arrived)


async def completion_job(llm: LLM, body: CompletionBody, arrived: float) -> Job:
    """What a body of /v1/completions asks for. Raises ApiError."""
    given = body.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    prompts: list[Prompt] = given if several else [given]  # type: ignore[assignment, list-item]
    ids = [await encoded(llm, prompt, "prompt") for prompt in prompts]
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _job(llm, body, ids, "prompt", limit, body.logprobs, arrived)


def conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates read them: "developer" is the newer name of "system"."""
    told = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        told.append({"role": role, "content": text})
    return told


async def encoded(llm: LLM, prompt: Prompt, param: str) -> list[int]:
    """A prompt's token ids. Raises ApiError."""
    texts = [prompt] if isinstance(prompt, str) else [part["content"] for part in prompt if isinstance(part, dict)]
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        message = f"{param} has half a character: a surrogate without its other half"
        raise ApiError(400, message, param=param, code="invalid_value") from None
    try:
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return llm.encode(prompt)
        return await asyncio.to_thread(llm.encode, prompt)
    except UserError as error:
        raise refused(error, param) from None


def _job(
    llm: LLM,
    body: GenerationBody,
    prompts: list[list[int]],
    param: str,
    max_new_tokens: int | None,
    top_logprobs: int | None,
    arrived: float,
) -> Job:
    limits, n = llm.engine.target.limits, body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        message = f"{len(prompts)} prompts with n = {n}: ask for at most {MAX_CHOICES} texts at once"
        raise ApiError(400, message, param="n", code="invalid_value")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
    for prompt in prompts:
        if not 0 < len(prompt) < limits.positions:
            message = (
                f"the prompt has {len(prompt)} tokens, the context {limits.positions}: shorten it to at most "
                f"{limits.positions - 1}"
                if prompt
                else "the prompt is empty: give at least one token"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded" if prompt else "invalid_value")
        if max(prompt) >= limits.vocabulary:
            message = f"token id {max(prompt)}: the vocabulary has {limits.vocabulary}"
            raise ApiError(400, message, param=param, code="invalid_value")
    seed = secrets.randbits(62) if body.seed is None else body.seed
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    stop_ids = frozenset(() if body.ignore_eos else llm.stop_ids) | frozenset(body.stop_token_ids or ())
    longest = limits.positions if max_new_tokens is None else min(max_new_tokens, limits.positions)
    choices = []
    for index in range(len(prompts) * n):
        sampling = _sampling(body, seed + index)
        choices.append(Choice(index, prompts[index // n], sampling, longest, stop, stop_ids))
    return Job(choices, _speculation(body), bool(body.stream), top_logprobs, arrived)


def wants_origins(body: GenerationBody) -> bool:
    """Whether an answer is to say of every token where it came from."""
    return isinstance(body.speculation, SpeculationBody) and bool(body.speculation.origins)


def _sampling(body: GenerationBody, seed: int) -> SamplingParams:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    try:
        return SamplingParams(temperature, max(body.top_k or 0, 0), top_p, seed)
    except UserError as error:
        raise refused(error, "temperature") from None


def _speculation(body: GenerationBody) -> tuple[str | None, int | str | None]:
    """(drafter, tokens a round), as of `Job`."""
    asked = body.speculation
    if isinstance(asked, SpeculationBody):
        drafter = {"off": "none", "auto": None}.get(asked.drafter or "auto", asked.drafter)
        return drafter, asked.num_draft_tokens
    return {None: (None, None), "off": ("none", 0), "on": (None, "on"), "auto": (None, "auto")}[asked]
