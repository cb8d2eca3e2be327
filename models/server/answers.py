"""The shapes of answers: OpenAI's, with what speculation did beside them."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from models.llama.tokenizer import LlamaTokenizer
from models.options import AUTO
from models.server.jobs import Delta, Job, Summary, Written
from models.server.responses import to_json
from models.speculative.stats import GenerationStats

PLACE = "\0"  # in place of a text: no served name has it
JUDGED_ROUNDS = 16  # the last ones, which say whether a policy has switched drafting off


class Shape(ABC):
    """How an endpoint writes its answers.

    Args:
        model: the served name. tokenizer: of the model. origins: whether every token's origin is wanted.
    """

    prefix = object_name = chunk_name = ""

    def __init__(self, model: str, tokenizer: LlamaTokenizer | None, *, origins: bool = False) -> None:
        self._tokenizer, self._origins = tokenizer, origins
        self._head = {
            "id": self.prefix + secrets.token_hex(12),
            "object": "",
            "created": int(time.time()),
            "model": model,
        }
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._offsets: dict[int, int] = {}  # characters of a choice's text so far

    @property
    def id(self) -> str:
        """Of the answer."""
        return str(self._head["id"])

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that a choice begins with; None: there is none."""
        return None

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """What a choice has got, as a chunk of a stream; None: nothing that has to be told now."""
        index, written, reason = delta.choice, delta.written, delta.finish_reason
        text = "".join(each.text for each in written)
        told = self._extras(index, written)
        if not (text or told or reason):
            return None
        chunk = self._chunk({"index": index, **self._delta(text), "finish_reason": reason or None, **told})
        if self._origins:
            counts = zip(("rounds", "draft_n", "draft_n_accepted"), delta.counts, strict=True)
            chunk["timings"] = dict(counts)
        return chunk

    def plain_text(self, delta: Delta) -> str | None:
        """What a delta says, if that is a text and nothing else: its chunk is then `frame`'s."""
        if self._origins or delta.finish_reason or (delta.written and delta.written[0].score is not None):
            return None
        return "".join(each.text for each in delta.written)

    def frame(self, index: int) -> tuple[bytes, bytes]:
        """What an event of a choice has before and behind its text, which is JSON: the same in all of them."""
        if (known := self._frames.get(index)) is None:
            chunk = self._chunk({"index": index, **self._delta(PLACE), "finish_reason": None})
            start, end = (b"data: " + to_json(chunk) + b"\n\n").split(to_json(PLACE))
            known = self._frames[index] = start, end
        return known

    def last_chunk(self, job: Job, summaries: Sequence[Summary]) -> dict[str, Any]:
        """The chunk without choices that has the usage."""
        return {**self._head, "object": self.chunk_name, "choices": [], **self.account(job, summaries)}

    def whole(self, job: Job, texts: Sequence[tuple[list[Written], str]], summaries: Sequence[Summary]) -> dict:
        """A complete answer. texts: of each choice what was written, and why it has ended."""
        choices = []
        for index, (written, reason) in enumerate(texts):
            text = "".join(each.text for each in written)
            told = {"logprobs": None, **self._extras(index, written)}
            choices.append({"index": index, **self._message(text), "finish_reason": reason, **told})
        return {**self._head, "object": self.object_name, "choices": choices, **self.account(job, summaries)}

    def account(self, job: Job, summaries: Sequence[Summary]) -> dict[str, Any]:
        """Usage, timings and speculation of all choices together."""
        stats = GenerationStats.merge(summary.stats for summary in summaries)
        return {
            "usage": usage(job, stats),
            "timings": timings(job, stats, summaries),
            "speculation": speculation(stats, summaries),
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_name, "choices": [choice]}

    def _extras(self, index: int, written: Sequence[Written]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if written and written[0].score is not None:
            told["logprobs"] = self._logprobs(index, written)
        if self._origins and written:
            told["origins"] = [{"id": each.id, "text": each.text, "origin": each.origin} for each in written]
        return told

    def _token(self, id: int) -> tuple[str, list[int]]:
        """A token's text and bytes; a part of a character is written as OpenAI does, so that no two are alike."""
        if self._tokenizer is None:
            return str(id), list(str(id).encode())
        data = self._tokenizer.token_bytes(id) or (self._tokenizer.token_text(id) or "").encode()
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _message(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, index: int, written: Sequence[Written]) -> dict[str, Any]: ...


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    prefix, object_name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """Says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": index, "delta": delta, "finish_reason": None})

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, index: int, written: Sequence[Written]) -> dict[str, Any]:
        content = []
        for each in written:
            assert each.score is not None
            top = [self._scored(id, logprob) for id, logprob in each.score.top]
            content.append({**self._scored(each.id, each.score.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _scored(self, id: int, logprob: float) -> dict[str, Any]:
        text, data = self._token(id)
        return {"token": text, "logprob": logprob, "bytes": data}


class CompletionShape(Shape):
    """Of /v1/completions."""

    prefix, object_name, chunk_name = "cmpl-", "text_completion", "text_completion"

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _message = _delta

    def _logprobs(self, index: int, written: Sequence[Written]) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        told: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in written:
            assert each.score is not None
            told["tokens"].append(self._token(each.id)[0])
            told["token_logprobs"].append(each.score.logprob)
            told["top_logprobs"].append({self._token(id)[0]: logprob for id, logprob in each.score.top})
            told["text_offset"].append(offset)
            offset += len(each.text)
        self._offsets[index] = offset
        return told


def usage(job: Job, stats: GenerationStats) -> dict[str, Any]:
    """OpenAI's, with drafted tokens as its predictions: those accepted are part of the text."""
    accepted = sum(min(round_.accepted, round_.emitted) for round_ in stats.rounds)
    drafted = sum(round_.drafted for round_ in stats.rounds)
    details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": stats.tokens,
        "total_tokens": job.prompt_tokens + stats.tokens,
        "completion_tokens_details": details,
    }


