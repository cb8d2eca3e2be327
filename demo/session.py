"""The models and prompts of one demo run, and the runs over them."""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from loguru import logger

from demo.runs import Row, Run, Viewer
from demo.settings import Settings
from models.boards import SILICON, medium
from models.cache_size import form_of
from models.cli import interrupts
from models.cli.console import loading_bar, show_memory
from models.cli.prompts import default_prompts, encode_prompts, is_instruct
from models.drafting import check_exit_choice
from models.llama.tokenizer import LlamaTokenizer
from models.llm import LLM
from models.loading import OpenedDraft, OpenedPair, estimate_bytes, open_pair
from models.options import AUTO, describe_source
from models.speculative.control.policy import AutoDraftLength
from models.torch_llama.working_set import Form

PROMPTS = Path(__file__).resolve().parent / "prompts"


class Session:
    """Loads what `settings` ask for; `run` then fills `rows`. texts: of the prompts; None: default ones that suit.

    `under_way` are the runs of a prompt that is not complete, so that an interruption can show them. `controller` is
    one for all runs, warm-up included: what it learns stays.
    """

    def __init__(self, settings: Settings, texts: list[str] | None = None):
        self.sampling = settings.sampling
        self.rows: list[Row] = []
        self.under_way: list[Run] = []
        pair = open_pair(settings.engine)
        self.settings = settings = settings.resolved_as(pair.options)
        self.max_seq_len = pair.max_seq_len
        self.tokenizer: LlamaTokenizer | None = pair.target.tokenizer
        self.instruct = is_instruct(settings, pair)
        if texts is None:
            texts = default_prompts(settings, pair, PROMPTS)
        self.prompts = encode_prompts(settings, texts, pair)
        if settings.drafter_settings.get("exit_layer") == AUTO and settings.num_draft_tokens != 0:
            check_exit_choice(pair.max_seq_len, self.prompts[0].ids)
        if pair.note:
            logger.info(pair.note)
        self.warm_up_s: float | None = None  # compiling and capturing on a board
        self.first_token_at: float | None = None  # by perf_counter, of the first token that is shown
        if settings.device == "tt":
            self._load_on_board(pair)
        else:
            for role, opened, dtype, length in (
                ("target", pair.target, settings.dtype, pair.max_seq_len),
                ("draft", pair.draft, settings.draft_dtype, pair.draft_seq_len),
            ):
                if opened:
                    self._announce(role, opened, dtype, length, form_of(pair.options))
            self.llm = LLM(pair)
            self.settings = settings.resolved_as(self.llm.options)  # it may have found that rows are not alike
        self.target, self.draft, self.board = self.llm.target, self.llm.draft, self.llm.board
        self.drafting = self.llm.drafting()
        self.controller = self.drafting.controller
        self.stop_ids = () if settings.random_prompts else self.llm.stop_ids

    # -------------------------------------------------------------------------------------------------- loading
    def _announce(self, role: str, opened: OpenedDraft, dtype: str, length: int, form: Form) -> None:
        needed = estimate_bytes(opened, dtype, length, form)
        logger.info(
            f"loading {role} {describe_source(opened.source)} for {length} tokens: {needed} ({dtype}, "
            f"{self.settings.device})"
        )

    def _load_on_board(self, pair: OpenedPair) -> None:
        quiet = self.settings.quiet
        with loading_bar(quiet, timed=medium() == SILICON) as progress:
            self.llm = LLM(pair, announce=None if quiet else show_memory, progress=progress)
        board = self.llm.board
        logger.info("compiling programs and capturing traces" if board.trace else "compiling programs")
        self.warm_up_s = board.warm_up(len(prompt.ids) for prompt in self.prompts)

    @property
    def timed(self) -> bool:
        """Whether times say something: not on a mock or a simulator of a board."""
        return self.board is None or self.board.timed

    @property
    def fused(self) -> bool:
        """Whether draft and verification are one program on the board, so that they have no times of their own."""
        return self.llm.fused

    @property
    def calibration(self):
        """What padding rows costs on this machine; None where it was not asked, or no time says anything."""
        return self.llm.calibration if self.timed else None

    @property
    def exit(self):
        """Of early exit, how its layers were chosen, where that was by measurement."""
        return self.llm.exit

    @property
    def exit_layer(self) -> int | None:
        """Layers that early exit drafts with; None before they are chosen."""
        return self.llm.exit_layer

    def close(self) -> None:
        """Give the board back, if there is one."""
        self.llm.close()

    # -------------------------------------------------------------------------------------------------- running
    @torch.inference_mode()
    def run(self, viewer: Viewer) -> None:
        """Warm up, then run every prompt on every path. What is complete is in `rows`, also after an interruption."""
        paths = self.settings.paths
        if self.drafting.drafter is not None and "speculative" in paths:
            self._prepare()
        self._run_paths(viewer, {path: Run(path, self.prompts[0], counted=False) for path in paths}, paths)
        warm_lengths = {len(self.prompts[0].ids)}
        for prompt in self.prompts:
            interrupts.check()
            if not self.board and len(prompt.ids) not in warm_lengths:
                # The first prefill of a new length prepares kernels for it; that belongs to neither path. A board has
                # seen all lengths while it warmed up.
                self.llm.warm_up(prompt.ids)
                warm_lengths.add(len(prompt.ids))
            viewer.begin_prompt(prompt)
            runs = {path: Run(path, prompt) for path in paths}
            self._run_paths(viewer, runs, paths if prompt.number % 2 else paths[::-1])
            self.rows.append(Row(prompt, runs))
            viewer.end_prompt(self.rows[-1])

    def _prepare(self) -> None:
        """What is measured once: the layers of early exit, what forwards cost."""
        llm = self.llm
        if "exit_layer" in self.settings.drafter_settings and llm.exit_layer is None:
            llm.choose_exit(self.prompts[0].ids)
            chosen = llm.exit
            basis = f"chosen by {chosen.measured_tokens} tokens that the target wrote after prompt 1"
            if self.timed:
                speed_up = f"{chosen.speed_up:.2f}x expected with {chosen.draft_length} draft tokens"
                basis = f"{speed_up}, {basis}"
            layers = self.target.model.config.num_hidden_layers
            logger.info(f"early exit after layer {chosen.exit_layer} of {layers}: {basis}")
        if isinstance(self.controller, AutoDraftLength):
            llm.measure_costs(self.controller, greedy=self.sampling.greedy)

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
        stream = self.llm.stream(
            run.prompt.ids,
            self.sampling,
            max_new_tokens=self.settings.max_new_tokens,
            stop_ids=self.stop_ids,
            speculate=self.drafting if run.path == "speculative" else False,
            stats=run.stats,
        )
        with closing(stream):  # an interruption here ends the engine's book-keeping too
            for piece in stream:
                run.tokens.append(piece.id)
                if piece.text:
                    run.pieces.append((piece.text, piece.origin))
                viewer.token(run)
                if self.first_token_at is None and run.counted:
                    self.first_token_at = time.perf_counter()
                interrupts.check()

    def top_two_margin(self, ids: list[int]) -> float:
        """How far the target's best next token is ahead of its second after `ids`, in logits."""
        best, second = self.target.model.prefill(ids).float().topk(2).values.tolist()
        return best - second
