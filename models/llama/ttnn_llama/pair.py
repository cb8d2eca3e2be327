"""Target and draft on one board: opened, loaded, their programs prepared, and closed again."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from models.llama.loading import LoadedModel, OpenedModel
from models.llama.ttnn_llama.boards import Board
from models.llama.ttnn_llama.fused import FusedRound
from models.llama.ttnn_llama.memory import MemoryPlan, check_fit, plan
from models.llama.ttnn_llama.mesh import detect_board, errors_passed_on, open_mesh, target_chips
from models.llama.ttnn_llama.model import TtnnLlama
from models.llama.ttnn_llama.precision import precision_named
from models.llama.ttnn_llama.runner import Runner
from models.llama.ttnn_llama.weight_cache import default_cache_dir
from models.llama.ttnn_llama.weights import CheckpointSource
from models.ttnn_mock import cluster

# An upper estimate: tt_transformers reserves 25 MB for a trace of 32 layers with about 20 ops each.
TRACE_BYTES_PER_LAYER = 800_000

Progress = Callable[[str, int, int, str], None]  # role, tensors done, tensors in all, name


@dataclass(frozen=True)
class BoardOptions:
    """How models run on a board.

    precision, draft_precision: names in `precision.PRECISIONS`.
    placement: "shared", or "own-chip" for a draft on a chip of its own.
    trace: replay captured programs; never on mock boards, which cannot.
    weight_cache: keep converted weights on disk.
    draft_length: tokens drafted in a round; 0 for none.
    greedy, batched: how the engine will decode and verify, which decides the programs that are prepared.
    """

    precision: str = "performance"
    draft_precision: str = "performance"
    placement: str = "shared"
    trace: bool = True
    weight_cache: bool = True
    draft_length: int = 4
    greedy: bool = True
    batched: bool = True


def memory_plans(
    board: Board, target: OpenedModel, draft: OpenedModel | None, max_seq_len: int, options: BoardOptions
) -> dict[str, MemoryPlan]:
    """What "target" and "draft" take of each chip. Traces count with the target, and on a chip of its own with the
    draft too: every chip reserves the same for them. Raises UserError if the chips cannot share a model."""
    own_chip = _on_own_chip(draft, options)
    trace_bytes = _traced_layers(target, draft, options) * TRACE_BYTES_PER_LAYER if options.trace else 0
    plans = {
        "target": plan(
            target.checkpoint.config,
            precision_named(options.precision),
            target_chips(board, own_chip_for_draft=own_chip),
            max_seq_len,
            trace_bytes,
            dram_banks=board.dram_banks,
        )
    }
    if draft:
        plans["draft"] = plan(
            draft.checkpoint.config,
            precision_named(options.draft_precision),
            1 if own_chip else board.chips,
            max_seq_len,
            trace_bytes if own_chip else 0,
            dram_banks=board.dram_banks,
        )
    return plans


def _on_own_chip(draft: OpenedModel | None, options: BoardOptions) -> bool:
    return draft is not None and options.placement == "own-chip"


def _traced_layers(target: OpenedModel, draft: OpenedModel | None, options: BoardOptions) -> int:
    """Layers in all traces together: one decode; a verification; chains after one and after two tokens."""
    layers = target.checkpoint.config.num_hidden_layers
    if draft is None:
        return layers
    return 2 * layers + 2 * (options.draft_length + 1) * draft.checkpoint.config.num_hidden_layers


class BoardModels:
    """A target and, if there is one, its draft on the board of this machine (or on the active mock).

    Nothing is opened before the memory is known to suffice; ``announce`` is told what is needed before that is
    decided. Close it when done; an error or Ctrl-C while loading or warming up closes the board too.

    Attributes:
        target, draft: `LoadedModel`s; ``draft`` is None if there is none.
        fused: greedy rounds as one program, or None: sampling, sequential verification, a draft on its own chip.
        board, mock: which board it is, and whether it is a mock of one.
        plans: memory per chip of "target" and "draft".
        trace: whether programs are replayed as traces.

    Raises:
        UserError: what `mesh.open_mesh`, `memory.check_fit` and the weights raise.
    """

    def __init__(
        self,
        target: OpenedModel,
        draft: OpenedModel | None,
        *,
        max_seq_len: int,
        options: BoardOptions,
        announce: Callable[[Board, dict[str, MemoryPlan]], None] | None = None,
        progress: Progress | None = None,
    ):
        self.options = options
        self.max_seq_len = max_seq_len
        self.mock = cluster.is_mock()
        self.board = detect_board()
        self.plans = memory_plans(self.board, target, draft, max_seq_len, options)
        if announce:
            announce(self.board, self.plans)
        check_fit(self.board, self.plans, options.placement if draft else "shared")
        self.trace = options.trace and not self.mock
        self._paths: dict[str, tuple] = {}
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
            self.draft = self._load("draft", draft, options.draft_precision, draft_runner, progress) if draft else None
            self.fused = self._prepare(shared)
            self._stack = stack.pop_all()

    def _load(
        self, role: str, opened: OpenedModel, precision_name: str, runner: Runner, progress: Progress | None
    ) -> LoadedModel:
        start = time.perf_counter()
        precision = precision_named(precision_name)
        source = CheckpointSource(
            opened.checkpoint,
            runner.mesh_device,
            precision,
            default_cache_dir() if self.options.weight_cache else None,
            (lambda done, total, tensor: progress(role, done, total, tensor)) if progress else None,
        )
        with errors_passed_on(f"{opened.source} could not be loaded"):
            model = TtnnLlama(
                opened.checkpoint.config,
                runner.mesh_device,
                source,
                precision=precision,
                max_seq_len=self.max_seq_len,
                runner=runner,
            )
        return LoadedModel(opened, model, precision_name, opened.seconds + time.perf_counter() - start)

    def _prepare(self, shared: bool) -> FusedRound | None:
        """Register every program that generation will run, so that all are compiled and captured before it; note the
        one that a path spends its time in."""
        options, target = self.options, self.target.model
        what = "ids" if options.greedy else "logits"
        self._paths["baseline"] = self._paths["speculative"] = target.prepare(what, 1)
        if self.draft is None or not options.draft_length:
            return None
        k, draft = options.draft_length, self.draft.model
        if options.greedy and options.batched and shared:
            fused = FusedRound(target, draft)
            self._paths["speculative"] = fused.prepare(k)
            return fused
        if options.batched:
            self._paths["speculative"] = target.prepare(what, k + 1)
        for m in (1, 2):  # after full acceptance two tokens are to be fed
            if options.greedy:
                draft.prepare_chain(m, k)
            else:
                draft.prepare(what, m)
        return None

    def warm_up(self, prompt_lengths: Iterable[int]) -> float:
        """Compile what generation will run, for prompts of these lengths, and capture traces; returns seconds.

        Every length is read once, not only every padded one: where the last row is cut out is a constant of a program,
        and a kernel that came to the device after the capture could lie where a replay writes.
        """
        start = time.perf_counter()
        what = "programs could not be compiled" + " or captured (--no-trace goes without)" * self.trace
        try:
            with errors_passed_on(what):
                for length in sorted(set(prompt_lengths)):
                    for loaded in filter(None, (self.target, self.draft)):
                        loaded.model.prefill([0] * length)
                for runner in self._runners:
                    runner.capture()
        except BaseException:
            self._stack.__exit__(*sys.exc_info())  # closes, and only logs what goes wrong with that
            raise
        return time.perf_counter() - start

    def select(self, path: str) -> None:
        """Before a run on "baseline" or "speculative": make its program the traced one where only one can be."""
        self.target.model.runner.select(self._paths[path])

    def close(self) -> None:
        """Release traces and close the board. A second call does nothing."""
        self._stack.close()

    def describe(self) -> str:
        """The board in words, for reports."""
        chips = f"{self.board.chips} chip{'s' * (self.board.chips > 1)}"
        return f"{'mock of an ' * self.mock}{self.board.name}, {chips} ({self.board.arch})"
