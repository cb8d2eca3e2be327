"""Bodies of requests. What a field means: docs/server.md."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.speculative.drafters import MAX_DRAFT_LENGTH

MAX_CHOICES = 16  # of a request: prompts times n
MAX_STOPS, MAX_STOP_LENGTH = 16, 512  # strings, characters
MAX_TOP_LOGPROBS = 20
INT64 = 2**63

# Fields that other servers know, and the values with which they change nothing; null never does. vllm-router adds some
# of them to every request.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True, False),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_hidden_states": (False,),
    "separate_reasoning": (True, False),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "stream_reasoning": (True, False),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# The same of a message: clients send answers back as they came.
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}

Whole = Annotated[int, Field(strict=True)]
Length = Annotated[int, Field(strict=True, ge=0, le=MAX_DRAFT_LENGTH)]
Id = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Body(BaseModel):
    """A JSON object in which nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {name: values for name, values in cls.neutral.items() if name not in cls.model_fields}
        return {
            name: value
            for name, value in data.items()
            if name not in known or not (value is None or value in known[name])
        }


class SpeculationBody(Body):
    """Who drafts for a request, and how many tokens a round."""

    drafter: Annotated[str, Field(max_length=64)] | None = None
    num_draft_tokens: Length | Literal["auto"] | None = None
    origins: bool | None = None


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationBody(Body):
    """What both endpoints that write know."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[Whole, Field(ge=-INT64, lt=INT64)] | None = None
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculation: Literal["off", "on", "auto"] | SpeculationBody | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    metadata: dict[str, str] | None = None


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = MESSAGE_NEUTRAL

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or the messages of a conversation."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: list[Id]
