"""The models and prompts of one demo run, and the runs over them."""

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from loguru import logger

from demo.arguments import AUTO_LONGEST, EMBEDDED_DRAFT, Settings, describe_source
from demo.progress import loading_bar, show_memory
from models.errors import UserError
from models.llama.loading import (
    LoadedModel,
    OpenedModel,
    check_opened_pair,
    default_context,
    estimate_bytes,
    load_model,
    open_model,
)
from models.llama.tokenizer import LlamaTokenizer
from models.speculative.controller import AutoDraftLength, FixedDraftLength
from models.speculative.drafters import Drafter
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.fused import FusedDrafter
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.generate import Token, generate
from models.speculative.sampling import SamplingParams
from models.speculative.stats import GenerationStats
from models.ttnn_mock import cluster

if TYPE_CHECKING:
    from models.llama.ttnn_llama.pair import BoardModels


@dataclass
class Prompt:
    """One prompt: its place from 1, what the user sees, and what the models get."""

    number: int
    text: str
    ids: list[int]


@dataclass
class Run:
    """One generation on one path ("baseline" or "speculative"), growing while it runs."""

    path: str
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)  # text and where it came from (Token.origin)
    stats: GenerationStats = field(default_factory=GenerationStats)
    counted: bool = True  # False for the warm-up

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass
class Row:
    """One prompt's complete runs, by path."""

    prompt: Prompt
    runs: dict[str, Run]

    @property
    def identical(self) -> bool:
        """Whether all paths wrote the same tokens."""
        first, *others = self.runs.values()
        return all(first.tokens == other.tokens for other in others)


class Viewer(Protocol):
    """What the session tells while it runs. Time spent here is not measured."""

    def begin_prompt(self, prompt: Prompt) -> None: ...
    def begin_run(self, run: Run) -> None: ...
    def token(self, run: Run) -> None: ...
    def end_run(self, run: Run) -> None: ...
    def end_prompt(self, row: Row) -> None: ...


