"""A target and whatever drafts for it, ready to write text: the front door of the library.

    from models import LLM

    with LLM.load("tiny") as llm:
        for piece in llm.stream("def add(a, b):", max_new_tokens=60):
            print(piece.text, end="", flush=True)

This is the only place that knows files, devices, drafters and policies at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import torch
from loguru import logger

from models.errors import NotFinite, OptionError, UserError, in_words
from models.llama.checkpoint import StoredTensors
from models.loading import LoadedHead, LoadedModel, OpenedHead, OpenedPair, load_draft, load_model, open_pair
from models.options import AUTO, ResolvedOptions, describe_source, engine_options
from models.speculative.control.costs import CostModel
from models.speculative.control.policy import AutoDraftLength, Controller, FixedDraftLength
from models.speculative.drafters import Drafter, PerSequence
from models.speculative.drafters.degrading import Degrading
from models.speculative.drafters.in_step import InStep
from models.speculative.drafters.registry import FORCED, NONE, DrafterSpec, Parts, spec_of
from models.speculative.engine import Engine
from models.speculative.generate import stream
from models.speculative.model import DraftHead, Workload
from models.speculative.sampling import SamplingParams
from models.speculative.scheduler import PROMPT_ROWS
from models.speculative.sequence import LogitsReader, Request
from models.speculative.stats import GenerationStats
from models.speculative.text import TextStream, checked_stops

if TYPE_CHECKING:
    from models.audit import TextAudit
    from models.llama.tokenizer import LlamaTokenizer
    from models.speculative.drafters.early_exit import ExitChoice
    from models.ttnn_llama.board_models import BoardModels
    from models.ttnn_llama.programs.options import BoardOptions

# A text, token ids, or the messages of a conversation.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

EXIT_TOKENS = 64  # that the target writes for the choice of an exit layer


class Piece(NamedTuple):
    """A token of a stream.

    text: what has become certain with it; "" inside a character, and where a stop string may have begun.
    id, origin: as of `sequence.Token`. finish_reason: "" but for the last one, whose text is all that was left.
    """

    text: str
    id: int
    origin: str
    finish_reason: str = ""


@dataclass(frozen=True)
class Completion:
    """A text that is complete, or what there is of it.

    Args:
        text: without special tokens, and without the stop string that ended it.
        token_ids: all that were emitted, a stop token included.
        finish_reason: "stop", "length" (max_new_tokens) or "context" (no position is left); "interrupted" in the
            `completions` of an error.
        stats: counts and times.
        error: in words, what ended it; "": no error of its own.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats
    error: str = ""


@dataclass(frozen=True)
class Drafting:
    """Who drafts, and how much: one configuration, which learns as long as it is used. Made by `LLM.drafting`.

    Args:
        name: of the drafter.
        length: tokens drafted a round, or "auto".
        drafter: for the engine; None: plain decoding.
        controller: its policies.
        verification: "batched" or "sequential".
    """

    name: str
    length: int | str
    drafter: Drafter | None
    controller: Controller | None
    verification: str = "batched"


