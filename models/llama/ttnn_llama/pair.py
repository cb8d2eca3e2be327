"""Target and draft on one board: opened, loaded, their programs prepared, and closed again."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from models.llama.loading import LoadedModel, OpenedModel
from models.llama.ttnn_llama.boards import Board
from models.llama.ttnn_llama.fused import FusedRound
from models.llama.ttnn_llama.memory import MemoryPlan, check_fit, plan
from models.llama.ttnn_llama.mesh import Meshes, detect_board, errors_passed_on, open_mesh, target_chips
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

    precision, draft_precision: names in `precision.PRECISIONS`. placement: "shared", or "own-chip" for a draft on a
    chip of its own. trace: replay captured programs; never on mock boards, which cannot. weight_cache: keep
    converted weights on disk. draft_length: tokens drafted in a round. greedy, batched: how the engine will decode
    and verify, which decides the programs that are prepared.
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
    """Bytes per chip of "target" and "draft". Raises UserError if the chips cannot share a model."""
    own_chip = draft is not None and options.placement == "own-chip"
    traced = _traced_layers(target, draft, options) if options.trace else 0
    plans = {
        "target": plan(
            target.checkpoint.config,
            precision_named(options.precision),
            target_chips(board, own_chip_for_draft=own_chip),
            max_seq_len,
            traced * TRACE_BYTES_PER_LAYER,
            dram_banks=board.dram_banks,
        )
    }
    if draft:
        plans["draft"] = plan(
            draft.checkpoint.config,
            precision_named(options.draft_precision),
            1 if own_chip else board.chips,
            max_seq_len,
            0,
            dram_banks=board.dram_banks,
        )
    return plans


def _traced_layers(target: OpenedModel, draft: OpenedModel | None, options: BoardOptions) -> int:
    """Layers in all traces together: one decode; a verification; chains after one and after two tokens."""
    layers = target.checkpoint.config.num_hidden_layers
    if draft is None:
        return layers
    return 2 * layers + 2 * (options.draft_length + 1) * draft.checkpoint.config.num_hidden_layers


class BoardModels:
    """A target and, if there is one, its draft on the board of this machine (or on the active mock).

    ``target`` and ``draft`` are `LoadedModel`s, ``fused`` the fused round or None where there is none (sampling,
    sequential verification, a draft on its own chip). Close it when done; an error while loading closes it too.

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
        progress: Progress | None = None,
    ):
        self.options = options
        self.max_seq_len = max_seq_len
        self.mock = cluster.is_mock()
        self.board = detect_board()
        self.plans = memory_plans(self.board, target, draft, max_seq_len, options)
        check_fit(self.board, self.plans, options.placement if draft else "shared")
        trace = options.trace and not self.mock
        self._paths: dict[str, tuple] = {}
        with contextlib.ExitStack() as stack:
            meshes = stack.enter_context(
                open_mesh(
                    self.board,
                    trace_region_bytes=self.plans["target"].traces if trace else 0,
                    own_chip_for_draft=draft is not None and options.placement == "own-chip",
                )
            )
            runners = self._make_runners(meshes, trace)
            for runner in runners.values():
                stack.callback(runner.release)
            self.runners = list(runners.values())
            self.target = self._load("target", target, meshes.target, runners[meshes.target.id()], progress)
            self.draft = (
                self._load("draft", draft, meshes.draft, runners[meshes.draft.id()], progress) if draft else None
            )
            self.fused = self._prepare(shared=meshes.target is meshes.draft)
            self._stack = stack.pop_all()

    @staticmethod
    def _make_runners(meshes: Meshes, trace: bool) -> dict[int, Runner]:
        return {mesh.id(): Runner(mesh, trace=trace) for mesh in (meshes.target, meshes.draft)}

    def _load(
        self, role: str, opened: OpenedModel, mesh_device, runner: Runner, progress: Progress | None
    ) -> LoadedModel:
        start = time.perf_counter()
        name = self.options.precision if role == "target" else self.options.draft_precision
        precision = precision_named(name)
        source = CheckpointSource(
            opened.checkpoint,
            mesh_device,
            precision,
            default_cache_dir() if self.options.weight_cache else None,
            (lambda done, total, tensor: progress(role, done, total, tensor)) if progress else None,
        )
        with errors_passed_on(f"{opened.source} could not be loaded"):
            model = TtnnLlama(
                opened.checkpoint.config,
                mesh_device,
                source,
                precision=precision,
                max_seq_len=self.max_seq_len,
                runner=runner,
            )
        return LoadedModel(opened, model, name, opened.seconds + time.perf_counter() - start)

    def _prepare(self, *, shared: bool) -> FusedRound | None:
        """Register every program that generation will run, so that all are compiled and captured before it."""
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
        """Compile what generation will run, for prompts of these lengths, and capture traces; returns seconds."""
        start = time.perf_counter()
        # the target reads all of a prompt, the draft all but the last token
        lengths = sorted({max(length - less, 1) for length in prompt_lengths for less in (0, 1)})
        with errors_passed_on("a program could not be compiled or captured (--no-trace runs without traces)"):
            for loaded in filter(None, (self.target, self.draft)):
                loaded.model.compile_prefill(lengths)
            for runner in self.runners:
                runner.capture()
        return time.perf_counter() - start

    def select(self, path: str) -> None:
        """Before a run on "baseline" or "speculative": make its program the traced one where only one can be."""
        self.target.model.runner.select(self._paths[path])

    def close(self) -> None:
        """Release traces and close the board."""
        self._stack.close()

    def describe(self) -> str:
        """The board in words, for reports."""
        kind = "mock board, numbers from golden functions" if self.mock else "board"
        return f"{self.board.name} ({kind}, {self.board.chips} chip{'s' * (self.board.chips > 1)})"
