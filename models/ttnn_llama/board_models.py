"""Target and draft on one board: opened, loaded, their programs prepared, and closed again."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from loguru import logger

from models.boards import Board
from models.errors import UserError
from models.llama.config import check_exit_layer
from models.loading import LoadedHead, LoadedModel, OpenedDraft, OpenedHead, OpenedModel
from models.ttnn_llama.batch_model import BatchLlama
from models.ttnn_llama.device.mesh import detect_board, errors_passed_on, open_mesh, target_chips
from models.ttnn_llama.device.runner import Runner
from models.ttnn_llama.draft_head import TtnnHead
from models.ttnn_llama.model import BoardLlama, TtnnLlama
from models.ttnn_llama.modules.decoder import Decoder
from models.ttnn_llama.programs.fused import FusedRound
from models.ttnn_llama.programs.head_round import HeadRound
from models.ttnn_llama.programs.needed import KEPT, TREE, Program, programs, reads_late, trace_bytes, usable_lengths
from models.ttnn_llama.programs.options import BoardOptions
from models.ttnn_llama.shapes import KV_BLOCK, MAX_ROWS, padded_prompt, padded_rows
from models.ttnn_llama.weights.head_tensors import HeadTensors, head_specs
from models.ttnn_llama.weights.memory import MemoryPlan, check_fit, plan
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import CheckpointSource
from models.ttnn_llama.weights.weight_cache import default_cache_dir

Progress = Callable[[str, int, int, str], None]  # role, tensors done, tensors in all, name


def memory_plans(
    board: Board, target: OpenedModel, draft: OpenedDraft | None, max_seq_len: int, options: BoardOptions
) -> dict[str, MemoryPlan]:
    """What "target" and "draft" take of each chip. Traces count with the target, and on a chip of its own with the
    draft too: every chip reserves the same for them. Raises UserError if the chips cannot share a model, or for an
    exit layer that the target has not."""
    if options.exits is not None:
        check_exit_layer(options.exits, target.checkpoint.config.num_hidden_layers)
    own_chip = _on_own_chip(draft, options)
    chips = {"target": target_chips(board, own_chip_for_draft=own_chip)} | ({"draft": 1} if own_chip else {})
    reserved = _trace_bytes(target, draft, options, chips) if options.trace else 0
    plans = {
        "target": plan(
            target.checkpoint.config,
            precision_named(options.precision),
            chips["target"],
            max_seq_len,
            reserved,
            dram_banks=board.dram_banks,
            slots=options.slots,
            pool=options.pool,
        )
    }
    if draft:
        plans["draft"] = plan(
            draft.checkpoint.config,
            precision_named(options.draft_precision),
            1 if own_chip else board.chips,
            max_seq_len,
            reserved if own_chip else 0,
            dram_banks=board.dram_banks,
            slots=options.slots,
        )
    return plans


def _on_own_chip(draft: OpenedDraft | None, options: BoardOptions) -> bool:
    return draft is not None and options.placement == "own-chip"


def _lengths(draft: OpenedDraft | None, options: BoardOptions, chips: int, shared: bool) -> list[int]:
    """The draft lengths to prepare; none without the model that would draft."""
    lacking = options.workload.drafts_with in ("draft", "head") and draft is None
    return [] if lacking else usable_lengths(options, chips, shared)


def _trace_bytes(target: OpenedModel, draft: OpenedDraft | None, options: BoardOptions, chips: dict[str, int]) -> int:
    shared = len(chips) == 1
    needed = programs(options, _lengths(draft, options, chips["target"], shared), shared)
    layers = target.checkpoint.config.num_hidden_layers
    drafting = draft.checkpoint.config.num_hidden_layers if draft else options.exit_layer or 0
    return trace_bytes(needed, layers, drafting, chips, options.slots)


class BoardModels:
    """A target and, if there is one, its draft model or head on the board of this machine (or on the active mock).

    Nothing is opened before the memory is known to suffice; ``announce`` is told what is needed before that is
    decided. Close it when done; an error or Ctrl-C while loading or warming up closes the board too.

    Attributes:
        target, draft: `LoadedModel`s, of a head a `LoadedHead`; ``draft`` is None if there is none.
        drafting: what drafts: the draft's model, the head, for early exit the target's first layers, or None.
        fused: greedy rounds as one program, or None: sampling, sequential verification, a draft on its own chip, trees.
        lengths: what a controller may choose from, in rising order from 0: what programs are prepared for.
        board: which board it is.
        plans: memory per chip of "target" and "draft".
        trace: whether programs are replayed as traces.

    Raises:
        UserError: what `mesh.open_mesh`, `memory.check_fit` and the weights raise.
    """

    def __init__(
        self,
        target: OpenedModel,
        draft: OpenedDraft | None,
        *,
        max_seq_len: int,
        options: BoardOptions,
        announce: Callable[[Board, dict[str, MemoryPlan]], None] | None = None,
        progress: Progress | None = None,
    ):
        self.options = options
        self._warm: set[int] = set()  # padded lengths of prompts, and of texts that a draft reads, that are compiled
        self.max_seq_len = max_seq_len
        self.board = detect_board()
        self.plans = memory_plans(self.board, target, draft, max_seq_len, options)
        if announce:
            announce(self.board, self.plans)
        check_fit(self.board, self.plans, options.placement if draft else "shared")
        self.trace = options.trace and self.board.traces
        with contextlib.ExitStack() as stack:
            meshes = stack.enter_context(
                open_mesh(
                    self.board,
                    trace_region_bytes=self.plans["target"].traces if self.trace else 0,
                    own_chip_for_draft=_on_own_chip(draft, options),
                )
            )
            shared = meshes.target is meshes.draft
            runner = Runner(meshes.target, trace=self.trace)
            draft_runner = runner if shared else Runner(meshes.draft, trace=self.trace)
            self._runners = [runner] if shared else [runner, draft_runner]
            for each in self._runners:
                stack.callback(each.release)
            self.target = self._load("target", target, options.precision, runner, progress)
            self.draft: LoadedModel[BoardLlama] | LoadedHead | None = None
            if isinstance(draft, OpenedHead):
                self.draft = self._load_head(draft, progress)
            elif draft:
                self.draft = self._load("draft", draft, options.draft_precision, draft_runner, progress)
            self.drafting: Decoder | TtnnHead | None = self._drafting_model()
            usable = replace(options, trace=self.trace)
            lengths = _lengths(draft, usable, meshes.target.get_num_devices(), shared)
            self.lengths = (0, *lengths)
            self._check_attention_cores()
            self.fused = self._prepare(programs(usable, lengths, shared))
            self._stack = stack.pop_all()

    def _check_attention_cores(self) -> None:
        """A verification has to leave every row as many cores as plain decoding takes, or their bits would differ."""
        layout, asked = self.target.model.layout, self.options.attention_cores
        rows = padded_rows(min(MAX_ROWS, self.options.slots * (max(self.lengths) + 1)))
        most = max(1, layout.cores.count // (rows * layout.kv_heads))
        if asked > most:
            raise UserError(
                f"--attention-cores {asked}: {rows} rows of {layout.kv_heads} KV heads leave each {most} of the "
                f"{layout.cores.count} cores of a chip: lower it to {most}, or draft fewer tokens"
            )

    def _load(
        self, role: str, opened: OpenedModel, precision_name: str, runner: Runner, progress: Progress | None
    ) -> LoadedModel[BoardLlama]:
        start = time.perf_counter()
        precision = precision_named(precision_name)
        source = CheckpointSource(
            opened.checkpoint,
            runner.mesh_device,
            precision,
            default_cache_dir() if self.options.weight_cache else None,
            (lambda done, total, tensor: progress(role, done, total, tensor)) if progress else None,
        )
        pool = self.options.pool if role == "target" else None
        with errors_passed_on(f"{opened.source} could not be loaded"):
            model = (BatchLlama if self.options.slots > 1 else TtnnLlama)(
                opened.checkpoint.config,
                runner.mesh_device,
                source,
                precision=precision,
                max_seq_len=self.max_seq_len,
                runner=runner,
                attention_cores=self.options.attention_cores,
                prefill=self.options.prefill,
                slots=self.options.slots,
                pool=pool,
            )
        return LoadedModel(opened, model, precision_name, opened.seconds + time.perf_counter() - start)

    def _load_head(self, opened: OpenedHead, progress: Progress | None) -> LoadedHead:
        """The head beside the target, which is there."""
        start, name = time.perf_counter(), self.options.draft_precision
        precision, target = precision_named(name), self.target.model
        assert isinstance(target, TtnnLlama)  # `BoardOptions` refuses a head beside several slots
        config = opened.checkpoint.config
        tensors = HeadTensors(config, opened.checkpoint, self.target.opened.checkpoint)
        source = CheckpointSource(
            tensors,
            target.mesh_device,
            precision,
            default_cache_dir() if self.options.weight_cache else None,
            (lambda done, total, tensor: progress("draft", done, total, tensor)) if progress else None,
            total=len(head_specs(config, target.layout.chips, precision)),
        )
        with errors_passed_on(f"{opened.source} could not be loaded"):
            head = TtnnHead(
                config,
                target,
                source,
                target_ids=tensors.target_ids,
                precision=precision,
                max_seq_len=self.max_seq_len,
                attention_cores=self.options.attention_cores,
            )
        return LoadedHead(opened, head, name, opened.seconds + time.perf_counter() - start)

    def _drafting_model(self) -> Decoder | TtnnHead | None:
        if self.options.exits is not None:
            assert isinstance(self.target.model, TtnnLlama)  # as of a head
            return self.target.model.first_layers(self.options.exits)
        draft = self.draft.model if self.draft else None
        assert draft is None or isinstance(draft, (Decoder, TtnnHead))  # loaded here
        return draft

    def _prepare(self, needed: list[Program]) -> FusedRound | HeadRound | None:
        """Register all programs, note which one a path spends its time in, and return the rounds, if there are any."""
        drafting = self.drafting
        models: dict[str, Decoder | TtnnHead] = {"target": self.target.model}
        if drafting is not None:
            models["draft"] = drafting
        rounds: FusedRound | HeadRound | None = None
        if any(program.what == "round" for program in needed) and drafting is not None:
            if isinstance(drafting, TtnnHead):
                rounds = HeadRound(drafting)
            elif isinstance(self.target.model, TtnnLlama):  # `programs` has no rounds of several slots
                rounds = FusedRound(self.target.model, drafting)
        keys = []
        for program in needed:
            if program.what == "round" and rounds is not None:
                keys.append(rounds.prepare(program.k))
            elif program.what == "chain":
                model = models[program.model]
                if isinstance(model, TtnnHead):
                    keys.append(model.prepare_chain(program.k))
                else:
                    keys.append(model.prepare_chain(program.n, program.k))
            elif isinstance(model := models[program.model], BatchLlama):
                keys.append(model.prepare(program.what, program.n * program.users, program.n))
            else:
                keys.append(models[program.model].prepare(program.what, program.n))
        self._paths = {"baseline": keys[0], "speculative": keys[-1]}
        return rounds

    @property
    def timed(self) -> bool:
        """Whether the board's clock says something about a chip."""
        return self.board.timed

    def computed_rows(self, n: int) -> int:
        """Rows that the target computes to verify n of them: forwards that compute the same cost the same."""
        what = "ids" if self.options.greedy else "logits"
        prefix = TREE if self.options.workload.tree and n > 1 else ""
        if isinstance(self.drafting, TtnnHead) and n > 1:
            prefix = KEPT
        return self.target.model.computed_rows(prefix + what, n)

    def warm_up(self, prompt_lengths: Iterable[int], max_new_tokens: int | None = None) -> float:
        """Compile what generation will run, for prompts of these lengths, and capture traces; returns seconds.

        Prompts that are padded to the same length run the same programs. A draft that is asked late reads as much as
        has been written by then: max_new_tokens at most (None: up to the context's end). A kernel that came to the
        device after the capture could lie where a replay writes.
        """
        start = time.perf_counter()
        what = "programs could not be compiled" + " or captured (--no-trace goes without)" * self.trace
        try:
            with errors_passed_on(what):
                prompts = {self._padded(length) for length in prompt_lengths}
                texts = self._texts(prompts, max_new_tokens) if reads_late(self.options) else prompts
                self._warm |= texts
                for length in sorted(prompts):
                    self.target.model.warm_up(length)
                if self.draft is not None:
                    for length in sorted(texts):
                        self._read(self.draft, length)
                for each in (self.target, self.draft):
                    if isinstance(each, LoadedModel):
                        each.model.rest()
                for runner in self._runners:
                    runner.capture()
        except BaseException:
            self._stack.__exit__(*sys.exc_info())  # closes, and only logs what goes wrong with that
            raise
        return time.perf_counter() - start

    @staticmethod
    def _read(draft: LoadedModel[BoardLlama] | LoadedHead, length: int) -> None:
        if isinstance(draft, LoadedHead):
            draft.model.warm_up([0] * length)
        else:
            draft.model.warm_up(length)

    def prepare_prompt(self, length: int, max_new_tokens: int | None = None) -> float:
        """Compile what a prompt of this length needs, if nothing as long was compiled yet; returns seconds.

        Traces are released before, and captured anew after: a kernel that came to the device beside them could lie
        where a replay writes.
        """
        prompts = {self._padded(length)}
        texts = self._texts(prompts, max_new_tokens) if reads_late(self.options) else prompts
        if texts <= self._warm:
            return 0.0
        if self.trace:
            logger.info(f"a prompt of {length} tokens needs programs of its own: traces are captured anew for it")
        for runner in self._runners:
            runner.release()
        return self.warm_up([length], max_new_tokens)

    def _padded(self, length: int) -> int:
        return min(padded_prompt(length), self.max_seq_len)

    def _texts(self, prompts: Iterable[int], max_new_tokens: int | None) -> set[int]:
        """Padded lengths of prompts of these, and of texts that begin with them."""
        new = self.max_seq_len if max_new_tokens is None else max_new_tokens
        return {
            self._padded(length) for prompt in prompts for length in range(prompt, prompt + new + KV_BLOCK, KV_BLOCK)
        }

    def select(self, path: str) -> None:
        """Before a run on "baseline" or "speculative": make its program the traced one where only one can be."""
        self.target.model.runner.select(self._paths[path])

    def close(self) -> None:
        """Release traces and close the board. A second call does nothing."""
        self._stack.close()

    def describe(self) -> str:
        """The board in words, for reports."""
        chips = f"{self.board.chips} chip{'s' * (self.board.chips > 1)}"
        return f"{self.board.described}, {chips} ({self.board.arch})"
