"""A target and whatever drafts for it, ready to write text: the front door of the library.

    from models import LLM

    with LLM.load("tiny") as llm:
        for piece in llm.stream("def add(a, b):", max_new_tokens=60):
            print(piece.text, end="", flush=True)

In three layers: `loaded` puts models on their device, `drafting` chooses who drafts, and `LLM` writes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from os import PathLike
from typing import TYPE_CHECKING, Any, cast, overload

from models.completion import Completion, Piece, Prompt, with_completions, write_texts
from models.drafting import Drafting, DraftingPair
from models.errors import NotFinite, UserError, in_words
from models.loading import OpenedPair, open_pair
from models.options import describe_source, engine_options
from models.speculative.generate import stream
from models.speculative.sampling import SamplingParams
from models.speculative.sequence import LogitsReader, Request
from models.speculative.stats import GenerationStats
from models.speculative.text import TextStream, checked_stops

if TYPE_CHECKING:
    from models.audit import TextAudit

__all__ = ["LLM", "Completion", "Drafting", "Piece", "Prompt"]


class LLM(DraftingPair):
    """A target, its draft model if there is one, their device, and an engine.

    Close it when done, or use it as a context manager: a board is given back then.

    Attributes:
        stats: of the text begun last.
        options, tokenizer, target, draft, board, stop_ids, calibration: as of `loaded.LoadedPair`.
        exit, exit_s: as of `drafting.DraftingPair`.
    """

    def __init__(
        self,
        pair: OpenedPair,
        *,
        announce: Callable[..., None] | None = None,
        progress: Callable[[str, int, int, str], None] | None = None,
    ) -> None:
        """Load an opened pair; see `load`. announce, progress: as of `ttnn_llama.board_models.BoardModels`."""
        super().__init__(pair, announce=announce, progress=progress)
        self.stats = GenerationStats()

    @classmethod
    def load(
        cls,
        target: str | PathLike[str] = "tiny",
        draft: str | PathLike[str] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> LLM:
        """Open and load models.

        Args:
            target: a checkpoint directory, a GGUF file, a Hugging Face id, or a name: "tiny", the small pair that comes
                with the package, or "smollm2", a small chat model that is fetched once.
            draft: the same for the draft model, or a draft head; None: the one that belongs to the target, else none.
            device: "cpu", "cuda" or "tt".
            options: any other field of `options.EngineOptions`.

        Raises:
            UserError: for whatever is wrong with the files, the pair, the options or the device, in one line.
        """
        return cls(open_pair(engine_options(target=target, draft=draft, device=device, **options)))

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] | None = None,
        stop_ids: Iterable[int] | None = None,
        speculate: bool | Drafting = True,
        stats: GenerationStats | None = None,
    ) -> Generator[Piece, None, None]:
        """Write what follows a prompt, token by token, as it comes.

        Args:
            prompt: a text, token ids, or the messages of a conversation ({"role": .., "content": ..}).
            sampling: default greedy.
            max_new_tokens: how many at most.
            stop: strings that end the text; it ends before the one that is complete first.
            stop_ids: tokens that end it; default: the target's own.
            speculate: False decodes plainly; a `Drafting` drafts in another configuration than the loaded options'.
            stats: a fresh one to fill; default: a new `self.stats`.

        Raises:
            UserError: at the call, for a prompt that does not fit, and whatever else cannot be written.
        """
        request, text = self.request(
            prompt, sampling, max_new_tokens=max_new_tokens, stop=stop, stop_ids=stop_ids, speculate=speculate
        )
        self.stats = GenerationStats() if stats is None else stats
        return self._pieces(request, text, self.stats)

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] | None = None,
        stop_ids: Iterable[int] | None = None,
        speculate: bool | Drafting = True,
        reader: LogitsReader | None = None,
    ) -> tuple[Request, TextStream]:
        """What `stream` asks the engine for, to be added by whoever takes its steps: `LLM.engine`.

        Arguments and errors are those of `stream`; reader: sees what tokens are chosen from.

        Returns:
            The request, and its text: it is given every token by the engine, and gives out what is certain.
        """
        ids = self.encode(prompt)
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise UserError(f"sampling {sampling!r}: give a SamplingParams")
        for checkpoint in self._mapped:
            checkpoint.check_in_place()
        drafting = self._drafting_for(speculate)
        text = TextStream(self.tokenizer.detokenizer() if self.tokenizer else None, checked_stops(stop))
        request = Request(
            ids,
            sampling or SamplingParams(),
            max_new_tokens,
            frozenset(self.stop_ids if stop_ids is None else _ids(stop_ids, "stop_ids")),
            text,
            drafting.drafter,
            drafting.controller,
            drafting.verification,
            reuse=self.options.reuse,
            reader=reader,
        )
        request.check(self.engine.target.limits)
        try:
            self._prepare(drafting, request)
        except NotFinite as error:
            raise self._explained(error, ids, 0) from None
        return request, text

    @overload
    def generate(
        self,
        prompt: list[str],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: list[list[int]] | list[list[Mapping[str, str]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Any) -> Completion: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Write what follows a prompt: the whole text. A list of prompts gives a list, in their order.

        Several are written side by side in the engine's slots (`options.slots`), one forward for all of them; those
        beyond wait for a slot. Each text is the one that its prompt gives alone. `stats` are then those of all texts
        merged, their speeds as each reader would see them.

        Args:
            prompt: as of `stream`; or a list of texts, of lists of token ids, or of conversations.
            sampling: for all of them, or a list with one for each.
            options: as of `stream`, for all of them.

        Raises:
            UserError: as of `stream`, before anything is written, and for a list of sampling parameters of another
                length.
            Exception: what ends a text in the middle. The other texts of a list are written to their ends before it is
                raised, the first one of several. It keeps what was written as its attribute `completions`: a
                `Completion` for each prompt, in their order, those that did not end with the reason "interrupted".
        """
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list | tuple):
            return self._complete_all(cast("Sequence[Prompt]", prompt), sampling, **options)
        if isinstance(sampling, list | tuple):
            raise UserError(
                f"a list of {len(sampling)} sampling parameters for one prompt: give one, or several prompts"
            )
        return self._complete(cast("Prompt", prompt), cast("SamplingParams | None", sampling), **options)

    def chat(
        self, messages: str | Sequence[Mapping[str, str]], sampling: SamplingParams | None = None, **options: Any
    ) -> Completion:
        """Answer a conversation in the target's chat template; a text is one user message.

        Arguments and errors are those of `stream`. To stream an answer, give the messages to `stream`.
        """
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self._complete(conversation, sampling, **options)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids. Raises UserError for a text, or a conversation, without a tokenizer or template."""
        self._check_open()
        if isinstance(prompt, (bytes, Mapping)) or not (hasattr(prompt, "__getitem__") and hasattr(prompt, "__len__")):
            kind = type(prompt).__name__
            raise UserError(f"the prompt is of type {kind}: give a text, a list of token ids, or a list of messages")
        if not isinstance(prompt, str) and (len(prompt) == 0 or not isinstance(prompt[0], Mapping)):
            return _ids(cast("Sequence[int]", prompt), "the prompt")
        if self.tokenizer is None:
            raise UserError(
                f"{describe_source(self.options.target)} has no tokenizer.json: add it, or give token ids as the prompt"
            )
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.chat(cast("Sequence[Mapping[str, str]]", prompt))

    def audit(
        self,
        prompt: Prompt,
        text: Completion | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        stop: str | Sequence[str] | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> TextAudit:
        """Replay a text against plain decoding: whether it is the target's own, token by token.

        Args:
            prompt, sampling, stop, stop_ids: those that the text was written with.
            text: what was written; of token ids alone it is not asked whether plain decoding stops there too.

        Raises:
            UserError: while another text is under way, whose cache it needs.
        """
        from models.audit import Auditor

        ids, sampling = self.encode(prompt), sampling or SamplingParams()
        tokens, reason = (text.token_ids, text.finish_reason) if isinstance(text, Completion) else (list(text), "")
        auditor = Auditor(self)
        if not sampling.greedy:
            return auditor.sampled(ids, tokens, sampling)
        stops = None if stop_ids is None else list(stop_ids)
        return auditor.greedy(ids, tokens, finish_reason=reason, stop=stop, stop_ids=stops)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _complete(self, prompt: Prompt, sampling: SamplingParams | None, **options: Any) -> Completion:
        stats = options.pop("stats", None)
        asked = self.request(prompt, sampling, **options)
        self.stats = GenerationStats() if stats is None else stats
        return write_texts(self.engine, [asked], [self.stats], self._explained)[0]

    def _complete_all(
        self, prompts: Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None, **options: Any
    ) -> list[Completion]:
        """Texts side by side."""
        stats = options.pop("stats", None)
        if stats is not None:
            raise UserError("stats for several prompts: each completion has its own")
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise UserError(
                f"{len(sampling)} sampling parameters for {len(prompts)} prompts: give one for each, or one"
            )
        if self.board and self.options.slots == 1:  # each prompt may need programs of its own
            return self._one_after_the_other(prompts, sampling, **options)
        asked = [self.request(each, params, **options) for each, params in zip(prompts, sampling, strict=True)]
        all_stats = [GenerationStats() for _ in asked]
        try:
            return write_texts(self.engine, asked, all_stats, self._explained)
        finally:
            self.stats = GenerationStats.merge(all_stats)

    def _one_after_the_other(
        self, prompts: Sequence[Prompt], sampling: Sequence[SamplingParams], **options: Any
    ) -> list[Completion]:
        written: list[Completion] = []
        raised: Exception | None = None
        for prompt, params in zip(prompts, sampling, strict=True):
            try:
                written.append(self._complete(prompt, params, **options))
            except Exception as error:
                raised = raised or error
                none = Completion("", [], "interrupted", GenerationStats(), in_words(error))
                written += getattr(error, "completions", [none])
        self.stats = GenerationStats.merge(each.stats for each in written)
        if raised is not None:
            raise with_completions(raised, written)
        return written

    def _pieces(self, request: Request, text: TextStream, stats: GenerationStats) -> Generator[Piece, None, None]:
        sequence = self.engine.add(request, stats)
        try:
            with closing(stream(self.engine, sequence)) as tokens:
                for token in tokens:
                    reason = stats.finish_reason
                    yield Piece(text.finish() if reason else text.take(), token.id, token.origin, reason)
        except NotFinite as error:  # the engine has freed the slot
            raise self._explained(error, request.prompt, sequence.slot) from None

    def _explained(self, error: NotFinite, prompt: Sequence[int], slot: int) -> NotFinite:
        """The same error with the target's name and, off boards, the layer that it comes from. The slot is free."""
        if self.board is None:
            from models.torch_llama.checks import check_finite

            try:
                check_finite(self.target.model.slot(slot), prompt)
            except NotFinite as found:
                error = found
        return NotFinite(f"{describe_source(self.options.target)}: {error}")


def _ids(values: Iterable[int], what: str) -> list[int]:
    """Token ids as ints. Raises UserError for what is no whole number: cut to one, it would mean another token."""
    try:
        return [operator.index(each) for each in values]
    except TypeError:
        raise UserError(f"{what} {repr(values)[:80]}: token ids are whole numbers") from None