class Session:
    """Loads what ``settings`` ask for; `run` then fills ``rows``.

    ``under_way`` are the runs of a prompt that is not complete, so that an interruption can show them. ``draft`` is
    None where no draft model is used. ``controller`` is one for all runs, warm-up included: what it learns stays.
    """

    def __init__(self, settings: Settings, texts: list[str]):
        self.settings = settings
        self.sampling = SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.seed)
        self.rows: list[Row] = []
        self.under_way: list[Run] = []
        self.controller = (
            AutoDraftLength(range(AUTO_LONGEST + 1)) if settings.auto else FixedDraftLength(settings.num_draft_tokens)
        )
        if settings.threads:
            torch.set_num_threads(settings.threads)
        target = open_model(settings.target)
        draft = self._open_draft(target) if settings.uses_draft_model else None
        self.max_seq_len = settings.max_seq_len or default_context(*filter(None, (target, draft)))
        for opened in filter(None, (target, draft)):
            longest = opened.checkpoint.config.max_position_embeddings
            if self.max_seq_len > longest:
                raise UserError(
                    f"--max-seq-len {self.max_seq_len} is longer than the context of {describe_source(opened.source)}, "
                    f"{longest} tokens: lower it"
                )
        self.tokenizer: LlamaTokenizer | None = target.tokenizer
        self.prompts = self._make_prompts(texts, target)
        self._check_lengths()
        self.board: BoardModels | None = None
        self.warm_up_s: float | None = None  # compiling and capturing on a board
        if settings.device == "tt":
            self._load_on_board(target, draft)
        else:
            verify_rows = settings.longest_draft + 1
            self.target = self._load(
                "target", target, settings.dtype, fixed_rows=settings.fixed_rows, typical_rows=verify_rows
            )
            self.draft = self._load("draft", draft, settings.draft_dtype) if draft else None
        self.stop_ids = () if settings.random_prompts else target.checkpoint.config.eos_token_ids

    # -------------------------------------------------------------------------------------------------- loading
    def _open_draft(self, target: OpenedModel) -> OpenedModel:
        draft = open_model(self.settings.draft or str(EMBEDDED_DRAFT))
        try:
            check_opened_pair(target, draft)
        except UserError as error:
            if self.settings.draft:
                raise
            others = (
                "--mode baseline" if self.settings.device == "tt" else "--drafter prompt-lookup, or --mode baseline"
            )
            raise UserError(
                f"the embedded draft does not fit target {self.settings.target} ({error}): give --draft with a small "
                f"checkpoint of the target's family, or {others}"
            ) from error
        return draft

    def _load(self, role: str, opened: OpenedModel, dtype: str, **rows: int | None) -> LoadedModel:
        weights, kv = estimate_bytes(opened, dtype, self.max_seq_len)
        logger.info(
            f"loading {role} {describe_source(opened.source)}: {weights / 1e6:,.0f} MB of weights, {kv / 1e6:,.0f} MB "
            f"of KV cache for {self.max_seq_len} tokens ({dtype}, {self.settings.device})"
        )
        return load_model(opened, device=self.settings.device, dtype=dtype, max_seq_len=self.max_seq_len, **rows)

    def _load_on_board(self, target: OpenedModel, draft: OpenedModel | None) -> None:
        from models.llama.ttnn_llama.pair import BoardModels, BoardOptions

        settings = self.settings
        options = BoardOptions(
            precision=settings.precision,
            draft_precision=settings.draft_precision,
            placement=settings.draft_placement,
            trace=settings.trace,
            weight_cache=settings.weight_cache,
            draft_length=settings.longest_draft,
            greedy=self.sampling.greedy,
            batched=settings.verification == "batched",
        )
        with loading_bar(settings.quiet, timed=not cluster.is_mock()) as progress:
            self.board = BoardModels(
                target,
                draft,
                max_seq_len=self.max_seq_len,
                options=options,
                announce=None if settings.quiet else show_memory,
                progress=progress,
            )
        self.target, self.draft = self.board.target, self.board.draft
        logger.info("compiling programs" + " and capturing traces" * self.board.trace)
        self.warm_up_s = self.board.warm_up(len(prompt.ids) for prompt in self.prompts)

    @property
    def mock(self) -> bool:
        """Whether the board is a mock one, where no time says anything."""
        return self.board is not None and self.board.mock

    @property
    def fused(self) -> bool:
        """Whether draft and verification are one program on the board, so that they have no times of their own."""
        return self.board is not None and self.board.fused is not None

    def close(self) -> None:
        """Give the board back, if there is one."""
        if self.board:
            self.board.close()

    def _make_prompts(self, texts: list[str], target: OpenedModel) -> list[Prompt]:
        if self.settings.random_prompts:
            count, length = self.settings.random_prompts
            draw = random.Random(self.settings.seed)
            vocab = target.checkpoint.config.vocab_size
            rows = [[draw.randrange(vocab) for _ in range(length)] for _ in range(count)][: self.settings.max_prompts]
            return [Prompt(i, f"({length} random token ids)", ids) for i, ids in enumerate(rows, 1)]
        if self.tokenizer is None:
            raise UserError(
                f"{describe_source(target.source)} has no tokenizer.json: add it, or run on token ids with "
                "--random-prompts 10x64"
            )
        encode = self.tokenizer.chat if self.settings.instruct else self.tokenizer.encode
        return [Prompt(i, text, encode(text)) for i, text in enumerate(texts, 1)]

    def _check_lengths(self) -> None:
        for prompt in self.prompts:
            if len(prompt.ids) >= self.max_seq_len:
                raise UserError(
                    f"prompt {prompt.number} has {len(prompt.ids)} tokens, the context is {self.max_seq_len}: "
                    "shorten it or raise --max-seq-len"
                )

    # -------------------------------------------------------------------------------------------------- running
    @torch.inference_mode()
    def run(self, viewer: Viewer) -> None:
        """Warm up, then run every prompt on every path. What is complete is in ``rows``, also after an interruption."""
        paths = self.settings.paths
        if self.settings.auto and self.settings.drafts:
            self._measure_costs()
        self._run_paths(viewer, {path: Run(path, self.prompts[0], counted=False) for path in paths}, paths)
        warm_lengths = {len(self.prompts[0].ids)}
        for prompt in self.prompts:
            if not self.board and len(prompt.ids) not in warm_lengths:
                # The first prefill of a new length prepares kernels for it; that belongs to neither path. A board has
                # seen all lengths while it warmed up.
                for loaded in filter(None, (self.target, self.draft)):
                    loaded.model.prefill(prompt.ids)
                warm_lengths.add(len(prompt.ids))
            viewer.begin_prompt(prompt)
            runs = {path: Run(path, prompt) for path in paths}
            self._run_paths(viewer, runs, paths if prompt.number % 2 else paths[::-1])
            self.rows.append(Row(prompt, runs))
            viewer.end_prompt(self.rows[-1])

    def _measure_costs(self) -> None:
        """What forwards of one, some and all rows cost, for the controller to begin with; it interpolates."""
        rows = {min(n, self.max_seq_len) for n in (1, AUTO_LONGEST // 2 + 1, AUTO_LONGEST + 1)}
        self.controller.costs.measure(self.target.model, rows, greedy=self.sampling.greedy)

    def _run_paths(self, viewer: Viewer, runs: dict[str, Run], order: Sequence[str]) -> None:
        for path in order:
            self.under_way.append(runs[path])
            viewer.begin_run(runs[path])
            if self.board:
                self.board.select(path)
            self._generate(runs[path], viewer)
            viewer.end_run(runs[path])
        self.under_way = []

    def _generate(self, run: Run, viewer: Viewer) -> None:
        speculative = run.path == "speculative"
        detokenizer = self.tokenizer.detokenizer() if self.tokenizer else None
        stream = generate(
            self.target.model,
            self._drafter() if speculative else None,
            run.prompt.ids,
            sampling=self.sampling,
            controller=self.controller if speculative else None,
            max_new_tokens=self.settings.max_new_tokens,
            stop_ids=self.stop_ids,
            verification=self.settings.verification,
            stats=run.stats,
        )
        token: Token | None = None
        with closing(stream):  # an interruption here ends the generator's book-keeping too
            for token in stream:
                run.tokens.append(token.id)
                text = detokenizer.push(token.id) if detokenizer else f" {token.id}"
                if text:
                    run.pieces.append((text, token.origin))
                viewer.token(run)
        if detokenizer and token and (rest := detokenizer.flush()):
            run.pieces.append((rest, token.origin))

    def _drafter(self) -> Drafter | None:
        """What drafts in one generation; None if nothing is to."""
        kind = self.settings.drafter
        if kind == "none":
            return None
        if kind == "prompt-lookup":
            return PromptLookup()
        if self.fused:
            return FusedDrafter(self.board.fused, self.draft.model)
        model = ModelDrafter(self.draft.model, self.sampling)
        return Combined(PromptLookup(), model) if kind == "combined" else model

    def top_two_margin(self, ids: list[int]) -> float:
        """How far the target's best next token is ahead of its second after ``ids``, in logits."""
        best, second = self.target.model.prefill(ids).float().topk(2).values.tolist()
        return best - second
