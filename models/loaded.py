"""A pair of models on its device, with the engine that writes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from loguru import logger

from models.errors import UserError
from models.llama.checkpoint import StoredTensors
from models.loading import LoadedHead, LoadedModel, OpenedHead, OpenedPair, load_draft, load_model
from models.options import ResolvedOptions
from models.speculative.engine import Engine
from models.speculative.model import DraftHead, Workload
from models.speculative.scheduler import PROMPT_ROWS

if TYPE_CHECKING:
    from models.llama.tokenizer import LlamaTokenizer
    from models.ttnn_llama.board_models import BoardModels
    from models.ttnn_llama.programs.options import BoardOptions


class LoadedPair:
    """A target, its draft model if there is one, their device, and an engine.

    Attributes:
        options: what was asked for, with every default filled in.
        tokenizer: the target's; None where its checkpoint has none: prompts are then token ids.
        target, draft: loaded models; draft is a draft model, a draft head, or None where neither is used.
        board: the board they are on, or None.
        stop_ids: tokens that end a text by default: the target's own.
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
        self.target: LoadedModel
        self.draft: LoadedModel | LoadedHead | None = None
        self.board: BoardModels | None = None
        self._closed = False
        self._mapped: list[StoredTensors] = []  # checkpoints whose files may back weights
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
    def fused(self) -> bool:
        """Whether draft and verification are one program on the board, so that they have no times of their own."""
        return self.board is not None and self.board.fused is not None

    def close(self) -> None:
        """Give the device back. A second call does nothing."""
        self._closed = True
        if self.board:
            self.board.close()

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this LLM is closed: load it again")


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
