"""The models and prompts of one demo run, and the runs over them."""

import random
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from loguru import logger

from demo.arguments import AUTO
from demo.drafting import DRAFTING
from demo.progress import loading_bar, show_memory
from demo.runs import Prompt, Row, Run, Viewer
from demo.settings import EMBEDDED_DRAFT, Settings, describe_source
from models.board_mock import cluster
from models.errors import UserError
from models.llama.tokenizer import LlamaTokenizer
from models.loading import (
    LoadedModel,
    OpenedModel,
    check_opened_pair,
    default_context,
    estimate_bytes,
    load_model,
    open_model,
)
from models.speculative.control.costs import Costs
from models.speculative.control.policy import AutoDraftLength, Controller, FixedDraftLength
from models.speculative.drafters import Drafter
from models.speculative.drafters.early_exit import ExitChoice, choose_exit
from models.speculative.generate import Token, generate
from models.speculative.sampling import SamplingParams
from models.torch_llama.first_layers import check_exit_layer

if TYPE_CHECKING:
    from models.ttnn_llama.board_models import BoardModels

EXIT_TOKENS = 64  # that the target writes for the choice of an exit layer


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
        self.exit: ExitChoice | None = None  # of early exit, where its layers were chosen by measurement
        self.exit_s = 0.0  # that the choice took
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
        if settings.drafts and settings.drafter == "early-exit":
            self._check_exit(target.checkpoint.config.num_hidden_layers)
        self.board: BoardModels | None = None
        self.warm_up_s: float | None = None  # compiling and capturing on a board
        if settings.device == "tt":
            self._load_on_board(target, draft)
        else:
            verify_rows = settings.verify_rows
            self.target = self._load(
                "target", target, settings.dtype, fixed_rows=settings.fixed_rows, typical_rows=verify_rows
            )
            self.draft = self._load("draft", draft, settings.draft_dtype) if draft else None
        self.controller = self.make_controller(settings.num_draft_tokens)
        self.stop_ids = () if settings.random_prompts else target.checkpoint.config.eos_token_ids

    # -------------------------------------------------------------------------------------------------- loading
    def _open_draft(self, target: OpenedModel) -> OpenedModel:
        draft = open_model(self.settings.draft or str(EMBEDDED_DRAFT))
        try:
            check_opened_pair(target, draft)
        except UserError as error:
            if self.settings.draft:
                raise
            raise UserError(
                f"the embedded draft does not fit target {self.settings.target} ({error}): give --draft with a small "
                "checkpoint of the target's family, or --drafter prompt-lookup, or --mode baseline"
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
        from models.ttnn_llama.board_models import BoardModels
        from models.ttnn_llama.programs.options import DRAFT_LENGTHS, BoardOptions

        settings = self.settings
        options = BoardOptions(
            precision=settings.precision,
            draft_precision=settings.draft_precision,
            placement=settings.draft_placement,
            trace=settings.trace,
            weight_cache=settings.weight_cache,
            drafter=settings.drafter if settings.drafts else "none",
            exit_layer=None if settings.exit_layer == AUTO else settings.exit_layer,
            tree_nodes=settings.tree_nodes,
            draft_lengths=DRAFT_LENGTHS if settings.auto else (settings.num_draft_tokens,),
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

    @property
    def exit_layer(self) -> int | None:
        """Layers that early exit drafts with; None before they are chosen."""
        if self.exit:
            return self.exit.exit_layer
        return None if self.settings.exit_layer == AUTO else self.settings.exit_layer

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

    def _check_exit(self, layers: int) -> None:
        if layers == 1:
            raise UserError("--drafter early-exit cannot leave a target of one layer early: use another drafter")
        if self.settings.exit_layer != AUTO:
            check_exit_layer(self.settings.exit_layer, layers)
        elif self.max_seq_len - len(self.prompts[0].ids) < 2:
            raise UserError(
                f"--exit-layer {AUTO} has to see the target write two tokens after prompt 1, which leaves room for "
                "one: shorten it, raise --max-seq-len or give a number of layers"
            )

    # -------------------------------------------------------------------------------------------------- running
    @torch.inference_mode()
    def run(self, viewer: Viewer) -> None:
        """Warm up, then run every prompt on every path. What is complete is in ``rows``, also after an interruption."""
        paths = self.settings.paths
        if self.settings.drafts:
            if self.settings.drafter == "early-exit" and self.exit_layer is None:
                self.choose_exit()
            if self.settings.auto:
                self.measure_costs(self.controller)
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

    def measure_costs(self, controller: AutoDraftLength) -> None:
        """What forwards of one, some and all rows cost, for a controller to begin with; it interpolates."""
        longest = min(self.settings.verify_rows, self.max_seq_len)
        if self.board:  # where other programs than plain decoding's are met, they are timed as they come
            longest = 1
        rows = {n for n in (1, 2, 4, 7, 11) if n < longest} | {longest}
        controller.costs.measure(self.target.model, rows, greedy=self.sampling.greedy)

    def choose_exit(self) -> None:
        """How many layers draft best, by what the target itself writes after the first prompt."""
        began = time.perf_counter()
        model, prompt = self.target.model, self.prompts[0].ids
        written = generate(model, None, prompt, max_new_tokens=min(EXIT_TOKENS, self.max_seq_len - len(prompt)))
        tokens = prompt + [token.id for token in written]
        longest = max(1, min(self.settings.longest_draft, self.max_seq_len - 1))
        self.exit = choose_exit(model, tokens, len(prompt), range(1 if self.settings.auto else longest, longest + 1))
        self.exit_s = time.perf_counter() - began
        chosen = self.exit
        expected = "" if self.mock else f"{chosen.speed_up:.2f}x expected with {chosen.draft_length} draft tokens, "
        logger.info(
            f"early exit after layer {chosen.exit_layer} of {model.config.num_hidden_layers}: {expected}chosen by "
            f"{chosen.measured_tokens} tokens that the target wrote after prompt 1"
        )

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
            self.make_drafter(self.settings.drafter) if speculative else None,
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

    def make_controller(self, num_draft_tokens: int | str) -> Controller:
        """Of a fixed draft length, or one that chooses (AUTO) and learns in every generation that it is used for."""
        if num_draft_tokens != AUTO:
            return FixedDraftLength(num_draft_tokens)
        if self.board:
            return AutoDraftLength(self.board.lengths, Costs(self.board.computed_rows))
        fixed_rows = self.settings.fixed_rows or 0
        return AutoDraftLength(range(self.settings.longest_draft + 1), Costs(lambda n: max(n, fixed_rows)))

    def make_drafter(self, kind: str) -> Drafter | None:
        """What drafts in one generation, as --drafter names it; None if nothing is to."""
        return DRAFTING[kind](self)

    def top_two_margin(self, ids: list[int]) -> float:
        """How far the target's best next token is ahead of its second after ``ids``, in logits."""
        best, second = self.target.model.prefill(ids).float().topk(2).values.tolist()
        return best - second