def timings(job: Job, stats: GenerationStats, summaries: Sequence[Summary]) -> dict[str, Any]:
    """As llama.cpp's server gives them; of several choices sums, as if one had followed the other."""
    prompt_ms = 1000 * sum(summary.stats.ttft_s for summary in summaries)
    predicted_ms = 1000 * sum(summary.decode_s for summary in summaries)
    return {
        "queue_ms": 1000 * max(summary.waited_s for summary in summaries),
        "prompt_n": job.prompt_tokens,
        "prompt_ms": prompt_ms,
        "prompt_per_second": 1000 * job.prompt_tokens / prompt_ms if prompt_ms else 0.0,
        "predicted_n": stats.tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_second": 1000 * stats.decode_tokens / predicted_ms if predicted_ms else 0.0,
        "rounds": len(stats.rounds),
        "draft_n": sum(round_.drafted for round_ in stats.rounds),
        "draft_n_accepted": sum(round_.accepted for round_ in stats.rounds),
    }


def speculation(stats: GenerationStats, summaries: Sequence[Summary]) -> dict[str, Any]:
    """What was drafted. state: "off", "on", "switched-off" by the policy at the end, or "failed"."""
    first = summaries[0]
    failure = stats.drafting_failure
    state = "on" if first.length else "off"
    if failure:
        state = "failed"
    elif all(switched_off(summary) for summary in summaries):
        state = "switched-off"
    return {
        "drafter": first.drafter,
        "num_draft_tokens": first.length,
        "state": state,
        "failure": failure or None,
        "rounds": len(stats.rounds),
        "rounds_that_drafted": sum(round_.drafted > 0 for round_ in stats.rounds),
        "acceptance_rate": stats.acceptance_rate,
        "mean_acceptance_length": stats.mean_acceptance_length,
    }


def switched_off(summary: Summary) -> bool:
    """Whether the policy had stopped drafting when the text ended, but for a probe now and then."""
    last = summary.stats.rounds[-JUDGED_ROUNDS:]
    plain = sum(not round_.drafted for round_ in last)
    return summary.length == AUTO and summary.allowed == 0 and bool(last) and 2 * plain > len(last)