class LLM:
    """A target, its draft model if there is one, their device, and an engine.

    Close it when done, or use it as a context manager: a board is given back then.

    Attributes:
        options: what was asked for, with every default filled in.
        tokenizer: the target's; None where its checkpoint has none: prompts are then token ids.
        target, draft: loaded models; draft is a draft model, a draft head, or None where neither is used.
        board: the board they are on, or None.
        stop_ids: tokens that end a text by default: the target's own.
        stats: of the text begun last.
        exit: how the layer of early exit was chosen, where it was chosen by measurement.
        calibration: what padding rows costs on this machine, where that decided how many there are.
    """

    def __init__(
        self,
        pair: OpenedPair,
        *,
        announce: Callable[..., None] | None = None,
        progress: Callable[[str, int, int, str], None] | None = None,
    ) -> None:
        """Load an opened pair; see `load`. announce, progress: as of `ttnn_llama.board_models.BoardModels`."""
        self.options = pair.options
        self.max_seq_len = pair.max_seq_len
        self.calibration = pair.calibration
        self.tokenizer: LlamaTokenizer | None = pair.target.tokenizer
        self.stop_ids: tuple[int, ...] = tuple(pair.target.checkpoint.config.eos_token_ids)
        self.stats = GenerationStats()
        self.target: LoadedModel
        self.draft: LoadedModel | LoadedHead | None = None
        self.board: BoardModels | None = None
        self.exit: ExitChoice | None = None
        self.exit_s = 0.0  # that the choice took
        self._closed = False
        self._mapped: list[StoredTensors] = []  # checkpoints whose files may back weights
        self._default: Drafting | None = None
        self._recorded: dict[tuple[int, ...], list[int]] = {}  # plain texts by prompt, for forced acceptance
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        options = self.options
        if options.device == "tt":
            self._load_on_board(pair, announce, progress)
        else:
            if options.device == "cpu":
                opened = [pair.target, pair.draft] if pair.draft else [pair.target]
                self._mapped = [each.checkpoint for each in opened if isinstance(each.checkpoint, StoredTensors)]
            self.target = load_model(
                pair.target,
                device=options.device,
                dtype=options.dtype,
                max_seq_len=self.max_seq_len,
                slots=options.slots,
                pool=pair.pool,
                fixed_rows=options.fixed_rows,
                row_invariant=options.row_invariant and options.fixed_rows is None,
                typical_rows=options.verify_rows,
            )
            if options.row_invariant and not self.target.model.row_invariant:
                logger.warning("rows of this model are not alike on this machine: a near-tie can fall the other way")
                self.options = options = replace(options, row_invariant=False, rows_alike=False)
            if pair.draft:
                self.draft = load_draft(
                    pair.draft,
                    self.target.model,
                    device=options.device,
                    dtype=options.draft_dtype,
                    max_seq_len=pair.draft_seq_len,
                    slots=options.slots,
                )
        # A board reads prompts whole: its kernels begin at whole pages, and pieces would be rounded otherwise.
        prompt_rows = options.slots * self.max_seq_len if self.board else PROMPT_ROWS
        self.engine = Engine(self.target.model, prompt_rows=prompt_rows)

    @classmethod
    def load(cls, target: str = "tiny", draft: str | None = None, device: str = "cpu", **options: Any) -> LLM:
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

    def _load_on_board(self, pair: OpenedPair, announce, progress) -> None:
        from models.ttnn_llama.board_models import BoardModels

        self.board = BoardModels(
            pair.target,
            pair.draft,
            max_seq_len=self.max_seq_len,
            options=_board_options(pair.options, isinstance(pair.draft, OpenedHead), pair.pool),
            announce=announce,
            progress=progress,
        )
        self.target, self.draft = self.board.target, self.board.draft

    # ---------------------------------------------------------------------------------------------------- writing
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
        for checkpoint in self._mapped:
            checkpoint.check_in_place()
        drafting = self._drafting_for(speculate)
        text = TextStream(self.tokenizer.detokenizer() if self.tokenizer else None, checked_stops(stop))
        request = Request(
            ids,
            sampling or SamplingParams(),
            max_new_tokens,
            frozenset(self.stop_ids if stop_ids is None else stop_ids),
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
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise UserError(
                f"a list of {len(sampling)} sampling parameters for one prompt: give one, or several prompts"
            )
        return self._complete(cast("Prompt", prompt), sampling, **options)

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
        if not isinstance(prompt, str) and (len(prompt) == 0 or not isinstance(prompt[0], Mapping)):
            return [int(id) for id in cast("Sequence[int]", prompt)]
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

    def close(self) -> None:
        """Give the device back. A second call does nothing."""
        self._closed = True
        if self.board:
            self.board.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _complete(self, prompt: Prompt, sampling: SamplingParams | None, **options: Any) -> Completion:
        stats = options.pop("stats", None)
        asked = self.request(prompt, sampling, **options)
        self.stats = GenerationStats() if stats is None else stats
        return self._write([asked], [self.stats])[0]

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
            return self._write(asked, all_stats)
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
            raise _with_completions(raised, written)
        return written

    def _write(
        self, asked: Sequence[tuple[Request, TextStream]], all_stats: Sequence[GenerationStats]
    ) -> list[Completion]:
        """Whole texts. What is raised has the attribute `completions`."""
        sequences = [self.engine.add(request, stats) for (request, _), stats in zip(asked, all_stats, strict=True)]
        left = set(sequences)
        raised: BaseException | None = None
        try:
            while left:
                left.difference_update(each for each, _ in self.engine.step(left) if each.finished)
        except BaseException as error:  # no text's own: an interruption, or a slot that there is not
            raised = error
        for sequence in left:
            self.engine.abort(sequence)
        for sequence in sequences:
            if isinstance(sequence.error, NotFinite):  # all slots of these texts are free by now
                sequence.error = self._explained(sequence.error, sequence.request.prompt, sequence.slot)
            raised = raised or sequence.error
        written = [
            Completion(
                text.finish(),
                each.tokens[len(each.request.prompt) :],
                each.stats.finish_reason,
                each.stats,
                in_words(each.error) if each.error else "",
            )
            for each, (_, text) in zip(sequences, asked, strict=True)
        ]
        if raised is not None:
            raise _with_completions(raised, written)
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

    # --------------------------------------------------------------------------------------------------- drafting
    def drafting(
        self,
        drafter: str | None = None,
        num_draft_tokens: int | str | None = None,
        verification: str | None = None,
        *,
        lost: Callable[[Exception], None] | None = None,
    ) -> Drafting:
        """A configuration of who drafts how much, with the models that are loaded.

        Where the drafter raises, or proposes what cannot be verified, that text goes on plainly:
        `GenerationStats.drafting_failure` says why.

        Args:
            drafter: a name in `drafters.registry`; default: the loaded options'.
            num_draft_tokens: tokens drafted a round, or "auto"; default: the loaded options'.
            verification: "batched" or "sequential"; default: the loaded options'.
            lost: told what was raised, once for each text that loses its drafter; default: a warning in the log, and a
                UserError of a drafter that cannot draft for a text at all ends that text.

        Raises:
            UserError: a drafter that there is not, or that needs a model that is not loaded.
        """
        options = self.options
        name = drafter or options.drafter
        length = options.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
        if name == NONE or length == 0 or not options.speculative:
            return Drafting(name, 0, None, FixedDraftLength(0))
        spec = spec_of(name)
        if spec.needs_draft_model and self.draft is None:
            raise UserError(f"drafter {name!r} needs a draft model, and none is loaded: load one with draft=...")
        if spec.needs_head and self.head is None:
            raise UserError(
                f"drafter {name!r} needs a draft head, and a draft model is loaded: load one with draft=..."
            )
        if name == "model" and self.head is not None:
            raise UserError("drafter 'model' needs a draft model, and a head is loaded: draft with 'head'")
        how = verification or options.verification
        refusals = (UserError,) if lost is None else ()
        guarded = Degrading(self._drafter(spec), lost or partial(warn_of, name), refusals)
        return Drafting(name, length, guarded, self.controller(length), how)

    def controller(self, num_draft_tokens: int | str) -> Controller:
        """Of a fixed draft length, or one that chooses ("auto") and learns in every text that it is used for."""
        if num_draft_tokens != AUTO:
            return FixedDraftLength(int(num_draft_tokens))
        if self.board:
            return AutoDraftLength(self.board.lengths, CostModel(self.board.computed_rows))
        return AutoDraftLength(range(self.options.longest_draft + 1), CostModel(self.target.model.computed_rows))

    def measure_costs(self, controller: AutoDraftLength, *, greedy: bool = True) -> None:
        """What forwards of one, some and all rows cost, for a controller to begin with; it interpolates."""
        longest = min(self.options.verify_rows, self.max_seq_len)
        if self.board:  # where other programs than plain decoding's are met, they are timed as they come
            longest = 1
        rows = {n for n in (1, 2, 4, 7, 11) if n < longest} | {longest}
        controller.costs.measure(self.target.model, rows, greedy=greedy)
        if self.target.model.limits.slots > 1 and not self.board:
            controller.costs.measure_together(self.target.model, greedy=greedy)

    @property
    def head(self) -> DraftHead | None:
        """The draft head, where the draft is one."""
        model = self.draft.model if self.draft else None
        return model if isinstance(model, DraftHead) else None

    def warm_up(self, prompt: Sequence[int]) -> None:
        """Read a prompt with all models, so that kernels for its length are prepared. Overwrites the first slot."""
        for model in (self.target.model, self.draft.model if self.draft else None):
            if model is None or len(prompt) > model.max_seq_len:
                continue
            if isinstance(model, DraftHead):
                model.warm_up(prompt)
            else:
                model.prefill(prompt)

    @property
    def exit_layer(self) -> int | None:
        """Layers that early exit drafts with; None before they are chosen."""
        if self.exit:
            return self.exit.exit_layer
        layer = self.options.exit_layer
        return layer if isinstance(layer, int) else None

    def choose_exit(self, prompt: Sequence[int]) -> None:
        """Choose the layers of early exit by what the target itself writes after a prompt.

        Raises UserError for a prompt that leaves no room, and while another text is under way, whose cache it needs.
        """
        from models.speculative.drafters.early_exit import choose_exit
        from models.speculative.generate import generate

        if self.engine.running:
            raise OptionError(
                f"[exit_layer] {AUTO} is chosen while no other text is under way: finish those, or give a number"
            )
        began = time.perf_counter()
        model, options = self.target.model, self.options
        check_exit_choice(self.max_seq_len, prompt)
        room = self.max_seq_len - len(prompt)
        written = generate(model, None, prompt, max_new_tokens=min(EXIT_TOKENS, room))
        tokens = [*prompt, *(token.id for token in written)]
        longest = max(1, min(options.longest_draft, self.max_seq_len - 1))
        self.exit = choose_exit(model, tokens, len(prompt), range(1 if options.auto else longest, longest + 1))
        self.exit_s = time.perf_counter() - began

    @property
    def fused(self) -> bool:
        """Whether draft and verification are one program on the board, so that they have no times of their own."""
        return self.board is not None and self.board.fused is not None

    def _drafting_for(self, speculate: bool | Drafting) -> Drafting:
        if isinstance(speculate, Drafting):
            return speculate
        if not speculate:
            return Drafting(NONE, 0, None, None)
        if self._default is None:
            self._default = self.drafting()
        return self._default

    def _drafter(self, spec: DrafterSpec) -> Drafter:
        def parts(sequence) -> Parts:
            request, board = sequence.request, self.board
            one_program = request.sampling.greedy and request.verification == "batched" and request.reader is None
            return Parts(
                target=self.target.model,
                draft=self.draft.model if self.draft else None,
                sampling=request.sampling,
                slot=sequence.slot,
                rounds=board.fused if board and one_program else None,
                confident=board is None,  # on a board probabilities would have to leave the device, step by step
                settings={
                    "tree_nodes": self.options.tree_nodes,
                    "exit_layer": self.exit_layer,
                    "force_acceptance": self.options.force_acceptance,
                    "recorded": self._recorded.get(tuple(request.prompt), []),
                    "prompt_tokens": len(request.prompt),
                },
            )

        if spec.drafter:
            return spec.drafter(parts)
        if self.draft is None or not spec.needs_draft_model:
            return PerSequence(lambda sequence: spec.make(parts(sequence)))
        taps = self.head.taps if self.head else ()
        return InStep(lambda sequence: spec.make(parts(sequence)), self.draft.model, taps)

    def _prepare(self, drafting: Drafting, request: Request) -> None:
        """What has to be known before a text begins: programs, the exit layer, costs."""
        if self.board:
            self.board.prepare_prompt(len(request.prompt), request.max_new_tokens)
        if drafting.drafter is None:
            return
        if "exit_layer" in spec_of(drafting.name).settings and self.exit_layer is None:
            self.choose_exit(request.prompt)
        if drafting.name == FORCED:
            self._record(request)
        controller = drafting.controller
        # Measuring overwrites the first slot's cache: while a text is under way its own rounds tell what they cost.
        if isinstance(controller, AutoDraftLength) and not controller.costs.known("verify") and not self.engine.running:
            self.measure_costs(controller, greedy=request.sampling.greedy)

    def _record(self, request: Request) -> None:
        """Write plainly what a forced draft is to repeat, if it is not known yet."""
        known = self._recorded.get(tuple(request.prompt), [])
        if len(known) < min(request.max_new_tokens, self.max_seq_len - len(request.prompt)):
            plain = Request(request.prompt, max_new_tokens=request.max_new_tokens)
            tokens = stream(self.engine, self.engine.add(plain))
            self._recorded[tuple(request.prompt)] = [token.id for token in tokens]

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this LLM is closed: load it again")


def _with_completions(error: BaseException, written: list[Completion]) -> BaseException:
    error.completions = written  # type: ignore[attr-defined]
    return error


def warn_of(drafter: str, error: Exception) -> None:
    """Log that a drafter has failed in a text."""
    logger.warning(f"the drafter {drafter!r} failed, and this text goes on without it: {in_words(error)}")


def check_exit_choice(max_seq_len: int, prompt: Sequence[int]) -> None:
    """Raise UserError where the layers of early exit cannot be chosen by what follows a prompt."""
    if max_seq_len - len(prompt) < 2:
        raise OptionError(
            f"[exit_layer] {AUTO} has to see the target write two tokens after prompt 1, which leaves room for one: "
            "shorten it, raise [max_seq_len] or give a number of layers"
        )


def _board_options(options: ResolvedOptions, of_head: bool, pool: int | None) -> BoardOptions:
    """How a board has to be prepared for what will run on it, the draft being a head or not."""
    from models.ttnn_llama.programs.options import DRAFT_LENGTHS, BoardOptions

    lengths: tuple[int, ...] = ()
    workload = options.spec.workload if options.spec else Workload()
    if of_head and workload.drafts_with == "draft":
        workload = replace(workload, drafts_with="head")
    if options.spec:
        lengths = DRAFT_LENGTHS if options.auto else (int(options.num_draft_tokens),)
    return BoardOptions(
        precision=options.precision,
        draft_precision=options.draft_precision,
        placement=options.draft_placement,
        attention_cores=options.attention_cores,
        prefill=options.prefill,
        trace=options.trace,
        weight_cache=options.weight_cache,
        workload=workload,
        exit_layer=options.exit_layer if isinstance(options.exit_layer, int) else None,
        tree_nodes=options.tree_nodes,
        draft_lengths=lengths,
        greedy=options.greedy,
        batched=options.verification == "batched",
        slots=options.slots,
        pool=pool,
    )
